"""Masked attention: one boolean mask for all heads, several backends, one meaning (METRIS Eq. 6-7)."""

import math
from types import ModuleType
from typing import Literal

from einops import einsum, rearrange
from torch import Tensor

from metris_blocks.ops.aggregation import masked_softmax
from metris_blocks.ops.backends import eager, sdpa, triton, xformers
from metris_blocks.ops.shapes import check_axes, check_mask, zero_unless_any

Backend = Literal["auto", "eager", "sdpa", "xformers", "triton"]
# The files are small: what they need beyond torch, they import when asked.
_BACKENDS: dict[str, ModuleType] = {"eager": eager, "sdpa": sdpa, "xformers": xformers, "triton": triton}


def masked_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    *,
    scale: float | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Attend from expression tokens to the visual tokens that the mask lets take part.

    METRIS Eq. 6-7: ``softmax(Q K^T · scale + M) V`` per head, M = 0 where ``mask`` is True, -inf elsewhere.

    ``backend="auto"`` follows one rule: "sdpa", on every device. A named backend that cannot run raises;
    nothing falls back.

    Args:
        query: (b, l, heads, e).
        key: (b, n, heads, e).
        value: (b, n, heads, e).
        mask: (b, l, n) or (b, n) bool, the same for all heads; True = takes part. None: all do. Tokens that
            no row attends to, and queries of rows that attend to nothing, may hold anything, NaN too.
        scale: Multiplies the logits; None means 1/sqrt(e).
        backend: "auto", or one of "eager", "sdpa", "xformers", "triton".

    Returns:
        (b, l, heads, e), dtype of ``query``. A row that attends to nothing is zero, with zero gradient.

    Raises:
        ValueError: An axis differs between the arguments, or ``backend`` is unknown.
        TypeError: ``mask`` is not bool, or query, key and value differ in dtype.
        NotImplementedError: A named backend cannot run; the message lists every reason.
    """
    op = "masked_attention"
    mask = _checked(op, query, key, value, mask)
    if backend == "auto":
        backend = "sdpa"
    elif backend not in _BACKENDS:
        raise ValueError(f"{op}: backend must be 'auto' or one of {', '.join(_BACKENDS)}, got {backend!r}")
    elif why := _reasons(backend, query, key, value, mask):
        raise NotImplementedError(
            f"{op}: backend '{backend}' cannot run: {'; '.join(why)}. Use backend='auto'"
        )
    if mask is not None:
        key, value = zero_unless_any(mask, key, value)
        (query,) = zero_unless_any(mask.mT, query)
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    out: Tensor = _BACKENDS[backend].attend(query, key, value, mask, scale)
    return out


def explain_backends(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None
) -> dict[str, list[str]]:
    """Give, for each backend of `masked_attention`, the reasons why it cannot run these inputs.

    Args:
        query: (b, l, heads, e).
        key: (b, n, heads, e).
        value: (b, n, heads, e).
        mask: (b, l, n) or (b, n) bool, or None.

    Returns:
        Backend name -> reasons; an empty list means that it can run.

    Raises:
        ValueError: An axis differs between the arguments.
        TypeError: ``mask`` is not bool, or query, key and value differ in dtype.
    """
    mask = _checked("explain_backends", query, key, value, mask)
    return {name: _reasons(name, query, key, value, mask) for name in _BACKENDS}


def absorbed_attention(
    query_tokens: Tensor,
    visual: Tensor,
    mask: Tensor | None,
    query_weight: Tensor,
    key_weight: Tensor,
    value_weight: Tensor,
    *,
    num_heads: int,
    query_bias: Tensor | None = None,
    value_bias: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attend to visual tokens without projecting them to keys and values.

    The same function as projecting and calling `masked_attention`, reassociated per head h:
    ``logits_h = (Q_h W_k^h) F_v^T`` and ``out_h = (softmax(logits_h) F_v) W_v^h``. Fewer operations while
    l is below the head width; a key bias is left out because it cancels in the softmax.

    Args:
        query_tokens: (b, l, d) tokens that ask.
        visual: (b, n, c) tokens that are asked; also what keys and values are made of.
        mask: (b, l, n) or (b, n) bool; True = takes part. None: all do.
        query_weight: (o, d) as in `torch.nn.Linear`, o = num_heads · e.
        key_weight: (o, c).
        value_weight: (o, c).
        num_heads: Number of heads; divides o.
        query_bias: (o) or None.
        value_bias: (o) or None.
        scale: Multiplies the logits; None means 1/sqrt(e).

    Returns:
        (b, l, o), heads side by side, before any output projection. A row that attends to nothing is zero.

    Raises:
        ValueError: An axis differs between the arguments, or ``num_heads`` does not divide o.
        TypeError: ``mask`` is not bool.
    """
    op = "absorbed_attention"
    biases = {"query_bias": query_bias, "value_bias": value_bias}
    sizes = check_axes(
        op,
        query_tokens=(query_tokens, "b l d"),
        visual=(visual, "b n c"),
        query_weight=(query_weight, "o d"),
        key_weight=(key_weight, "o c"),
        value_weight=(value_weight, "o c"),
        **{name: (bias, "o") for name, bias in biases.items() if bias is not None},
        **_mask_axes(mask),
    )
    if sizes["o"] % num_heads:
        raise ValueError(
            f"{op}: query_weight 'o d' has o={sizes['o']}, not a multiple of num_heads={num_heads}"
        )
    if mask is not None:
        mask = _per_row(op, mask, sizes["l"])
        (visual,) = zero_unless_any(mask, visual)
        (query_tokens,) = zero_unless_any(mask.mT, query_tokens)
    scale = 1 / math.sqrt(sizes["o"] // num_heads) if scale is None else scale

    query = einsum(query_tokens, query_weight, "b l d, o d -> b l o")
    query = query * scale if query_bias is None else (query + query_bias) * scale
    query = rearrange(query, "b l (heads e) -> b l heads e", heads=num_heads)
    key_weight, value_weight = (
        rearrange(w, "(heads e) c -> heads e c", heads=num_heads) for w in (key_weight, value_weight)
    )
    folded = einsum(query, key_weight, "b l heads e, heads e c -> b heads l c")
    logits = einsum(folded, visual, "b heads l c, b n c -> b heads l n")
    weights = masked_softmax(logits, None if mask is None else rearrange(mask, "b l n -> b 1 l n"))
    mixed = einsum(weights.to(visual.dtype), visual, "b heads l n, b n c -> b heads l c")
    out = einsum(mixed, value_weight, "b heads l c, heads e c -> b l heads e")
    out = rearrange(out, "b l heads e -> b l (heads e)")
    if value_bias is None:
        return out
    # The weights of a row sum to 1, or to 0 where it attends to nothing: there the bias is left out too.
    return out + (value_bias if mask is None else value_bias * mask.any(dim=-1, keepdim=True))


def _checked(op: str, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor | None:
    """Check everything the backends rely on and give the mask as (b, l, n)."""
    axes = {"query": (query, "b l heads e"), "key": (key, "b n heads e"), "value": (value, "b n heads e")}
    sizes = check_axes(op, **axes, **_mask_axes(mask))
    if not query.dtype == key.dtype == value.dtype:
        raise TypeError(
            f"{op}: query is {query.dtype}, key {key.dtype}, value {value.dtype}; cast to one dtype"
        )
    return None if mask is None else _per_row(op, mask, sizes["l"])


def _mask_axes(mask: Tensor | None) -> dict[str, tuple[Tensor, str]]:
    if mask is None:
        return {}
    return {"mask": (mask, "b n" if mask.ndim == 2 else "b l n")}


def _per_row(op: str, mask: Tensor, l: int) -> Tensor:
    check_mask(op, mask=mask)
    return mask if mask.ndim == 3 else mask[:, None].expand(-1, l, -1)


def _reasons(name: str, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> list[str]:
    why: list[str] = _BACKENDS[name].reasons(query, key, value, mask)
    return why
