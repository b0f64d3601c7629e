"""Curation block: which visual tokens matter for which expression token (METRIS Eq. 1-3)."""

import math
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from metris_blocks.ops.aggregation import masked_softmax
from metris_blocks.ops.backends import CurationBackend
from metris_blocks.ops.curation import check_ratio, cosine_relevance, top_r_mask
from metris_blocks.ops.shapes import check_axes, check_mask, zero_unless_any

Cue = Literal["first", "last", "mean", "learned"]


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
        owner = "RelevanceCuration"
        axes = {"visual": (visual, "b n c"), "language": (language, "b l d")}
        masks = {"visual_mask": (visual_mask, "b n"), "language_mask": (language_mask, "b l")}
        given = {name: (mask, pattern) for name, (mask, pattern) in masks.items() if mask is not None}
        check_axes(owner, **axes, **given)
        check_mask(owner, **{name: mask for name, (mask, _) in given.items()})

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


class GlobalCue(nn.Module):
    """Put a global cue before expression tokens that have no [CLS] in front.

    "last" is the last real token, which has read all others in a decoder-only language model; "mean" is the
    mean of the real tokens; "learned" weights them by the softmax of their product with a learned query,
    which starts at zero, as the mean: ``cue = Σ_l w[l] · Q_L[l]``.

    Example:
        >>> import torch
        >>> cue = GlobalCue(32, "last")
        >>> tokens, mask = cue(torch.randn(2, 5, 32), torch.arange(5) < torch.tensor([[5], [3]]))
        >>> tokens.shape, mask.sum(dim=1).tolist()
        (torch.Size([2, 6, 32]), [6, 4])

    Args:
        language_dim: d, channels of the expression tokens.
        kind: "last", "mean" or "learned".

    Raises:
        ValueError: ``kind`` is none of them.
    """

    def __init__(self, language_dim: int, kind: Cue) -> None:
        super().__init__()
        kinds = get_args(Cue)
        if kind not in kinds[1:]:
            raise ValueError(f"GlobalCue: global_cue must be one of {list(kinds)}, got {kind!r}")
        self.kind = kind
        self.query = nn.Parameter(torch.zeros(language_dim)) if kind == "learned" else None

    def forward(self, language: Tensor, language_mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Prepend the cue.

        Args:
            language: (b, l, d) tokens.
            language_mask: (b, l) bool; True = real token, padding may be left, right or between.

        Returns:
            (b, 1 + l, d) tokens and (b, 1 + l) bool mask, None where there was none. The cue of a sentence
            without a real token is zero, and masked.
        """
        check_axes("GlobalCue", language=(language, "b l d"))
        if language_mask is None:
            real = torch.ones(language.shape[:2], dtype=torch.bool, device=language.device)
        else:
            check_axes("GlobalCue", language=(language, "b l d"), language_mask=(language_mask, "b l"))
            check_mask("GlobalCue", language_mask=language_mask)
            real = language_mask
            (language,) = zero_unless_any(real, language)
        if self.kind == "last":
            # The only real token that has none behind it.
            weights = real & (real.flip(1).cumsum(dim=1).flip(1) == 1)
        else:
            flat = language.new_zeros(language.shape[-1]) if self.query is None else self.query
            weights = masked_softmax(language @ flat / math.sqrt(language.shape[-1]), real)
        cue = weights.to(language.dtype)[:, None] @ language
        if language_mask is not None:
            language_mask = torch.cat([real.any(dim=1, keepdim=True), real], dim=1)
        return torch.cat([cue, language], dim=1), language_mask
