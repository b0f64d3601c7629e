"""What the aggregation and the attention kernels share: loads of masks and tiles, softmax step by step."""

# Kernels carry no annotations: the compiler of triton refuses names of Python's types in them.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor

from metris_blocks.ops.backends.triton import INTERPRETED


def block(size: int, largest: int) -> int:
    """Width of a tile: a power of two, at least the 16 that tl.dot asks for."""
    return min(largest, max(16, int(triton.next_power_of_2(size))))


def dot_dtype(dtype: torch.dtype) -> tl.dtype:
    """Type in which tiles are multiplied: their own, but the interpreter cannot multiply bfloat16."""
    if dtype == torch.float16:
        return tl.float16
    return tl.bfloat16 if dtype == torch.bfloat16 and not INTERPRETED else tl.float32


def mask_arguments(mask: Tensor | None) -> tuple[Tensor | None, Tensor | None, tuple[int, ...]]:
    """Give what the kernels read of a mask (b, l, n), in bytes, and all strides.

    First the tokens that any row attends to, (b, n): all others are never loaded and may hold NaN. Then the
    mask, or None where its rows are one in memory: the first says it all.
    """
    if mask is None:
        return None, None, (0, 0, 0, 0, 0)
    shared = mask.stride(1) == 0 and mask.shape[1] > 0
    attended = mask[:, 0] if shared else mask.any(dim=1)
    strides = (*attended.stride(), *mask.stride())
    return attended.view(torch.uint8), None if shared else mask.view(torch.uint8), strides


@triton.jit
def load_attended(attended, batch, in_n, n, strides):
    """Tell which tokens exist and are attended to by some row."""
    real = in_n < n
    if attended is not None:
        at = attended + batch * strides[0] + in_n.to(tl.int64) * strides[1]
        real = tl.load(at, mask=real, other=0) != 0
    return real


@triton.jit
def load_mask(mask, batch, stride_batch, first, stride_first, second, stride_second, exist, real):
    """Tell where (first, second) meet: where the mask says so or, without one, wherever both are real."""
    if mask is not None:
        at = mask + batch * stride_batch + first[:, None].to(tl.int64) * stride_first
        real = tl.load(at + second.to(tl.int64) * stride_second, mask=exist, other=0) != 0
    return real


@triton.jit
def load_tile(base, rows, real, stride, columns, width, DTYPE: tl.constexpr):
    """Load (rows, columns) of a matrix of ``width`` columns, zeros in the rows where ``real`` is False."""
    at = base + rows[:, None].to(tl.int64) * stride + columns
    return tl.load(at, mask=real[:, None] & (columns < width), other=0.0).to(DTYPE)


@triton.jit
def softmax_step(logits, top, total):
    """Take a tile of base-2 logits, -inf where left out, into a running softmax over its rows.

    Returns the tile's weights, what fades earlier sums to their scale, and the new top and total.
    """
    new = tl.maximum(top, tl.max(logits, axis=1))
    # A row in which nothing took part yet has no top, and -inf - -inf is NaN.
    shift = tl.where(new == float("-inf"), 0.0, new)
    weights = tl.exp2(logits - shift[:, None])
    fade = tl.exp2(top - shift)
    return weights, fade, new, total * fade + tl.sum(weights, axis=1)


@triton.jit
def softmax_end(top, total):
    """Give what to divide sums by, and log2 of the sum of exponentials: +inf where nothing took part."""
    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    return total, tl.where(empty, float("inf"), top + tl.log2(total))
