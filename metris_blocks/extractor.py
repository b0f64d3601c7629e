"""The visual expression extractor: the one place where blocks meet blocks (METRIS 3.2)."""

from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn import functional as F

from metris_blocks.aggregation import MaskedSoftmaxAggregation
from metris_blocks.cue import Cue, GlobalCue
from metris_blocks.curation import RelevanceCuration
from metris_blocks.layers import Norm
from metris_blocks.ops.backends import Backend, CurationBackend
from metris_blocks.ops.masks import zero_unless_any
from metris_blocks.ops.shapes import check_axes
from metris_blocks.refinement import DynamicMaskCrossAttention
from metris_blocks.relationship import VisualRelationshipSelfAttention


class VisualExpression(NamedTuple):
    """What `VisualExpressionExtractor` returns."""

    tokens: Tensor
    """(b, l, d) visual expression Q̂_V; rows of padded words are zero."""
    scores: Tensor
    """(b, l, n) relevance S_c, cosine in [-1, 1]; row 0 is the global cue's, for `PixelContrastiveLoss`."""
    dynamic_mask: Tensor
    """(b, l, n) bool; True = curated."""

    @property
    def mask(self) -> Tensor:
        """(b, l) bool; True = has a visual expression token, so takes part in a `GuidanceSet`."""
        return self.dynamic_mask.any(dim=-1)


class VisualExpressionExtractor(nn.Module):
    """Turn visual tokens into one visual expression token per expression token (METRIS 3.2, Eq. 1-7).

    Curate by relevance, aggregate the curated tokens, refine under the dynamic mask, relate:
    ``S_c, M = curate(F_v, Q̂_L); F_a = aggregate(S_c, M, F_v); F_r = refine(F_a, F_v, M); Q̂_V = relate(F_r)``

    Example:
        >>> import torch
        >>> extractor = VisualExpressionExtractor(visual_dim=64, language_dim=32, dim=32)
        >>> tokens, scores, dynamic_mask = extractor(torch.randn(2, 49, 64), torch.randn(2, 5, 32))
        >>> tokens.shape, scores.shape, dynamic_mask.dtype
        (torch.Size([2, 5, 32]), torch.Size([2, 5, 49]), torch.bool)

    Weights start as PyTorch's own: those and the biases of a linear layer uniform in ±1/sqrt(channels in),
    norms as the identity, a learned global cue as the mean. All live in `nn.Linear`, `nn.LayerNorm` and one
    parameter, ``global_cue.query``, so ``apply(init)`` reaches them.

    ``refinement`` (Eq. 6) and ``relationship`` (Eq. 7) may be set to None, to leave that step out.

    Args:
        visual_dim: c, channels of the visual tokens.
        language_dim: Channels of the (enhanced) expression tokens.
        dim: d, channels of the visual expression; a multiple of ``num_heads``.
        joint_dim: Width of the joint space of Eq. 1.
        num_heads: Heads of Eq. 6 and Eq. 7.
        mlp_ratio: Hidden channels of the MLPs per channel.
        ratio: r, share of the visual tokens curated per expression token, in (0, 1].
        temperature: Divides the scores in the softmax of Eq. 5, > 0; 1 is the paper's.
        divide_by_count: Keep the 1/N_p of Eq. 5.
        dropout: Probability of zeroing a channel that attention or MLP adds, in [0, 1).
        norm: "pre", or "none" for Eq. 6 and 7 to the letter.
        global_cue: "first": token 0 is the global cue, as [CLS] is; where padding is on the left, that is
            padding and curates nothing, so take another. Else one is put before the l tokens, and
            all results have 1 + l rows: "last" (the last real token), "mean" or "learned", as in
            `GlobalCue`.
        backend: As in `masked_attention`; "triton" runs curation and aggregation on its kernels too.
    """

    def __init__(
        self,
        visual_dim: int,
        language_dim: int,
        dim: int,
        *,
        joint_dim: int = 256,
        num_heads: int = 8,
        mlp_ratio: float = 4.0,
        ratio: float = 0.3,
        temperature: float = 1.0,
        divide_by_count: bool = True,
        dropout: float = 0.0,
        norm: Norm = "pre",
        global_cue: Cue = "first",
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        chain: CurationBackend = "triton" if backend == "triton" else "auto"
        self.global_cue = None if global_cue == "first" else GlobalCue(language_dim, global_cue)
        self.curation = RelevanceCuration(visual_dim, language_dim, joint_dim, ratio=ratio, backend=chain)
        self.aggregation = MaskedSoftmaxAggregation(
            visual_dim, dim, temperature=temperature, divide_by_count=divide_by_count, backend=chain
        )
        layer: dict[str, Any] = {
            "num_heads": num_heads,
            "mlp_ratio": mlp_ratio,
            "dropout": dropout,
            "norm": norm,
            "backend": backend,
        }
        self.refinement: DynamicMaskCrossAttention | None
        self.refinement = DynamicMaskCrossAttention(dim, visual_dim, **layer)
        self.relationship: VisualRelationshipSelfAttention | None
        self.relationship = VisualRelationshipSelfAttention(dim, **layer)

    def forward(
        self,
        visual: Tensor,
        language: Tensor,
        *,
        visual_mask: Tensor | None = None,
        language_mask: Tensor | None = None,
        cue_mask: Tensor | None = None,
    ) -> VisualExpression:
        """Extract the visual expression.

        Args:
            visual: (b, n, c) tokens F_v, row-major over the feature map.
            language: (b, l, language_dim) tokens Q̂_L; index 0 is the global cue, unless ``global_cue`` says
                otherwise.
            visual_mask: (b, n) bool; True = real token.
            language_mask: (b, l) bool; True = real token.
            cue_mask: (b, l) bool; True = a token that curates. The others are scored, and their rows of the
                visual expression are zero. None: all do. A global cue put before them always does.

        Returns:
            (b, l, d) tokens Q̂_V, (b, l, n) scores and (b, l, n) bool dynamic mask, as `VisualExpression`; a
            global cue put before the tokens makes that 1 + l rows.
        """
        axes = {"language": (language, "b l d"), "cue_mask": (cue_mask, "b l bool")}
        check_axes("VisualExpressionExtractor", **axes)
        if self.global_cue is not None:
            language, language_mask = self.global_cue(language, language_mask)
            cue_mask = None if cue_mask is None else F.pad(cue_mask, (1, 0), value=True)
        scores, dynamic_mask = self.curation(
            visual, language, visual_mask=visual_mask, language_mask=language_mask
        )
        if cue_mask is not None:
            dynamic_mask = dynamic_mask & cue_mask[..., None]
            language_mask = cue_mask if language_mask is None else cue_mask & language_mask
        # Padding is all that may hold NaN: hidden once, here, and not again in every block.
        if visual_mask is not None:
            (visual,) = zero_unless_any(visual_mask, visual)
        tokens = self.aggregation(scores, dynamic_mask, visual, assume_finite=True)
        if self.refinement is not None:
            tokens = self.refinement(tokens, visual, dynamic_mask, assume_finite=True)
        if self.relationship is not None:
            tokens = self.relationship(tokens, language_mask)
        elif language_mask is not None:
            (tokens,) = zero_unless_any(language_mask, tokens)
        return VisualExpression(tokens, scores, dynamic_mask)
