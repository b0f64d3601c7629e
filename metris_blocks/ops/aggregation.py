"""Masked-softmax aggregation: one visual vector per expression token (METRIS Eq. 5)."""

import torch
from einops import einsum
from torch import Tensor

from metris_blocks.ops.backends import CurationBackend, check_backend, triton
from metris_blocks.ops.backends.triton import aggregation as kernels
from metris_blocks.ops.shapes import at_least_float32, check_axes, check_mask, zero_unless_any


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


def masked_softmax_aggregation(
    scores: Tensor,
    dynamic_mask: Tensor,
    visual: Tensor,
    *,
    temperature: float = 1.0,
    divide_by_count: bool = True,
    assume_finite: bool = False,
    backend: CurationBackend = "auto",
) -> Tensor:
    """Average the curated visual tokens of each expression token, weighted by relevance.

    METRIS Eq. 5: ``F_a[l] = 1/N_p · Σ_n softmax_n(S_c[l] / temperature + M[l])[n] · F_v[n]``. The paper's
    additive ``M`` (0 or -inf) arrives here as booleans; its temperature is 1.

    Args:
        scores: (b, l, n) relevance S_c; cosine, no unit.
        dynamic_mask: (b, l, n) bool; True = visual token n is curated for expression token l.
        visual: (b, n, c) visual tokens F_v. A token that no row curates may hold anything, NaN too.
        temperature: Divides the scores, > 0. Bare cosines give nearly equal weights; smaller is sharper.
        divide_by_count: Keep the 1/N_p of Eq. 5; False gives a plain softmax average.
        assume_finite: Vouch that tokens no row curates are finite as well: saves a pass over ``visual``.
        backend: As in `top_r_mask`.

    Returns:
        (b, l, c) aggregated tokens F_a, dtype of ``visual``. A row with nothing curated is zero.

    Raises:
        ValueError: An axis differs between arguments, ``temperature`` is not positive, or ``backend`` is
            unknown.
        TypeError: ``dynamic_mask`` is not bool.
        NotImplementedError: A named backend cannot run; the message lists every reason.
    """
    op = "masked_softmax_aggregation"
    check_axes(op, scores=(scores, "b l n"), dynamic_mask=(dynamic_mask, "b l n"), visual=(visual, "b n c"))
    check_mask(op, dynamic_mask=dynamic_mask)
    if not temperature > 0:
        raise ValueError(f"{op}: temperature must be > 0, got {temperature:g}")
    if backend != "auto":
        check_backend(op, backend, {"eager": [], "triton": triton.reasons(visual, scores)})
    if backend == "triton":
        return kernels.aggregate(scores, dynamic_mask, visual, temperature, divide_by_count)

    weights = masked_softmax(at_least_float32(scores) / temperature, dynamic_mask)
    if not assume_finite:
        (visual,) = zero_unless_any(dynamic_mask, visual)
    out = einsum(weights.to(visual.dtype), visual, "b l n, b n c -> b l c").to(visual.dtype)
    if not divide_by_count:
        return out
    # After the sum: weights / N_p are about 1/N_p², below what float16 resolves.
    return out / dynamic_mask.sum(dim=-1, keepdim=True).clamp_min(1)
