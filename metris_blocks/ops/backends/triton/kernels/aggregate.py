"""Masked-softmax aggregation in one pass over the visual tokens, and its gradients; no weights are stored."""

# Kernels carry no annotations: the compiler of triton refuses names of Python's types in them.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from metris_blocks.ops.backends.triton.kernels.tiles import (
    block,
    dot_dtype,
    load_attended,
    load_mask,
    load_tile,
    mask_arguments,
    softmax_end,
    softmax_step,
)


def aggregate(
    scores: Tensor, dynamic_mask: Tensor, visual: Tensor, temperature: float, divide_by_count: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Give out (b, l, c), the same in float32, and base-2 logsumexp and divisor of its rows (b, l)."""
    (b, l, n), c = scores.shape, visual.shape[2]
    out = visual.new_empty((b, l, c))
    exact = out.new_empty(out.shape, dtype=torch.float32)
    logsumexp, divisor = (scores.new_zeros((b, l), dtype=torch.float32) for _ in range(2))
    *masks, mask_strides = mask_arguments(dynamic_mask)
    blocks = _blocks(l, n, c, visual.dtype)
    tiles_l, _, tiles_c = _tiles(l, n, c, blocks)
    with torch.cuda.device_of(visual):
        _forward[(b * tiles_l * tiles_c,)](
            scores.contiguous(),
            visual.contiguous(),
            *masks,
            out,
            exact,
            logsumexp,
            divisor,
            mask_strides,
            math.log2(math.e) / temperature,
            l,
            n,
            c,
            DIVIDE=divide_by_count,
            DTYPE=dot_dtype(visual.dtype),
            **blocks,
        )
    return out, exact, logsumexp, divisor


def aggregate_backward(
    grad: Tensor,
    exact: Tensor,
    logsumexp: Tensor,
    divisor: Tensor,
    scores: Tensor,
    dynamic_mask: Tensor,
    visual: Tensor,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """Give the gradients of scores (b, l, n) and visual (b, n, c)."""
    (b, l, n), c = scores.shape, visual.shape[2]
    scores_grad, visual_grad = scores.new_empty(scores.shape), visual.new_empty(visual.shape)
    if exact.numel() == 0:
        return scores_grad.zero_(), visual_grad.zero_()
    blocks = _blocks(l, n, c, visual.dtype)
    tiles_l, tiles_n, tiles_c = _tiles(l, n, c, blocks)
    *masks, mask_strides = mask_arguments(dynamic_mask)
    common = (
        scores.contiguous(),
        grad.contiguous(),
        logsumexp,
        divisor,
        *masks,
        mask_strides,
        math.log2(math.e) / temperature,
        l,
        n,
        c,
    )
    with torch.cuda.device_of(visual):
        _backward_scores[(b * tiles_n * tiles_l,)](
            scores_grad,
            exact,
            visual.contiguous(),
            *common,
            1 / temperature,
            DTYPE=dot_dtype(visual.dtype),
            **blocks,
        )
        _backward_visual[(b * tiles_n * tiles_c,)](
            visual_grad,
            *common,
            # A weight over a count may be too small for float16.
            DTYPE=tl.float32 if visual.dtype == torch.float16 else dot_dtype(visual.dtype),
            PRECISION="ieee" if visual.dtype == torch.float32 else "tf32",
            **blocks,
        )
    return scores_grad, visual_grad


def _blocks(l: int, n: int, c: int, dtype: torch.dtype) -> dict[str, int]:
    """Choose tiles that spill no registers and fit the 99 KiB of the smallest shared memory."""
    return {
        "BLOCK_L": block(l, 32),
        # Without tensor cores operands stay in registers.
        "BLOCK_N": block(n, 32 if dtype == torch.float32 else 64),
        "BLOCK_C": block(c, 128),
        "num_warps": 8,
        "enable_fp_fusion": True,
    }


def _tiles(l: int, n: int, c: int, blocks: dict[str, int]) -> tuple[int, int, int]:
    sizes = ((l, "BLOCK_L"), (n, "BLOCK_N"), (c, "BLOCK_C"))
    tiles_l, tiles_n, tiles_c = (triton.cdiv(size, blocks[name]) for size, name in sizes)
    return tiles_l, tiles_n, tiles_c


@triton.jit
def _forward(
    scores,
    visual,
    attended,
    mask,
    out,
    exact,
    logsumexp,
    divisor,
    mask_strides,
    to_logits,
    l,
    n,
    c,
    DIVIDE: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    batch, in_l, in_c = _position(l, BLOCK_L, c, BLOCK_C)
    real_l = in_l < l
    scores += batch * l * n
    visual += batch * n * c

    top = tl.full((BLOCK_L,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_L,), tl.float32)
    count = tl.zeros((BLOCK_L,), tl.float32)
    acc = tl.zeros((BLOCK_L, BLOCK_C), tl.float32)
    for n0 in range(0, n, BLOCK_N):
        in_n = n0 + tl.arange(0, BLOCK_N)
        real_n = load_attended(attended, batch, in_n, n, mask_strides)
        v = load_tile(visual, in_n, real_n, c, in_c, c, DTYPE)
        exist, real = real_l[:, None] & (in_n < n), real_l[:, None] & real_n
        part = load_mask(
            mask, batch, mask_strides[2], in_l, mask_strides[3], in_n, mask_strides[4], exist, real
        )
        logits = _load_logits(scores, in_l, n, in_n, 1, exist, part, to_logits)
        weights, fade, top, total = softmax_step(logits, top, total)
        count += tl.sum(part.to(tl.float32), axis=1)
        rough = weights.to(DTYPE)
        acc = tl.dot(rough, v, acc * fade[:, None], input_precision="ieee")
        if DTYPE.primitive_bitwidth < 32:
            # What rounding took from the weights: the gradient of a score is a small difference of such sums.
            acc = tl.dot((weights - rough.to(tl.float32)).to(DTYPE), v, acc)

    total, lse = softmax_end(top, total)
    by = tl.maximum(count, 1.0) if DIVIDE else tl.full((BLOCK_L,), 1.0, tl.float32)
    acc = acc / (total * by)[:, None]
    rows = batch * l + in_l
    at, real = rows[:, None] * c + in_c, real_l[:, None] & (in_c < c)
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=real)
    tl.store(exact + at, acc, mask=real)
    # Programs that share a row all store the same numbers.
    tl.store(logsumexp + rows, lse, mask=real_l)
    tl.store(divisor + rows, by, mask=real_l)


@triton.jit
def _backward_scores(
    scores_grad,
    exact,
    visual,
    scores,
    grad,
    logsumexp,
    divisor,
    attended,
    mask,
    mask_strides,
    to_logits,
    l,
    n,
    c,
    per_logit,
    DTYPE: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    batch, in_n, in_l = _position(n, BLOCK_N, l, BLOCK_L)
    rows = batch * l + in_l
    real_n = load_attended(attended, batch, in_n, n, mask_strides)
    visual += batch * n * c
    lse = tl.load(logsumexp + rows, mask=in_l < l, other=float("inf"))
    by = tl.load(divisor + rows, mask=in_l < l, other=1.0)
    real_l = lse != float("inf")

    weights_grad = tl.zeros((BLOCK_L, BLOCK_N), tl.float32)
    along = tl.zeros((BLOCK_L,), tl.float32)
    for c0 in range(0, c, BLOCK_C):
        in_c = c0 + tl.arange(0, BLOCK_C)
        g = load_tile(grad, rows, real_l, c, in_c, c, DTYPE)
        v = load_tile(visual, in_n, real_n, c, in_c, c, DTYPE)
        weights_grad = tl.dot(g, v.T, weights_grad, input_precision="ieee")
        o = load_tile(exact, rows, real_l, c, in_c, c, tl.float32)
        along += tl.sum(g.to(tl.float32) * o, axis=1)

    exist, real = (in_l < l)[:, None] & (in_n < n), real_l[:, None] & real_n
    part = load_mask(mask, batch, mask_strides[2], in_l, mask_strides[3], in_n, mask_strides[4], exist, real)
    logits = _load_logits(scores + batch * l * n, in_l, n, in_n, 1, exist, part, to_logits)
    weights = tl.exp2(logits - lse[:, None])
    acc = weights * (weights_grad / by[:, None] - along[:, None]) * per_logit
    at = scores_grad + rows[:, None] * n + in_n
    tl.store(at, acc.to(scores_grad.dtype.element_ty), mask=exist)


@triton.jit
def _backward_visual(
    visual_grad,
    scores,
    grad,
    logsumexp,
    divisor,
    attended,
    mask,
    mask_strides,
    to_logits,
    l,
    n,
    c,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    batch, in_n, in_c = _position(n, BLOCK_N, c, BLOCK_C)
    real_n = load_attended(attended, batch, in_n, n, mask_strides)
    scores += batch * l * n

    acc = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    for l0 in range(0, l, BLOCK_L):
        in_l = l0 + tl.arange(0, BLOCK_L)
        rows = batch * l + in_l
        lse = tl.load(logsumexp + rows, mask=in_l < l, other=float("inf"))
        by = tl.load(divisor + rows, mask=in_l < l, other=1.0)
        real_l = lse != float("inf")
        g = load_tile(grad, rows, real_l, c, in_c, c, DTYPE)
        # Transposed: a row is a visual token, a column an expression token.
        exist, real = (in_n < n)[:, None] & (in_l < l), real_n[:, None] & real_l
        part = load_mask(
            mask, batch, mask_strides[2], in_n, mask_strides[4], in_l, mask_strides[3], exist, real
        )
        logits = _load_logits(scores, in_n, 1, in_l, n, exist, part, to_logits)
        weights = tl.exp2(logits - lse) / by
        acc = tl.dot(weights.to(DTYPE), g, acc, input_precision=PRECISION)

    at = visual_grad + (batch * n + in_n)[:, None] * c + in_c
    tl.store(at, acc.to(visual_grad.dtype.element_ty), mask=(in_n < n)[:, None] & (in_c < c))


@triton.jit
def _position(first, BLOCK_FIRST: tl.constexpr, second, BLOCK_SECOND: tl.constexpr):
    """Find the program's batch (int64) and tiles; those along the second axis are neighbours."""
    tile = tl.program_id(0)
    tiles_first, tiles_second = tl.cdiv(first, BLOCK_FIRST), tl.cdiv(second, BLOCK_SECOND)
    in_first = tile // tiles_second % tiles_first * BLOCK_FIRST + tl.arange(0, BLOCK_FIRST)
    in_second = tile % tiles_second * BLOCK_SECOND + tl.arange(0, BLOCK_SECOND)
    return (tile // tiles_second // tiles_first).to(tl.int64), in_first, in_second


@triton.jit
def _load_logits(scores, first, stride_first, second, stride_second, exist, part, to_logits):
    """Load base-2 logits (first, second), -inf where they take no part: the score may be NaN there."""
    at = scores + first[:, None].to(tl.int64) * stride_first + second.to(tl.int64) * stride_second
    return tl.where(part, tl.load(at, mask=exist, other=0.0).to(tl.float32) * to_logits, float("-inf"))
