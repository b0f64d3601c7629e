"""Language enhancement: expression tokens look at the image before they choose from it."""

from torch import Tensor, nn

from metris_blocks.layers import AttentionLayer, Norm
from metris_blocks.ops.backends import Backend
from metris_blocks.ops.masks import zero_unless_any
from metris_blocks.ops.shapes import check_axes


class LanguageEnhancer(nn.Module):
    """Cross-attention layers with language queries and vision keys and values (METRIS 3.2, first step).

    Each layer: ``Q = MHCA(Q_L, F_v) + Q_L; Q̂_L = MLP(Q) + Q``

    Example:
        >>> import torch
        >>> enhancer = LanguageEnhancer(language_dim=32, visual_dim=64, depth=2)
        >>> language, visual = torch.randn(2, 5, 32), torch.randn(2, 49, 64)
        >>> enhancer(language, visual).shape
        torch.Size([2, 5, 32])

    Args:
        language_dim: d, channels of the expression tokens (768 for BERT-base).
        visual_dim: c, channels of the visual tokens (1024 for Swin-B stage 4).
        depth: Number of layers; the paper says "layers".
        num_heads: Heads per layer.
        mlp_ratio: Hidden channels of the MLP per channel.
        dropout: Probability of zeroing a channel that attention or MLP adds, in [0, 1).
        norm: "pre" or "none", as in `AttentionLayer`.
        backend: As in `masked_attention`.

    Raises:
        ValueError: ``depth`` is negative.
    """

    def __init__(
        self,
        language_dim: int,
        visual_dim: int,
        *,
        depth: int = 2,
        num_heads: int = 8,
        mlp_ratio: float = 4.0,
        dropout: float = 0.0,
        norm: Norm = "pre",
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        if depth < 0:
            raise ValueError(f"LanguageEnhancer: depth must be >= 0, got {depth}")
        self.language_dim, self.visual_dim = language_dim, visual_dim
        self.layers = nn.ModuleList(
            AttentionLayer(
                language_dim,
                visual_dim,
                num_heads=num_heads,
                mlp_ratio=mlp_ratio,
                dropout=dropout,
                norm=norm,
                backend=backend,
            )
            for _ in range(depth)
        )

    def forward(
        self,
        language: Tensor,
        visual: Tensor,
        *,
        visual_mask: Tensor | None = None,
        language_mask: Tensor | None = None,
    ) -> Tensor:
        """Enhance the expression tokens.

        Args:
            language: (b, l, d) tokens Q_L.
            visual: (b, n, c) tokens F_v.
            visual_mask: (b, n) bool; True = real token.
            language_mask: (b, l) bool; True = real token.

        Returns:
            (b, l, d) tokens Q̂_L; rows of padded words are zero.
        """
        check_axes(
            "LanguageEnhancer",
            language_dim=(self.language_dim, "d"),
            visual_dim=(self.visual_dim, "c"),
            language=(language, "b l d"),
            visual=(visual, "b n c"),
            visual_mask=(visual_mask, "b n bool"),
            language_mask=(language_mask, "b l bool"),
        )
        if visual_mask is not None:
            (visual,) = zero_unless_any(visual_mask, visual)
        if language_mask is not None:
            (language,) = zero_unless_any(language_mask, language)
        for layer in self.layers:
            language = layer(language, visual, visual_mask)
        if language_mask is not None:
            (language,) = zero_unless_any(language_mask, language)
        return language
