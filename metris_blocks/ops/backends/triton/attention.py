"""Flash attention in Triton for a boolean mask that all heads share; it is read as it is, in bytes."""

from typing import Any

import torch
from torch import Tensor

from metris_blocks.ops.backends.triton import reasons as reasons


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """(b, l, heads, e), (b, n, heads, e), (b, n, heads, e), (b, l, n) bool -> (b, l, heads, e).

    Tokens that no row attends to, and queries of rows that attend to nothing, may hold NaN.
    """
    out: Tensor = _forward(query, key, value, mask, scale)[0]
    return out


@torch.library.custom_op("metris_blocks::triton_attention", mutates_args=())
def _forward(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    from metris_blocks.ops.backends.triton.kernels import attend as kernels

    return kernels.attend(query, key, value, mask, scale)


@_forward.register_fake
def _forward_shapes(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    b, l, heads, _ = query.shape
    return query.new_empty(query.shape), query.new_empty((b, heads, l), dtype=torch.float32)


@torch.library.custom_op("metris_blocks::triton_attention_backward", mutates_args=())
def _backward(
    grad: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    from metris_blocks.ops.backends.triton.kernels import attend as kernels

    return kernels.attend_backward(grad, out, logsumexp, query, key, value, mask, scale)


@_backward.register_fake
def _backward_shapes(
    grad: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*output, *tensors)


def _differentiate(ctx: Any, grad: Tensor, logsumexp_grad: Tensor) -> tuple[Tensor | None, ...]:
    return *_backward(grad, *ctx.saved_tensors, ctx.scale), None, None


_forward.register_autograd(_differentiate, setup_context=_save)
