"""Masked-softmax aggregation in Triton: one pass over the visual tokens, no weights in memory."""

from typing import Any

import torch
from torch import Tensor


def aggregate(
    scores: Tensor, dynamic_mask: Tensor, visual: Tensor, temperature: float, divide_by_count: bool
) -> Tensor:
    """(b, l, n), (b, l, n) bool, (b, n, c) -> (b, l, c) in the dtype of ``visual``.

    What ``visual`` holds where no row curates it, and ``scores`` where masked, NaN too, reaches nothing.
    """
    out: Tensor = _forward(scores, dynamic_mask, visual, temperature, divide_by_count)[0]
    return out


@torch.library.custom_op("metris_blocks::triton_aggregate", mutates_args=())
def _forward(
    scores: Tensor, dynamic_mask: Tensor, visual: Tensor, temperature: float, divide_by_count: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from metris_blocks.ops.backends.triton.kernels import aggregate as kernels

    return kernels.aggregate(scores, dynamic_mask, visual, temperature, divide_by_count)


@_forward.register_fake
def _forward_shapes(
    scores: Tensor, dynamic_mask: Tensor, visual: Tensor, temperature: float, divide_by_count: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (b, l, _), c = scores.shape, visual.shape[2]
    exact, logsumexp, divisor = (
        scores.new_empty(shape, dtype=torch.float32) for shape in ((b, l, c), (b, l), (b, l))
    )
    return visual.new_empty((b, l, c)), exact, logsumexp, divisor


@torch.library.custom_op("metris_blocks::triton_aggregate_backward", mutates_args=())
def _backward(
    grad: Tensor,
    exact: Tensor,
    logsumexp: Tensor,
    divisor: Tensor,
    scores: Tensor,
    dynamic_mask: Tensor,
    visual: Tensor,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    from metris_blocks.ops.backends.triton.kernels import aggregate as kernels

    return kernels.aggregate_backward(
        grad, exact, logsumexp, divisor, scores, dynamic_mask, visual, temperature
    )


@_backward.register_fake
def _backward_shapes(
    grad: Tensor,
    exact: Tensor,
    logsumexp: Tensor,
    divisor: Tensor,
    scores: Tensor,
    dynamic_mask: Tensor,
    visual: Tensor,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    return scores.new_empty(scores.shape), visual.new_empty(visual.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.temperature, _ = inputs
    ctx.save_for_backward(*output[1:], *tensors)


def _differentiate(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    scores_grad, visual_grad = _backward(grad, *ctx.saved_tensors, ctx.temperature)
    return scores_grad, None, visual_grad, None, None


_forward.register_autograd(_differentiate, setup_context=_save)
