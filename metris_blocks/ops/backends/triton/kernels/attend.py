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
    mask_arguments,
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
    inputs = _rows(query), _rows(key), _rows(value)
    *masks, mask_strides = mask_arguments(mask)
    blocks = _blocks(l, n, e, query.dtype)
    parts = b * heads * triton.cdiv(e, blocks["BLOCK_E"])
    with torch.cuda.device_of(query):
        _forward[(parts * triton.cdiv(l, blocks["BLOCK_L"]),)](
            *inputs,
            *masks,
            out,
            logsumexp,
            *(x.stride() for x in inputs),
            mask_strides,
            scale * math.log2(math.e),
            heads,
            l,
            n,
            e,
            **blocks,
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
    inputs = _rows(query), _rows(key), _rows(value), _rows(grad)
    *masks, mask_strides = mask_arguments(mask)
    common = (
        *inputs,
        *masks,
        logsumexp,
        torch.empty_like(logsumexp),
        *(x.stride() for x in inputs),
        mask_strides,
        scale,
        scale * math.log2(math.e),
        heads,
        l,
        n,
        e,
    )
    blocks = _blocks(l, n, e, query.dtype)
    parts = b * heads * triton.cdiv(e, blocks["BLOCK_E"])
    with torch.cuda.device_of(query):
        # In this order: the first leaves in `delta` what the second reads.
        _backward_query[(parts * triton.cdiv(l, blocks["BLOCK_L"]),)](out, query_grad, *common, **blocks)
        _backward_key_value[(parts * triton.cdiv(n, blocks["BLOCK_N"]),)](
            key_grad, value_grad, *common, **blocks
        )
    return query_grad, key_grad, value_grad


def _rows(x: Tensor) -> Tensor:
    """Copy only what the kernels cannot read with strides: a head whose numbers are not neighbours."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _blocks(l: int, n: int, e: int, dtype: torch.dtype) -> dict[str, Any]:
    """Choose tiles that spill no registers and fit the 99 KiB of the smallest shared memory."""
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
    attended,
    mask,
    out,
    logsumexp,
    query_strides,
    key_strides,
    value_strides,
    mask_strides,
    to_logits,
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
    batch, head, in_l, in_e = _position(heads, l, BLOCK_L, e, BLOCK_E, WIDE)
    real_l = in_l < l
    query += batch * query_strides[0] + head * query_strides[2]
    key += batch * key_strides[0] + head * key_strides[2]
    value += batch * value_strides[0] + head * value_strides[2]

    q = load_tile(query, in_l, real_l, query_strides[1], in_e, e, DTYPE)
    top = tl.full((BLOCK_L,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_L,), tl.float32)
    acc = tl.zeros((BLOCK_L, BLOCK_E), tl.float32)
    for n0 in range(0, n, BLOCK_N):
        in_n = n0 + tl.arange(0, BLOCK_N)
        real_n = load_attended(attended, batch, in_n, n, mask_strides)
        k = load_tile(key, in_n, real_n, key_strides[1], in_e, e, DTYPE)
        v = load_tile(value, in_n, real_n, value_strides[1], in_e, e, DTYPE)
        if WIDE:
            logits = _product(
                query, in_l, real_l, query_strides[1], key, in_n, real_n, key_strides[1], e, DTYPE, BLOCK_E
            )
        else:
            logits = tl.dot(q, k.T, input_precision="ieee")
        exist, real = (in_l < l)[:, None] & (in_n < n), real_l[:, None] & real_n
        part = load_mask(
            mask, batch, mask_strides[2], in_l, mask_strides[3], in_n, mask_strides[4], exist, real
        )
        logits = tl.where(part, logits * to_logits, float("-inf"))
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
    attended,
    mask,
    logsumexp,
    delta,
    query_strides,
    key_strides,
    value_strides,
    grad_strides,
    mask_strides,
    scale,
    to_logits,
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
    batch, head, in_l, in_e = _position(heads, l, BLOCK_L, e, BLOCK_E, WIDE)
    query += batch * query_strides[0] + head * query_strides[2]
    key += batch * key_strides[0] + head * key_strides[2]
    value += batch * value_strides[0] + head * value_strides[2]
    grad += batch * grad_strides[0] + head * grad_strides[2]
    out_rows = (batch * l + in_l) * heads + head
    rows = (batch * heads + head) * l + in_l
    lse = tl.load(logsumexp + rows, mask=in_l < l, other=float("inf"))
    # Where a row attends to nothing, its query may be NaN.
    real_l = lse != float("inf")

    along = tl.zeros((BLOCK_L,), tl.float32)
    for e0 in range(0, e, BLOCK_E):
        part_e = e0 + tl.arange(0, BLOCK_E)
        g = load_tile(grad, in_l, real_l, grad_strides[1], part_e, e, tl.float32)
        along += tl.sum(g * load_tile(out, out_rows, real_l, e, part_e, e, tl.float32), axis=1)

    q = load_tile(query, in_l, real_l, query_strides[1], in_e, e, DTYPE)
    g = load_tile(grad, in_l, real_l, grad_strides[1], in_e, e, DTYPE)
    drift = tl.zeros((BLOCK_L,), tl.float32)
    acc = tl.zeros((BLOCK_L, BLOCK_E), tl.float32)
    mean_key = tl.zeros((BLOCK_L, BLOCK_E), tl.float32)
    for n0 in range(0, n, BLOCK_N):
        in_n = n0 + tl.arange(0, BLOCK_N)
        real_n = load_attended(attended, batch, in_n, n, mask_strides)
        k = load_tile(key, in_n, real_n, key_strides[1], in_e, e, DTYPE)
        v = load_tile(value, in_n, real_n, value_strides[1], in_e, e, DTYPE)
        if WIDE:
            logits = _product(
                query, in_l, real_l, query_strides[1], key, in_n, real_n, key_strides[1], e, DTYPE, BLOCK_E
            )
            weights_grad = _product(
                grad, in_l, real_l, grad_strides[1], value, in_n, real_n, value_strides[1], e, DTYPE, BLOCK_E
            )
        else:
            logits = tl.dot(q, k.T, input_precision="ieee")
            weights_grad = tl.dot(g, v.T, input_precision="ieee")
        exist, real = (in_l < l)[:, None] & (in_n < n), real_l[:, None] & real_n
        part = load_mask(
            mask, batch, mask_strides[2], in_l, mask_strides[3], in_n, mask_strides[4], exist, real
        )
        weights = tl.where(part, tl.exp2(logits * to_logits - lse[:, None]), 0.0)
        logits_grad = weights * (weights_grad - along[:, None])
        drift += tl.sum(logits_grad, axis=1)
        acc = tl.dot(logits_grad.to(DTYPE), k, acc, input_precision="ieee")
        mean_key = tl.dot(weights.to(DTYPE), k, mean_key, input_precision="ieee")

    # The gradients of a row's logits sum to 0. What they summed to is what the rounding of `out` added to
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
    attended,
    mask,
    logsumexp,
    delta,
    query_strides,
    key_strides,
    value_strides,
    grad_strides,
    mask_strides,
    scale,
    to_logits,
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
    batch, head, in_n, in_e = _position(heads, n, BLOCK_N, e, BLOCK_E, WIDE)
    real_n = load_attended(attended, batch, in_n, n, mask_strides)
    query += batch * query_strides[0] + head * query_strides[2]
    key += batch * key_strides[0] + head * key_strides[2]
    value += batch * value_strides[0] + head * value_strides[2]
    grad += batch * grad_strides[0] + head * grad_strides[2]
    logsumexp += (batch * heads + head) * l
    delta += (batch * heads + head) * l

    k = load_tile(key, in_n, real_n, key_strides[1], in_e, e, DTYPE)
    v = load_tile(value, in_n, real_n, value_strides[1], in_e, e, DTYPE)
    key_acc = tl.zeros((BLOCK_N, BLOCK_E), tl.float32)
    value_acc = tl.zeros((BLOCK_N, BLOCK_E), tl.float32)
    for l0 in range(0, l, BLOCK_L):
        in_l = l0 + tl.arange(0, BLOCK_L)
        lse = tl.load(logsumexp + in_l, mask=in_l < l, other=float("inf"))
        along = tl.load(delta + in_l, mask=in_l < l, other=0.0)
        real_l = lse != float("inf")
        q = load_tile(query, in_l, real_l, query_strides[1], in_e, e, DTYPE)
        g = load_tile(grad, in_l, real_l, grad_strides[1], in_e, e, DTYPE)
        # Transposed: a row is a token, a column a query.
        if WIDE:
            logits = _product(
                key, in_n, real_n, key_strides[1], query, in_l, real_l, query_strides[1], e, DTYPE, BLOCK_E
            )
            weights_grad = _product(
                value, in_n, real_n, value_strides[1], grad, in_l, real_l, grad_strides[1], e, DTYPE, BLOCK_E
            )
        else:
            logits = tl.dot(k, q.T, input_precision="ieee")
            weights_grad = tl.dot(v, g.T, input_precision="ieee")
        exist, real = (in_n < n)[:, None] & (in_l < l), real_n[:, None] & real_l
        part = load_mask(
            mask, batch, mask_strides[2], in_n, mask_strides[4], in_l, mask_strides[3], exist, real
        )
        weights = tl.where(part, tl.exp2(logits * to_logits - lse), 0.0)
        value_acc = tl.dot(weights.to(DTYPE), g, value_acc, input_precision="ieee")
        logits_grad = weights * (weights_grad - along)
        key_acc = tl.dot(logits_grad.to(DTYPE), q, key_acc, input_precision="ieee")

    at = ((batch * n + in_n) * heads + head)[:, None] * e + in_e
    real = (in_n < n)[:, None] & (in_e < e)
    tl.store(key_grad + at, (key_acc * scale).to(key_grad.dtype.element_ty), mask=real)
    tl.store(value_grad + at, value_acc.to(value_grad.dtype.element_ty), mask=real)


@triton.jit
def _position(heads, rows, BLOCK_ROWS: tl.constexpr, e, BLOCK_E: tl.constexpr, WIDE: tl.constexpr):
    """Find the program's batch and head (int64), rows and part of the width, which are neighbours."""
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
def _product(
    a, in_a, real_a, stride_a, b, in_b, real_b, stride_b, e, DTYPE: tl.constexpr, BLOCK_E: tl.constexpr
):
    """Multiply rows of a with rows of b over the whole width of a head, part by part."""
    acc = tl.zeros((in_a.shape[0], in_b.shape[0]), tl.float32)
    for e0 in range(0, e, BLOCK_E):
        in_e = e0 + tl.arange(0, BLOCK_E)
        x = load_tile(a, in_a, real_a, stride_a, in_e, e, DTYPE)
        y = load_tile(b, in_b, real_b, stride_b, in_e, e, DTYPE)
        acc = tl.dot(x, y.T, acc, input_precision="ieee")
    return acc
