"""The visual expression extractor: the one place where blocks meet blocks (METRIS 3.2)."""

from typing import NamedTuple

from torch import Tensor, nn

from metris_blocks.aggregation import MaskedSoftmaxAggregation
from metris_blocks.curation import RelevanceCuration
from metris_blocks.layers import Norm
from metris_blocks.ops.backends import Backend, CurationBackend
from metris_blocks.ops.shapes import zero_unless_any
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


class VisualExpressionExtractor(nn.Module):
    """Turn visual tokens into one visual expression token per expression token (METRIS 3.2, Eq. 1-7).

    Curate by relevance, aggregate the curated tokens, refine under the dynamic mask, relate.

    Args:
        visual_dim: c, channels of the visual tokens.
        language_dim: Channels of the (enhanced) expression tokens.
        dim: d, channels of the visual expression; a multiple of ``num_heads``.
        joint_dim: Width of the joint space of Eq. 1.
        num_heads: Heads of Eq. 6 and Eq. 7.
        mlp_ratio: Hidden channels of the MLPs per channel.
        ratio: r, share of the visual tokens curated per expression token, in (0, 1].
        dropout: Probability of zeroing a channel that attention or MLP adds, in [0, 1).
        norm: "pre", or "none" for Eq. 6 and 7 to the letter.
        temperature: Divides the scores in the softmax of Eq. 5, > 0; 1 is the paper's.
        divide_by_count: Keep the 1/N_p of Eq. 5.
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
        dropout: float = 0.0,
        norm: Norm = "pre",
        temperature: float = 1.0,
        divide_by_count: bool = True,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        chain: CurationBackend = "triton" if backend == "triton" else "auto"
        self.curation = RelevanceCuration(visual_dim, language_dim, joint_dim, ratio=ratio, backend=chain)
        self.aggregation = MaskedSoftmaxAggregation(
            visual_dim, dim, temperature=temperature, divide_by_count=divide_by_count, backend=chain
        )
        self.refinement = DynamicMaskCrossAttention(
            dim,
            visual_dim,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            dropout=dropout,
            norm=norm,
            backend=backend,
        )
        self.relationship = VisualRelationshipSelfAttention(
            dim, num_heads=num_heads, mlp_ratio=mlp_ratio, dropout=dropout, norm=norm, backend=backend
        )

    def forward(
        self,
        visual: Tensor,
        language: Tensor,
        *,
        visual_mask: Tensor | None = None,
        language_mask: Tensor | None = None,
    ) -> VisualExpression:
        """Extract the visual expression.

        Args:
            visual: (b, n, c) tokens F_v, row-major over the feature map.
            language: (b, l, language_dim) tokens Q̂_L; index 0 is the global cue.
            visual_mask: (b, n) bool; True = real token.
            language_mask: (b, l) bool; True = real token.
        """
        scores, dynamic_mask = self.curation(
            visual, language, visual_mask=visual_mask, language_mask=language_mask
        )
        # Padding is all that may hold NaN: hidden once, here, and not again in every block.
        if visual_mask is not None:
            (visual,) = zero_unless_any(visual_mask, visual)
        aggregated = self.aggregation(scores, dynamic_mask, visual, assume_finite=True)
        refined = self.refinement(aggregated, visual, dynamic_mask, assume_finite=True)
        tokens = self.relationship(refined, language_mask)
        return VisualExpression(tokens, scores, dynamic_mask)
