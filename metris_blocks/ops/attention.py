"""Masked attention: one boolean mask for all heads, several backends, one meaning (METRIS Eq. 6-7)."""

import math
from types import ModuleType

import torch
from torch import Tensor

from metris_blocks.ops.backends import Backend, check_backend, eager, sdpa, xformers
from metris_blocks.ops.backends.triton import attention as triton
from metris_blocks.ops.masks import per_row, zero_unless_any
from metris_blocks.ops.shapes import check_axes

# The files are small: what they need beyond torch, they import when asked.
_BACKENDS: dict[str, ModuleType] = {"eager": eager, "sdpa": sdpa, "xformers": xformers, "triton": triton}


def masked_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    *,
    scale: float | None = None,
    assume_finite: bool = False,
    backend: Backend = "auto",
) -> Tensor:
    """Attend from expression tokens to the visual tokens that the mask lets take part.

    METRIS Eq. 6-7: ``softmax(Q K^T · scale + M) V`` per head, M = 0 where ``mask`` is True, -inf elsewhere.

    ``backend="auto"`` follows one rule (`auto_backend` tells what it gives): on CUDA "xformers" where it can
    run, "sdpa" otherwise and in traced code (compile, export), which sees through it to the same kernel;
    "sdpa" on every other device. A named backend that cannot run raises; nothing falls back.

    Args:
        query: (b, l, heads, e).
        key: (b, n, heads, e).
        value: (b, n, heads, e).
        mask: (b, l, n) or (b, n) bool, the same for all heads; True = takes part. None: all do. Tokens that
            no row attends to, and queries of rows that attend to nothing, may hold anything, NaN too.
        scale: Multiplies the logits; None means 1/sqrt(e).
        assume_finite: Vouch that those tokens and queries are finite as well: saves a pass over all inputs.
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
        backend = _auto(query, key, value, mask)
    else:
        check_backend(op, backend, _reasons(query, key, value, mask))
    # The triton kernels pass over such tokens where they load them.
    if mask is not None and not assume_finite and backend != "triton":
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
    return _reasons(query, key, value, mask)


def auto_backend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> str:
    """Name the backend that `masked_attention` takes for these inputs under ``backend="auto"``.

    Arguments and errors are those of `explain_backends`.
    """
    return _auto(query, key, value, _checked("auto_backend", query, key, value, mask))


def _auto(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Backend:
    if query.device.type != "cuda" or torch.compiler.is_compiling():
        return "sdpa"
    return "sdpa" if xformers.reasons(query, key, value, mask) else "xformers"


def _reasons(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> dict[str, list[str]]:
    return {name: backend.reasons(query, key, value, mask) for name, backend in _BACKENDS.items()}


def _checked(op: str, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor | None:
    """Check everything the backends rely on and give the mask as (b, l, n)."""
    axes = {"query": (query, "b l heads e"), "key": (key, "b n heads e"), "value": (value, "b n heads e")}
    sizes = check_axes(op, **axes, mask=(mask, "b l n | b n bool"))
    if not query.dtype == key.dtype == value.dtype:
        raise TypeError(
            f"{op}: query is {query.dtype}, key {key.dtype}, value {value.dtype}; cast to one dtype"
        )
    return None if mask is None else per_row(mask, sizes["l"])
