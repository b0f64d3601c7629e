"""Relevance curation: cosine scores and the exact top-r dynamic mask (METRIS Eq. 2-3)."""

import math

import torch
from einops import einsum
from torch import Tensor
from torch.nn import functional as F

from metris_blocks.ops.backends import CurationBackend, triton
from metris_blocks.ops.backends.triton import curation as kernels
from metris_blocks.ops.shapes import at_least_float32, check_axes


def cosine_relevance(visual: Tensor, language: Tensor, *, backend: CurationBackend = "auto") -> Tensor:
    """Score every visual token against every expression token by cosine similarity.

    METRIS Eq. 2: ``S_c = C(X, Y)``, ``S_c[l, n] = X[n]·Y[l] / (|X[n]| |Y[l]|)``. Autocast is off inside:
    scores in 16 bits tie so often that top-r would keep the wrong tokens.

    Args:
        visual: (b, n, j) visual tokens X in the joint space.
        language: (b, l, j) expression tokens Y in the joint space.
        backend: As in `top_r_mask`.

    Returns:
        (b, l, n) cosines in [-1, 1], no unit; float32, or wider where the inputs are. A zero vector scores 0.

    Raises:
        ValueError: An axis differs between the arguments, or ``backend`` is unknown.
        NotImplementedError: A named backend cannot run; the message lists every reason.
    """
    op = "cosine_relevance"
    check_axes(op, visual=(visual, "b n j"), language=(language, "b l j"))
    if triton.runs(op, backend, visual, language):
        return kernels.relevance(visual, language)
    with torch.autocast(visual.device.type, enabled=False):
        x = F.normalize(at_least_float32(visual), dim=-1)
        y = F.normalize(at_least_float32(language), dim=-1)
        return einsum(y, x, "b l j, b n j -> b l n")


def top_r_mask(
    scores: Tensor,
    ratio: float,
    *,
    visual_mask: Tensor | None = None,
    backend: CurationBackend = "auto",
) -> Tensor:
    """Mark the ``ratio`` most relevant visual tokens of each expression token.

    METRIS Eq. 2-3: ``E = R(S_c, r)``, here as the mask of E. Each row keeps exactly
    ``N_p = max(1, floor(ratio · n_valid + 1/2))`` tokens, where ``n_valid`` counts the real visual tokens.
    Equal scores are kept from the lowest index up, on every device. NaN ranks above every number.

    Args:
        scores: (b, l, n) relevance S_c, no unit.
        ratio: r, share of the visual tokens to keep, in (0, 1].
        visual_mask: (b, n) bool; True = real visual token. None: all are real.
        backend: "auto", which is "eager", or one of "eager" and "triton"; a named one never falls back.

    Returns:
        (b, l, n) bool; True = curated. A sample without real visual tokens has empty rows.

    Raises:
        ValueError: ``ratio`` is outside (0, 1], an axis differs between the arguments, or ``backend`` is
            unknown.
        TypeError: ``visual_mask`` is not bool.
        NotImplementedError: A named backend cannot run; the message lists every reason.
    """
    op = "top_r_mask"
    check_ratio(op, ratio)
    axes = check_axes(op, scores=(scores, "b l n"), visual_mask=(visual_mask, "b n bool"))
    b, l, n = axes.values()
    on_triton = triton.runs(op, backend, scores, longest_row=kernels.LONGEST_ROW)
    if visual_mask is None:
        count = torch.full((b,), max(1, math.floor(ratio * n + 0.5)), device=scores.device)
    else:
        n_valid = visual_mask.sum(dim=-1)
        # float64, since 0.3 · 225 in float32 is not the 67.5 that rounds up.
        count = torch.floor(ratio * n_valid.double() + 0.5).long().clamp_min(1).minimum(n_valid)
    if on_triton:
        return kernels.select(scores, count, visual_mask)

    if n == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    ranked = scores.detach()
    if visual_mask is not None:
        # Whatever padding scores, -inf and NaN too, it comes last and is passed over.
        ranked = ranked.masked_fill(~visual_mask[:, None], -math.inf)
    # Sorted for the last value that is kept, not for an order: that of ties is left open by torch.topk, by
    # unstable sorts and by exported programs, while comparing with a value means the same everywhere.
    last = (count - 1).clamp_min(0)[:, None, None].expand(-1, l, 1)
    edge = ranked.sort(dim=-1, descending=True).values.gather(-1, last)
    # NaN is beyond comparison: above every number as an entry, and as an edge equal to other NaN.
    no_number = edge.isnan()
    above = ~((ranked <= edge) | no_number)
    tied = (ranked == edge) | (ranked.isnan() & no_number)
    if visual_mask is not None:
        tied = tied & visual_mask[:, None]
    left = count[:, None, None] - above.sum(dim=-1, keepdim=True)
    return above | (tied & (tied.cumsum(dim=-1) <= left))


def check_ratio(owner: str, ratio: float) -> None:
    """Refuse a share of tokens that is not one.

    Raises:
        ValueError: ``ratio`` is outside (0, 1]; says so where a percentage was given.
    """
    if not 0 < ratio <= 1:
        percent = (
            f"; the paper's r = {ratio:g} means per cent, here {ratio / 100:g}" if 1 < ratio <= 100 else ""
        )
        raise ValueError(f"{owner}: ratio must be in (0, 1], got {ratio:g}{percent}")
