"""Cosine scores and their gradient. Norms are taken on the way: no normalised copy of an input exists."""

# Kernels carry no annotations: the compiler of triton refuses names of Python's types in them.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor

from metris_blocks.ops.backends.triton import INTERPRETED
from metris_blocks.ops.backends.triton.kernels.tiles import block

# As in torch.nn.functional.normalize: what is shorter is divided by this, and its gradient is not projected.
EPS = tl.constexpr(1e-12)
# What tensor cores multiply exactly; the interpreter cannot multiply bfloat16 at all.
_NARROW = (torch.float16,) if INTERPRETED else (torch.float16, torch.bfloat16)


def score(visual: Tensor, language: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(b, n, j), (b, l, j) -> cosines (b, l, n), norms (b, n) and (b, l), all float32."""
    (b, n, j), l = visual.shape, language.shape[1]
    empty = visual.numel() == 0 or language.numel() == 0
    allocate = torch.zeros if empty else torch.empty
    scores, visual_norm, language_norm = (
        allocate(shape, dtype=torch.float32, device=visual.device) for shape in ((b, l, n), (b, n), (b, l))
    )
    if empty:
        return scores, visual_norm, language_norm
    widen = visual.dtype != language.dtype or visual.dtype not in _NARROW
    block_l, block_n = block(l, 32 if widen else 64), 64
    with torch.accelerator.device_index(visual.device.index):
        _score[(b * triton.cdiv(n, block_n) * triton.cdiv(l, block_l),)](
            visual.contiguous(),
            language.contiguous(),
            scores,
            visual_norm,
            language_norm,
            n,
            l,
            j,
            WIDEN=widen,
            BLOCK_N=block_n,
            BLOCK_L=block_l,
            BLOCK_J=block(j, 32 if widen else 64),
            num_warps=8,
        )
    return scores, visual_norm, language_norm


def score_backward(
    grad: Tensor, scores: Tensor, own: Tensor, own_norm: Tensor, other: Tensor, other_norm: Tensor
) -> Tensor:
    """(b, m, k), (b, m, k), (b, m, j), (b, m), (b, k, j), (b, k) -> (b, m, j), the gradient of `own`."""
    (b, m, k), j = grad.shape, own.shape[2]
    if own.numel() == 0 or k == 0:
        return torch.zeros_like(own, memory_format=torch.contiguous_format)
    block_m, block_k, block_j = block(m, 64), 16, block(j, 64)
    tiles = b * triton.cdiv(m, block_m) * triton.cdiv(j, block_j)
    # Few expression tokens sum over many visual ones: shares of that sum fill the device. Their number comes
    # from shapes alone and they are added in order, so results are the same on every run.
    shares = min(triton.cdiv(k, 512), triton.cdiv(1024, tiles))
    out = own.new_empty(own.shape) if shares == 1 else grad.new_empty((b, shares, m, j))
    exact = own.dtype == torch.float32 or other.dtype == torch.float32
    with torch.accelerator.device_index(own.device.index):
        _score_backward[(tiles, shares)](
            grad,
            scores,
            own.contiguous(),
            own_norm,
            other.contiguous(),
            other_norm,
            out,
            m,
            k,
            j,
            triton.cdiv(k, shares * block_k) * block_k,
            *grad.stride(),
            *scores.stride(),
            # Three tensor-core products err by less than 2^-20 of a term, far below the rounding to 16 bits.
            PRECISION="ieee" if exact else "tf32x3",
            BLOCK_M=block_m,
            BLOCK_K=block_k,
            BLOCK_J=block_j,
            num_warps=8 if exact else 4,
        )
    return out if shares == 1 else out.sum(dim=1).to(own.dtype)


@triton.jit
def _score(
    visual,
    language,
    scores,
    visual_norm,
    language_norm,
    n,
    l,
    j,
    WIDEN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    # Tiles over l are neighbours: they share a tile of visual tokens in the cache.
    tiles_l, tiles_n = tl.cdiv(l, BLOCK_L), tl.cdiv(n, BLOCK_N)
    tile = tl.program_id(0)
    l0 = tile % tiles_l * BLOCK_L
    n0 = tile // tiles_l % tiles_n * BLOCK_N
    batch = (tile // tiles_l // tiles_n).to(tl.int64)
    in_l, in_n, in_j = tl.arange(0, BLOCK_L), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_J)
    real_l, real_n = l0 + in_l < l, n0 + in_n < n
    # int64 ends at the first element of the tile; inside it int32 is enough.
    visual += (batch * n + n0) * j
    language += (batch * l + l0) * j

    dot = tl.zeros((BLOCK_L, BLOCK_N), tl.float32)
    language_square = tl.zeros((BLOCK_L,), tl.float32)
    visual_square = tl.zeros((BLOCK_N,), tl.float32)
    for j0 in range(0, j, BLOCK_J):
        real_j = j0 + in_j < j
        y = tl.load(language + in_l[:, None] * j + (j0 + in_j), mask=real_l[:, None] & real_j, other=0.0)
        x = tl.load(visual + in_n[:, None] * j + (j0 + in_j), mask=real_n[:, None] & real_j, other=0.0)
        wide_y, wide_x = y.to(tl.float32), x.to(tl.float32)
        language_square += tl.sum(wide_y * wide_y, axis=1)
        visual_square += tl.sum(wide_x * wide_x, axis=1)
        if WIDEN:
            y, x = wide_y, wide_x
        dot = tl.dot(y, x.T, dot, input_precision="ieee")

    norm_y, norm_x = tl.sqrt_rn(language_square), tl.sqrt_rn(visual_square)
    dot = dot * _inverse(norm_y)[:, None] * _inverse(norm_x)
    at = scores + (batch * l + l0) * n + n0 + in_l[:, None] * n + in_n
    tl.store(at, dot, mask=real_l[:, None] & real_n)
    if n0 == 0:
        tl.store(language_norm + batch * l + l0 + in_l, norm_y, mask=real_l)
    if l0 == 0:
        tl.store(visual_norm + batch * n + n0 + in_n, norm_x, mask=real_n)


@triton.jit
def _score_backward(
    grad,
    scores,
    own,
    own_norm,
    other,
    other_norm,
    out,
    m,
    k,
    j,
    share,
    grad_stride_b,
    grad_stride_m,
    grad_stride_k,
    scores_stride_b,
    scores_stride_m,
    scores_stride_k,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    # Tiles over j are neighbours: they share tiles of the gradient and of the scores in the cache.
    tiles_j, tiles_m = tl.cdiv(j, BLOCK_J), tl.cdiv(m, BLOCK_M)
    tile = tl.program_id(0)
    j0 = tile % tiles_j * BLOCK_J
    m0 = tile // tiles_j % tiles_m * BLOCK_M
    batch = (tile // tiles_j // tiles_m).to(tl.int64)
    first = tl.program_id(1).to(tl.int64) * share
    in_m, in_k, in_j = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_J)
    real_m, real_j = m0 + in_m < m, j0 + in_j < j
    grad += batch * grad_stride_b + m0.to(tl.int64) * grad_stride_m + first * grad_stride_k
    scores += batch * scores_stride_b + m0.to(tl.int64) * scores_stride_m + first * scores_stride_k
    other += (batch * k + first) * j + j0
    other_norm += batch * k + first

    acc = tl.zeros((BLOCK_M, BLOCK_J), tl.float32)
    along = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    # The last share may be short, or empty.
    remaining = tl.minimum(k - first, share).to(tl.int32)
    for k0 in range(0, remaining, BLOCK_K):
        real_k = in_k < remaining - k0
        real = real_m[:, None] & real_k
        g = tl.load(grad + in_m[:, None] * grad_stride_m + in_k * grad_stride_k, mask=real, other=0.0)
        s = tl.load(scores + in_m[:, None] * scores_stride_m + in_k * scores_stride_k, mask=real, other=0.0)
        along += g * s
        inverse = _inverse(tl.load(other_norm + in_k, mask=real_k, other=1.0))
        unit = tl.load(other + in_k[:, None] * j + in_j, mask=real_k[:, None] & real_j, other=0.0)
        acc = tl.dot(g, unit.to(tl.float32) * inverse[:, None], acc, input_precision=PRECISION)
        grad += BLOCK_K * grad_stride_k
        scores += BLOCK_K * scores_stride_k
        other += BLOCK_K * j
        other_norm += BLOCK_K

    row = batch * m + m0
    norm = tl.load(own_norm + row + in_m, mask=real_m, other=1.0)
    inverse = _inverse(norm)[:, None]
    at = in_m[:, None] * j + in_j
    real = real_m[:, None] & real_j
    unit = tl.load(own + row * j + j0 + at, mask=real, other=0.0).to(tl.float32) * inverse
    acc = (acc - tl.where(norm < EPS, 0.0, tl.sum(along, axis=1))[:, None] * unit) * inverse
    row = (batch * tl.num_programs(1) + tl.program_id(1)) * m + m0
    tl.store(out + row * j + j0 + at, acc.to(out.dtype.element_ty), mask=real)


@triton.jit
def _inverse(norm):
    # A comparison and not a maximum, which would swallow NaN.
    return tl.div_rn(1.0, tl.where(norm < EPS, EPS, norm))
