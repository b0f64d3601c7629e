"""Flash attention with one boolean mask for all heads: softmax on the fly, no weights in memory."""

# Kernels carry no annotations: the compiler of triton refuses names of Python's types in them.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

import math
from typing import Any

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

# Heads wider than this are read in parts, and programs share the width of their results.
_WIDEST = 128


def attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Give the result (b, l, heads, e) and its rows' base-2 logsumexp (b, heads, l) float32."""
    (b, l, heads, e), n = query.shape, key.shape[1]
    out = query.new_empty(query.shape)
    logsumexp = query.new_empty((b, heads, l), dtype=torch.float32)
    inputs = [_strided(x) for x in (query, key, value)]
    per_logit = scale * math.log2(math.e)
    blocks = _blocks(l, n, e, query.dtype)
    parts = b * heads * triton.cdiv(e, blocks["BLOCK_E"])
    with torch.cuda.device_of(query):
        _forward[(parts * triton.cdiv(l, blocks["BLOCK_L"]),)](
            *inputs, mask_argument(mask), out, logsumexp, per_logit, heads, l, n, e, **blocks
        )
    return out, logsumexp


def attend_backward(
    grad: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Give the gradients of query, key and value."""
    (b, l, heads, e), n = query.shape, key.shape[1]
    query_grad, key_grad, value_grad = (x.new_empty(x.shape) for x in (query, key, value))
    inputs = [_strided(x) for x in (query, key, value, grad)]
    statistics = logsumexp, torch.empty_like(logsumexp)
    scales = scale, scale * math.log2(math.e)
    common = (*inputs, mask_argument(mask), *statistics, *scales, heads, l, n, e)
    blocks = _blocks(l, n, e, query.dtype)
    parts = b * heads * triton.cdiv(e, blocks["BLOCK_E"])
    with torch.cuda.device_of(query):
        # In this order: the first leaves in the second statistic what the other reads.
        _backward_query[(parts * triton.cdiv(l, blocks["BLOCK_L"]),)](out, query_grad, *common, **blocks)
        tiles = triton.cdiv(n, blocks["BLOCK_N"])
        _backward_key_value[(parts * tiles,)](key_grad, value_grad, *common, **blocks)
    return query_grad, key_grad, value_grad


def _strided(x: Tensor) -> tuple[Any, ...]:
    """Give (b, rows, heads, e) and its strides, copied only where the numbers of a head are no neighbours."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    return x, *x.stride()[:-1]


def _blocks(l: int, n: int, e: int, dtype: torch.dtype) -> dict[str, Any]:
    """Choose tiles that hardly spill registers and fit the 99 KiB of the smallest shared memory."""
    exact, wide = dtype == torch.float32, e > _WIDEST
    # Without tensor cores operands stay in registers, and so do the parts of a wide head.
    largest = 32 if exact or wide else 64
    return {
        "DTYPE": dot_dtype(dtype),
        "BLOCK_L": block(l, largest),
        "BLOCK_N": block(n, largest),
        "BLOCK_E": block(e, _WIDEST),
        "WIDE": wide,
        "num_warps": 8,
        # Few queries make few programs that read many keys: those must be on their way early.
        "num_stages": 3 if l <= 32 and not exact else 2,
        "enable_fp_fusion": True,
    }


@triton.jit
def _forward(
    query,
    key,
    value,
    mask,
    out,
    logsumexp,
    per_logit,
    heads,
    l,
    n,
    e,
    DTYPE: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
    WIDE: tl.constexpr,
):
    batch, head, in_l, in_e = _position(heads, l, e, BLOCK_L, BLOCK_E, WIDE)
    query, key, value = _of(query, batch, head), _of(key, batch, head), _of(value, batch, head)
    real_l = in_l < l

    q = load_tile(query, in_l, real_l, in_e, e, DTYPE)
    top = tl.full((BLOCK_L,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_L,), tl.float32)
    acc = tl.zeros((BLOCK_L, BLOCK_E), tl.float32)
    for n0 in range(0, n, BLOCK_N):
        in_n = n0 + tl.arange(0, BLOCK_N)
        real_n = load_attended(mask, batch, in_n, n)
        v = load_tile(value, in_n, real_n, in_e, e, DTYPE)
        if WIDE:
            logits = _product(query, in_l, real_l, key, in_n, real_n, e, DTYPE, BLOCK_E)
        else:
            k = load_tile(key, in_n, real_n, in_e, e, DTYPE)
            logits = tl.dot(q, k.T, input_precision="ieee")
        exist, real = real_l[:, None] & (in_n < n), real_l[:, None] & real_n
        part = load_mask(mask, batch, in_l[:, None], in_n, exist, real)
        logits = tl.where(part, logits * per_logit, float("-inf"))
        weights, fade, top, total = softmax_step(logits, top, total)
        acc = tl.dot(weights.to(DTYPE), v, acc * fade[:, None], input_precision="ieee")

    total, lse = softmax_end(top, total)
    at = out + ((batch * l + in_l) * heads + head)[:, None] * e + in_e
    tl.store(at, (acc / total[:, None]).to(out.dtype.element_ty), mask=real_l[:, None] & (in_e < e))
    # Programs that share a row all store the same number, here and below.
    tl.store(logsumexp + (batch * heads + head) * l + in_l, lse, mask=real_l)


@triton.jit
def _backward_query(
    out,
    query_grad,
    query,
    key,
    value,
    grad,
    mask,
    logsumexp,
    delta,
    scale,
    per_logit,
    heads,
    l,
    n,
    e,
    DTYPE: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
    WIDE: tl.constexpr,
):
    batch, head, in_l, in_e = _position(heads, l, e, BLOCK_L, BLOCK_E, WIDE)
    query, key, value = _of(query, batch, head), _of(key, batch, head), _of(value, batch, head)
    grad = _of(grad, batch, head)
    out_rows = (batch * l + in_l) * heads + head
    rows = (batch * heads + head) * l + in_l
    lse = tl.load(logsumexp + rows, mask=in_l < l, other=float("inf"))
    # Where a row attends to nothing, its query may be NaN.
    real_l = lse != float("inf")

    along = tl.zeros((BLOCK_L,), tl.float32)
    for e0 in range(0, e, BLOCK_E):
        part_e = e0 + tl.arange(0, BLOCK_E)
        g = load_tile(grad, in_l, real_l, part_e, e, tl.float32)
        along += tl.sum(g * load_tile((out, e), out_rows, real_l, part_e, e, tl.float32), axis=1)

    q = load_tile(query, in_l, real_l, in_e, e, DTYPE)
    g = load_tile(grad, in_l, real_l, in_e, e, DTYPE)
    drift = tl.zeros((BLOCK_L,), tl.float32)
    acc = tl.zeros((BLOCK_L, BLOCK_E), tl.float32)
    mean_key = tl.zeros((BLOCK_L, BLOCK_E), tl.float32)
    for n0 in range(0, n, BLOCK_N):
        in_n = n0 + tl.arange(0, BLOCK_N)
        real_n = load_attended(mask, batch, in_n, n)
        k = load_tile(key, in_n, real_n, in_e, e, DTYPE)
        if WIDE:
            logits = _product(query, in_l, real_l, key, in_n, real_n, e, DTYPE, BLOCK_E)
            weights_grad = _product(grad, in_l, real_l, value, in_n, real_n, e, DTYPE, BLOCK_E)
        else:
            v = load_tile(value, in_n, real_n, in_e, e, DTYPE)
            logits = tl.dot(q, k.T, input_precision="ieee")
            weights_grad = tl.dot(g, v.T, input_precision="ieee")
        exist, real = (in_l < l)[:, None] & (in_n < n), real_l[:, None] & real_n
        part = load_mask(mask, batch, in_l[:, None], in_n, exist, real)
        weights = tl.where(part, tl.exp2(logits * per_logit - lse[:, None]), 0.0)
        logits_grad = weights * (weights_grad - along[:, None])
        drift += tl.sum(logits_grad, axis=1)
        acc = tl.dot(logits_grad.to(DTYPE), k, acc, input_precision="ieee")
        mean_key = tl.dot(weights.to(DTYPE), k, mean_key, input_precision="ieee")

    # The gradients of a row's logits sum to 0. What they summed to is what rounding, mostly of `out`, did to
    # `along`: take it back, for the keys too.
    tl.store(delta + rows, along + drift, mask=in_l < l)
    acc = (acc - drift[:, None] * mean_key) * scale
    at = query_grad + out_rows[:, None] * e + in_e
    tl.store(at, acc.to(query_grad.dtype.element_ty), mask=(in_l < l)[:, None] & (in_e < e))


@triton.jit
def _backward_key_value(
    key_grad,
    value_grad,
    query,
    key,
    value,
    grad,
    mask,
    logsumexp,
    delta,
    scale,
    per_logit,
    heads,
    l,
    n,
    e,
    DTYPE: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
    WIDE: tl.constexpr,
):
    batch, head, in_n, in_e = _position(heads, n, e, BLOCK_N, BLOCK_E, WIDE)
    query, key, value = _of(query, batch, head), _of(key, batch, head), _of(value, batch, head)
    grad = _of(grad, batch, head)
    real_n = load_attended(mask, batch, in_n, n)

    k = load_tile(key, in_n, real_n, in_e, e, DTYPE)
    v = load_tile(value, in_n, real_n, in_e, e, DTYPE)
    key_acc = tl.zeros((BLOCK_N, BLOCK_E), tl.float32)
    value_acc = tl.zeros((BLOCK_N, BLOCK_E), tl.float32)
    for l0 in range(0, l, BLOCK_L):
        in_l = l0 + tl.arange(0, BLOCK_L)
        rows = (batch * heads + head) * l + in_l
        lse = tl.load(logsumexp + rows, mask=in_l < l, other=float("inf"))
        along = tl.load(delta + rows, mask=in_l < l, other=0.0)
        real_l = lse != float("inf")
        q = load_tile(query, in_l, real_l, in_e, e, DTYPE)
        g = load_tile(grad, in_l, real_l, in_e, e, DTYPE)
        # Transposed: a row is a token, a column a query.
        if WIDE:
            logits = _product(key, in_n, real_n, query, in_l, real_l, e, DTYPE, BLOCK_E)
            weights_grad = _product(value, in_n, real_n, grad, in_l, real_l, e, DTYPE, BLOCK_E)
        else:
            logits = tl.dot(k, q.T, input_precision="ieee")
            weights_grad = tl.dot(v, g.T, input_precision="ieee")
        exist, real = (in_n < n)[:, None] & (in_l < l), real_n[:, None] & real_l
        part = load_mask(mask, batch, in_l, in_n[:, None], exist, real)
        weights = tl.where(part, tl.exp2(logits * per_logit - lse), 0.0)
        value_acc = tl.dot(weights.to(DTYPE), g, value_acc, input_precision="ieee")
        logits_grad = weights * (weights_grad - along)
        key_acc = tl.dot(logits_grad.to(DTYPE), q, key_acc, input_precision="ieee")

    at = ((batch * n + in_n) * heads + head)[:, None] * e + in_e
    exist = (in_n < n)[:, None] & (in_e < e)
    tl.store(key_grad + at, (key_acc * scale).to(key_grad.dtype.element_ty), mask=exist)
    tl.store(value_grad + at, value_acc.to(value_grad.dtype.element_ty), mask=exist)


@triton.jit
def _position(heads, rows, e, BLOCK_ROWS: tl.constexpr, BLOCK_E: tl.constexpr, WIDE: tl.constexpr):
    """Find the program's batch and head (int64), rows and part of the width; a head's are neighbours."""
    tile = tl.program_id(0)
    in_e = tl.arange(0, BLOCK_E)
    if WIDE:
        parts = tl.cdiv(e, BLOCK_E)
        in_e += tile % parts * BLOCK_E
        tile = tile // parts
    tiles = tl.cdiv(rows, BLOCK_ROWS)
    in_rows = tile % tiles * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    tile = (tile // tiles).to(tl.int64)
    return tile // heads, tile % heads, in_rows, in_e


@triton.jit
def _of(tensor, batch, head):
    """Give the matrix of one batch and head: a pointer and the stride of its rows."""
    return tensor[0] + batch * tensor[1] + head * tensor[3], tensor[2]


@triton.jit
def _product(a, in_a, real_a, b, in_b, real_b, e, DTYPE: tl.constexpr, BLOCK_E: tl.constexpr):
    """Multiply rows of a with rows of b over the whole width of a head, part by part."""
    acc = tl.zeros((in_a.shape[0], in_b.shape[0]), tl.float32)
    for e0 in range(0, e, BLOCK_E):
        in_e = e0 + tl.arange(0, BLOCK_E)
        x = load_tile(a, in_a, real_a, in_e, e, DTYPE)
        y = load_tile(b, in_b, real_b, in_e, e, DTYPE)
        acc = tl.dot(x, y.T, acc, input_precision="ieee")
    return acc
