"""What a boolean mask, True = takes part, becomes inside an implementation."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from metris_blocks.ops.shapes import at_least_float32

# Kernels read a bias in vectors of up to eight; a row that does not start on one is refused (pytorch#121943).
_ALIGNMENT = 8


def masked_softmax(logits: Tensor, mask: Tensor | None) -> Tensor:
    """Softmax over the last axis among the True entries only, in at least float32.

    Args:
        logits: (..., n) any finite values where ``mask`` is True, anything (NaN too) elsewhere.
        mask: (..., n) bool, broadcastable to ``logits``; True = takes part. None: all do.

    Returns:
        (..., n) weights that sum to 1 in each row; zeros, with zero gradient, in a row without True.
    """
    logits = at_least_float32(logits)
    if mask is None:
        return logits.softmax(dim=-1)
    # finfo.min, not -inf: an empty row is then uniform instead of NaN, and the second fill zeroes it.
    logits = logits.masked_fill(~mask, torch.finfo(logits.dtype).min)
    return logits.softmax(dim=-1).masked_fill(~mask, 0)


def masked_softmax_per_head(logits: Tensor, mask: Tensor | None) -> Tensor:
    """Softmax over the last axis under a mask that all heads share: `masked_softmax` in fewer passes.

    The mask is widened over the heads by an addition, not by two fills.

    Args:
        logits: (b, l, heads, n), all finite.
        mask: (b, l, n) bool; True = takes part. None: all do.

    Returns:
        (b, l, heads, n) weights in at least float32; zeros in a row without True.
    """
    logits = at_least_float32(logits)
    if mask is None:
        return logits.softmax(dim=-1)
    # A row without True attends to all, which is finite, and is zeroed after.
    some = mask.any(dim=-1, keepdim=True)
    bias = torch.zeros(mask.shape, dtype=logits.dtype, device=mask.device)
    bias = bias.masked_fill(some & ~mask, -math.inf)
    weights = (logits + bias[:, :, None]).softmax(dim=-1)
    return weights * some[:, :, None].to(weights.dtype)


def zero_unless_any(mask: Tensor, *tensors: Tensor) -> list[Tensor]:
    """Zero the visual tokens that no row attends to, so that NaN there cannot leak through ``0 · NaN``.

    Args:
        mask: (b, l, n) or (b, n) bool.
        tensors: (b, n, ...) each.
    """
    attended = mask.any(dim=1) if mask.ndim == 3 else mask
    # where, and not masked_fill: that copies first and fills in a second pass.
    return [torch.where(attended.reshape(*attended.shape, *(1,) * (x.ndim - 2)), x, 0) for x in tensors]


def per_row(mask: Tensor, l: int) -> Tensor:
    """Give a mask (b, l, n) or (b, n) as (b, l, n), without a copy."""
    return mask if mask.ndim == 3 else mask[:, None].expand(-1, l, -1)


def aligned_bias(mask: Tensor, heads: int, dtype: torch.dtype) -> Tensor:
    """Turn a bool mask into the additive one that kernels take, its rows aligned in memory.

    -inf and never finfo.min: a row of -inf gives zeros and zero gradient, a row of finfo.min the mean of V.

    Args:
        mask: (b, l, n) bool; True = takes part.
        heads: Number of heads that share it.
        dtype: The query's; kernels misread any other.

    Returns:
        (b, heads, l, n) of 0 and -inf, broadcast over the heads without a copy.
    """
    n = mask.shape[-1]
    bias = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, -math.inf)
    if torch.compiler.is_exporting():
        # A program holds for every n, and PyTorch aligns the rows itself when it runs one.
        return bias[:, None].expand(-1, heads, -1, -1)
    # Pad, slice, expand, and nothing after: any later op would lose the aligned stride. Never by 0, or
    # compiled code would hold for the widths alone that do, or do not, fill whole vectors.
    return F.pad(bias, (0, _ALIGNMENT - n % _ALIGNMENT))[..., :n][:, None].expand(-1, heads, -1, -1)
