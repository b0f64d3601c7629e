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
    mask_argument,
    softmax_end,
    softmax_step,
)


def aggregate(
    scores: Tensor, dynamic_mask: Tensor, visual: Tensor, temperature: float, divide_by_count: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Give out (b, l, c), the same in float32, and its rows' base-2 logsumexp and divisor (b, l) float32."""
    (b, l, n), c = scores.shape, visual.shape[2]
    out = visual.new_empty((b, l, c))
    exact = visual.new_empty((b, l, c), dtype=torch.float32)
    # Zeros for c = 0, where no program writes them.
    logsumexp, divisor = (visual.new_zeros((b, l), dtype=torch.float32) for _ in range(2))
    inputs = scores.contiguous(), visual.contiguous(), mask_argument(dynamic_mask)
    blocks = _blocks(l, n, c, visual.dtype)
    tiles = triton.cdiv(l, blocks["BLOCK_L"]) * triton.cdiv(c, blocks["BLOCK_C"])
    constants = {"DIVIDE": divide_by_count, "DTYPE": dot_dtype(visual.dtype), **blocks}
    per_score = math.log2(math.e) / temperature
    with torch.cuda.device_of(visual):
        _forward[(b * tiles,)](*inputs, out, exact, logsumexp, divisor, per_score, l, n, c, **constants)
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
    inputs = scores.contiguous(), grad.contiguous(), mask_argument(dynamic_mask), logsumexp, divisor
    common = (*inputs, math.log2(math.e) / temperature, l, n, c)
    blocks = _blocks(l, n, c, visual.dtype)
    tiles = b * triton.cdiv(n, blocks["BLOCK_N"])
    with torch.cuda.device_of(visual):
        _backward_scores[(tiles * triton.cdiv(l, blocks["BLOCK_L"]),)](
            scores_grad,
            exact,
            visual.contiguous(),
            1 / temperature,
            *common,
            dot_dtype(visual.dtype),
            **blocks,
        )
        # A weight over a count may be too small for float16.
        dtype = tl.float32 if visual.dtype == torch.float16 else dot_dtype(visual.dtype)
        precision = "ieee" if visual.dtype == torch.float32 else "tf32x3"
        _backward_visual[(tiles * triton.cdiv(c, blocks["BLOCK_C"]),)](
            visual_grad, *common, dtype, precision, **blocks
        )
    return scores_grad, visual_grad


def _blocks(l: int, n: int, c: int, dtype: torch.dtype) -> dict[str, int]:
    """Choose tiles that hardly spill registers and fit the 99 KiB of the smallest shared memory."""
    return {
        "BLOCK_L": block(l, 32),
        # Without tensor cores operands stay in registers.
        "BLOCK_N": block(n, 32 if dtype == torch.float32 else 64),
        "BLOCK_C": block(c, 128),
        "num_warps": 8,
        "enable_fp_fusion": True,
    }


@triton.jit
def _forward(
    scores,
    visual,
    mask,
    out,
    exact,
    logsumexp,
    divisor,
    per_score,
    l,
    n,
    c,
    DIVIDE: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    batch, in_l, in_c = _position(l, c, BLOCK_L, BLOCK_C)
    rows, real_l = batch * l + in_l, in_l < l

    top = tl.full((BLOCK_L,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_L,), tl.float32)
    count = tl.zeros((BLOCK_L,), tl.float32)
    acc = tl.zeros((BLOCK_L, BLOCK_C), tl.float32)
    for n0 in range(0, n, BLOCK_N):
        in_n = n0 + tl.arange(0, BLOCK_N)
        real_n = load_attended(mask, batch, in_n, n)
        v = load_tile((visual, c), batch * n + in_n, real_n, in_c, c, DTYPE)
        exist, real = real_l[:, None] & (in_n < n), real_l[:, None] & real_n
        part = load_mask(mask, batch, in_l[:, None], in_n, exist, real)
        logits = _load_logits(scores + rows[:, None] * n + in_n, exist, part, per_score)
        weights, fade, top, total = softmax_step(logits, top, total)
        count += tl.sum(part.to(tl.float32), axis=1)
        rough = weights.to(DTYPE)
        acc = tl.dot(rough, v, acc * fade[:, None], input_precision="ieee")
        if DTYPE.primitive_bitwidth < 32:
            # What rounding took from the weights: a score's gradient is a small difference of such sums.
            acc = tl.dot((weights - rough.to(tl.float32)).to(DTYPE), v, acc)

    total, lse = softmax_end(top, total)
    by = tl.maximum(count, 1.0) if DIVIDE else tl.full((BLOCK_L,), 1.0, tl.float32)
    acc = acc / (total * by)[:, None]
    at, exist = rows[:, None] * c + in_c, real_l[:, None] & (in_c < c)
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=exist)
    tl.store(exact + at, acc, mask=exist)
    # Programs that share a row all store the same numbers.
    tl.store(logsumexp + rows, lse, mask=real_l)
    tl.store(divisor + rows, by, mask=real_l)


@triton.jit
def _backward_scores(
    scores_grad,
    exact,
    visual,
    per_logit,
    scores,
    grad,
    mask,
    logsumexp,
    divisor,
    per_score,
    l,
    n,
    c,
    DTYPE: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    batch, in_n, in_l = _position(n, l, BLOCK_N, BLOCK_L)
    rows = batch * l + in_l
    lse = tl.load(logsumexp + rows, mask=in_l < l, other=float("inf"))
    by = tl.load(divisor + rows, mask=in_l < l, other=1.0)
    real_l, real_n = lse != float("inf"), load_attended(mask, batch, in_n, n)

    weights_grad = tl.zeros((BLOCK_L, BLOCK_N), tl.float32)
    along = tl.zeros((BLOCK_L,), tl.float32)
    for c0 in range(0, c, BLOCK_C):
        in_c = c0 + tl.arange(0, BLOCK_C)
        g = load_tile((grad, c), rows, real_l, in_c, c, DTYPE)
        v = load_tile((visual, c), batch * n + in_n, real_n, in_c, c, DTYPE)
        weights_grad = tl.dot(g, v.T, weights_grad, input_precision="ieee")
        o = load_tile((exact, c), rows, real_l, in_c, c, tl.float32)
        along += tl.sum(g.to(tl.float32) * o, axis=1)

    exist, real = (in_l < l)[:, None] & (in_n < n), real_l[:, None] & real_n
    part = load_mask(mask, batch, in_l[:, None], in_n, exist, real)
    at = rows[:, None] * n + in_n
    weights = tl.exp2(_load_logits(scores + at, exist, part, per_score) - lse[:, None])
    acc = weights * (weights_grad / by[:, None] - along[:, None]) * per_logit
    tl.store(scores_grad + at, acc.to(scores_grad.dtype.element_ty), mask=exist)


@triton.jit
def _backward_visual(
    visual_grad,
    scores,
    grad,
    mask,
    logsumexp,
    divisor,
    per_score,
    l,
    n,
    c,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    batch, in_n, in_c = _position(n, c, BLOCK_N, BLOCK_C)
    real_n = load_attended(mask, batch, in_n, n)

    acc = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    for l0 in range(0, l, BLOCK_L):
        in_l = l0 + tl.arange(0, BLOCK_L)
        rows = batch * l + in_l
        lse = tl.load(logsumexp + rows, mask=in_l < l, other=float("inf"))
        by = tl.load(divisor + rows, mask=in_l < l, other=1.0)
        real_l = lse != float("inf")
        g = load_tile((grad, c), rows, real_l, in_c, c, DTYPE)
        # Transposed: a row is a visual token, a column an expression token.
        exist, real = (in_n < n)[:, None] & (in_l < l), real_n[:, None] & real_l
        part = load_mask(mask, batch, in_l, in_n[:, None], exist, real)
        logits = _load_logits(scores + rows * n + in_n[:, None], exist, part, per_score)
        weights = tl.exp2(logits - lse) / by
        acc = tl.dot(weights.to(DTYPE), g, acc, input_precision=PRECISION)

    at = visual_grad + (batch * n + in_n)[:, None] * c + in_c
    tl.store(at, acc.to(visual_grad.dtype.element_ty), mask=(in_n < n)[:, None] & (in_c < c))


@triton.jit
def _position(first, second, BLOCK_FIRST: tl.constexpr, BLOCK_SECOND: tl.constexpr):
    """Find the program's batch (int64) and tiles; those along the second axis are neighbours."""
    tile = tl.program_id(0)
    tiles_first, tiles_second = tl.cdiv(first, BLOCK_FIRST), tl.cdiv(second, BLOCK_SECOND)
    in_first = tile // tiles_second % tiles_first * BLOCK_FIRST + tl.arange(0, BLOCK_FIRST)
    in_second = tile % tiles_second * BLOCK_SECOND + tl.arange(0, BLOCK_SECOND)
    return (tile // tiles_second // tiles_first).to(tl.int64), in_first, in_second


@triton.jit
def _load_logits(at, exist, part, per_score):
    """Load base-2 logits, -inf where they take no part: a score may be NaN there."""
    logits = tl.load(at, mask=exist, other=0.0).to(tl.float32) * per_score
    return tl.where(part, logits, float("-inf"))
