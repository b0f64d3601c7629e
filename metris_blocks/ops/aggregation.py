"""Masked-softmax aggregation: one visual vector per expression token (METRIS Eq. 5)."""

from einops import einsum
from torch import Tensor

from metris_blocks.ops.backends import CurationBackend, triton
from metris_blocks.ops.backends.triton import aggregation as kernels
from metris_blocks.ops.masks import masked_softmax, zero_unless_any
from metris_blocks.ops.shapes import at_least_float32, check_axes


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
    axes = {"scores": (scores, "b l n"), "dynamic_mask": (dynamic_mask, "b l n bool")}
    check_axes(op, **axes, visual=(visual, "b n c"))
    if not temperature > 0:
        raise ValueError(f"{op}: temperature must be > 0, got {temperature:g}")
    if triton.runs(op, backend, visual, scores):
        return kernels.aggregate(scores, dynamic_mask, visual, temperature, divide_by_count)

    weights = masked_softmax(at_least_float32(scores) / temperature, dynamic_mask)
    if not assume_finite:
        (visual,) = zero_unless_any(dynamic_mask, visual)
    out = einsum(weights.to(visual.dtype), visual, "b l n, b n c -> b l c").to(visual.dtype)
    if not divide_by_count:
        return out
    # After the sum: weights / N_p are about 1/N_p², below what float16 resolves.
    return out / dynamic_mask.sum(dim=-1, keepdim=True).clamp_min(1)
