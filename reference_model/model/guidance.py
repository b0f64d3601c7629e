"""The guidance set: what the decoder is told of the sentence, and the paper's variants (Tables 5 to 9)."""

from typing import NamedTuple

from torch import Tensor, nn

from metris_blocks import (
    GuidanceSet,
    LanguageEnhancer,
    MaskedSoftmaxAggregation,
    VisualExpressionExtractor,
)
from metris_blocks.layers import AttentionLayer


class Guided(NamedTuple):
    """What `Guidance` returns: a `GuidanceSet` of g tokens, LE before VE or pixels, and how VE came about."""

    tokens: Tensor
    """(b, g, d)."""
    mask: Tensor
    """(b, g) bool; True = takes part."""
    scores: Tensor | None
    """(b, l, n) relevance S_c; None where nothing is curated."""
    dynamic_mask: Tensor | None
    """(b, l, n) bool; True = curated. None with ``scores``."""


class SelfAttention(nn.Module):
    """Layers among the words alone: what gives pure LE the size of the others without a look at the image.

    Args:
        dim: d, channels of the tokens.
        depth: Number of layers.
        options: Of `AttentionLayer`.
    """

    def __init__(self, dim: int, *, depth: int, **options: object) -> None:
        super().__init__()
        self.layers = nn.ModuleList(AttentionLayer(dim, **options) for _ in range(depth))

    def forward(self, language: Tensor, visual: Tensor, *, language_mask: Tensor) -> Tensor:
        """(b, l, d), anything, (b, l) bool -> (b, l, d), zero where padded."""
        for layer in self.layers:
            language = layer(language, mask=language_mask)
        return language.masked_fill(~language_mask[..., None], 0)


class UnmaskedAggregation(MaskedSoftmaxAggregation):
    """The softmax of Eq. 5 over all visual tokens, whichever are curated (Table 8b); none may be padding."""

    def forward(
        self, scores: Tensor, dynamic_mask: Tensor, visual: Tensor, *, assume_finite: bool = False
    ) -> Tensor:
        """(b, l, n), (b, l, n) bool, (b, n, c) -> (b, l, d), zero in rows with nothing curated."""
        everywhere = dynamic_mask.any(dim=-1, keepdim=True).expand_as(dynamic_mask)
        return super().forward(scores, everywhere, visual, assume_finite=assume_finite)


class Guidance(nn.Module):
    """Expression tokens and visual tokens -> guidance set G (METRIS 3.2 and 3.3).

    Args:
        enhancer: Lets language look at the image; for "pure_le" a `SelfAttention`, which does not.
        extractor: Makes the visual expression; None in variants without.
        pixels: Brings visual tokens to the guidance width; None but for "enhanced_le+pixels".
        language: The expression tokens are part of the set.
    """

    def __init__(
        self,
        enhancer: LanguageEnhancer | SelfAttention,
        extractor: VisualExpressionExtractor | None,
        *,
        pixels: nn.Module | None = None,
        language: bool = True,
    ) -> None:
        super().__init__()
        self.enhancer = enhancer
        self.extractor = extractor
        self.pixels = pixels
        self.language = language

    def forward(
        self, visual: Tensor, language: Tensor, language_mask: Tensor, cue_mask: Tensor | None = None
    ) -> Guided:
        """Make the guidance set.

        Args:
            visual: (b, n, c) tokens F_v.
            language: (b, l, d) tokens Q_L; index 0 is the global cue.
            language_mask: (b, l) bool; True = real token.
            cue_mask: (b, l) bool; True = gets a visual expression token. None: every real token.
        """
        language = self.enhancer(language, visual, language_mask=language_mask)
        parts: list[tuple[Tensor, Tensor | None]] = [(language, language_mask)] if self.language else []
        scores = dynamic_mask = None
        if self.pixels is not None:
            parts.append((self.pixels(visual), None))
        if self.extractor is not None:
            expression = self.extractor(visual, language, language_mask=language_mask, cue_mask=cue_mask)
            _, scores, dynamic_mask = expression
            parts.append((expression.tokens, expression.mask))
        return Guided(*GuidanceSet.join(*parts), scores, dynamic_mask)
