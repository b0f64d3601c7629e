"""What the aggregation and the attention kernels share: masks and tiles in, softmax step by step."""

# Kernels carry no annotations: the compiler of triton refuses names of Python's types in them.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from typing import Any

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


def mask_argument(mask: Tensor | None) -> tuple[Any, ...]:
    """Give the kernels a mask (b, l, n) in bytes: ``attended``, its two strides, the mask, its three strides.

    ``attended`` (b, n) tells which tokens any row attends to: the others are never loaded and may hold NaN.
    Where all rows of the mask are one in memory it says everything and stands alone; None without a mask.
    """
    if mask is None:
        return None, 0, 0, None, 0, 0, 0
    shared = mask.stride(1) == 0 and mask.shape[1] > 0
    attended = mask[:, 0] if shared else mask.any(dim=1)
    whole = None if shared else mask.view(torch.uint8)
    return attended.view(torch.uint8), *attended.stride(), whole, *mask.stride()


@triton.jit
def load_attended(mask, batch, in_n, n):
    """Tell which tokens exist and are attended to by some row."""
    real = in_n < n
    if mask[0] is not None:
        real = tl.load(mask[0] + batch * mask[1] + in_n.to(tl.int64) * mask[2], mask=real, other=0) != 0
    return real


@triton.jit
def load_mask(mask, batch, in_l, in_n, exist, real):
    """Tell where rows and tokens meet: where the mask says so or, without one, wherever both are real."""
    if mask[3] is not None:
        at = mask[3] + batch * mask[4] + in_l.to(tl.int64) * mask[5] + in_n.to(tl.int64) * mask[6]
        real = tl.load(at, mask=exist, other=0) != 0
    return real


@triton.jit
def load_tile(matrix, rows, real, columns, width, DTYPE: tl.constexpr):
    """Load (rows, columns) of a matrix (pointer, stride of rows), zeros in rows where ``real`` is False."""
    at = matrix[0] + rows[:, None].to(tl.int64) * matrix[1] + columns
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
