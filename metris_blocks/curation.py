"""Curation block: which visual tokens matter for which expression token (METRIS Eq. 1-3)."""

from typing import NamedTuple

from torch import Tensor, nn

from metris_blocks.ops.backends import CurationBackend
from metris_blocks.ops.curation import check_ratio, cosine_relevance, top_r_mask
from metris_blocks.ops.masks import zero_unless_any
from metris_blocks.ops.shapes import check_axes


class Curation(NamedTuple):
    """What `RelevanceCuration` returns."""

    scores: Tensor
    """(b, l, n) relevance S_c, cosine in [-1, 1], float32 or wider; zero in padded rows and columns."""
    dynamic_mask: Tensor
    """(b, l, n) bool; True = curated. Rows of padded words are empty."""


class RelevanceCuration(nn.Module):
    """Embed both modalities in a joint space, score them, and keep the top r (METRIS Eq. 1-3).

    ``X = F_v W_v + b_v; Y = Q̂_L W_l + b_l; S_c = C(X, Y); E = R(S_c, r)``, E as the mask of what it holds.

    Example:
        >>> import torch
        >>> curation = RelevanceCuration(visual_dim=64, language_dim=32, ratio=0.3)
        >>> scores, dynamic_mask = curation(torch.randn(2, 49, 64), torch.randn(2, 5, 32))
        >>> scores.shape, set(dynamic_mask.sum(dim=-1).flatten().tolist())
        (torch.Size([2, 5, 49]), {15})

    Args:
        visual_dim: c, channels of the visual tokens.
        language_dim: d, channels of the expression tokens.
        joint_dim: j, width of the joint space; the paper does not say.
        ratio: r, share of the visual tokens kept per expression token, in (0, 1].
        backend: As in `top_r_mask`.

    Raises:
        ValueError: ``ratio`` is outside (0, 1], or ``joint_dim`` below 1.
    """

    def __init__(
        self,
        visual_dim: int,
        language_dim: int,
        joint_dim: int = 256,
        *,
        ratio: float = 0.3,
        backend: CurationBackend = "auto",
    ) -> None:
        super().__init__()
        check_ratio("RelevanceCuration", ratio)
        if joint_dim < 1:
            raise ValueError(f"RelevanceCuration: joint_dim must be >= 1, got {joint_dim}")
        self.visual_dim, self.language_dim = visual_dim, language_dim
        self.ratio = ratio
        self.backend: CurationBackend = backend
        self.visual_proj = nn.Linear(visual_dim, joint_dim)
        self.language_proj = nn.Linear(language_dim, joint_dim)

    def forward(
        self,
        visual: Tensor,
        language: Tensor,
        *,
        visual_mask: Tensor | None = None,
        language_mask: Tensor | None = None,
    ) -> Curation:
        """Score and curate.

        Args:
            visual: (b, n, c) tokens F_v.
            language: (b, l, d) tokens Q̂_L.
            visual_mask: (b, n) bool; True = real token; others are never curated.
            language_mask: (b, l) bool; True = real token; others curate nothing.

        Returns:
            (b, l, n) scores S_c and (b, l, n) bool dynamic mask, as `Curation`.
        """
        check_axes(
            "RelevanceCuration",
            visual_dim=(self.visual_dim, "c"),
            language_dim=(self.language_dim, "d"),
            visual=(visual, "b n c"),
            language=(language, "b l d"),
            visual_mask=(visual_mask, "b n bool"),
            language_mask=(language_mask, "b l bool"),
        )
        if visual_mask is not None:
            (visual,) = zero_unless_any(visual_mask, visual)
        if language_mask is not None:
            (language,) = zero_unless_any(language_mask, language)
        scores = cosine_relevance(
            self.visual_proj(visual), self.language_proj(language), backend=self.backend
        )
        if visual_mask is not None:
            scores = scores.masked_fill(~visual_mask[:, None], 0)
        dynamic_mask = top_r_mask(scores, self.ratio, visual_mask=visual_mask, backend=self.backend)
        if language_mask is not None:
            scores = scores.masked_fill(~language_mask[..., None], 0)
            dynamic_mask = dynamic_mask & language_mask[..., None]
        return Curation(scores, dynamic_mask)
