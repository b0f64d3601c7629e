"""Masked-softmax aggregation in Triton: one pass over the visual tokens, no weights in memory."""

import torch
from torch import Tensor

from metris_blocks.ops.backends.opaque import opaque


def aggregate(
    scores: Tensor, dynamic_mask: Tensor, visual: Tensor, temperature: float, divide_by_count: bool
) -> Tensor:
    """(b, l, n), (b, l, n) bool, (b, n, c) -> (b, l, c) in the dtype of ``visual``.

    What ``visual`` holds where no row curates it, and ``scores`` where masked, NaN too, reaches nothing.
    """
    out: Tensor = _aggregate(scores, dynamic_mask, visual, temperature, divide_by_count)[0]
    return out


def _forward(
    scores: Tensor, dynamic_mask: Tensor, visual: Tensor, temperature: float, divide_by_count: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from metris_blocks.ops.backends.triton.kernels import aggregate as kernels

    return kernels.aggregate(scores, dynamic_mask, visual, temperature, divide_by_count)


def _like(
    scores: Tensor, dynamic_mask: Tensor, visual: Tensor, temperature: float, divide_by_count: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (b, l, _), c = scores.shape, visual.shape[2]
    exact, logsumexp, divisor = (
        scores.new_empty(shape, dtype=torch.float32) for shape in ((b, l, c), (b, l), (b, l))
    )
    return visual.new_empty((b, l, c)), exact, logsumexp, divisor


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


_aggregate = opaque(
    "triton_aggregate",
    _forward,
    _like,
    _backward,
    results="out exact logsumexp divisor",
    gradients="scores visual",
)
