"""Refinement block: each aggregated token looks again at the tokens curated for it (METRIS Eq. 6)."""

from torch import Tensor, nn

from metris_blocks.layers import AttentionLayer, Norm
from metris_blocks.ops.backends import Backend
from metris_blocks.ops.masks import zero_unless_any
from metris_blocks.ops.shapes import check_axes


class DynamicMaskCrossAttention(nn.Module):
    """Cross-attention under the dynamic mask (METRIS Eq. 6).

    ``F̂ = MHCA(F_a, F_v, M) + F_a; F_r = MLP(F̂) + F̂``

    Example:
        >>> import torch
        >>> refinement = DynamicMaskCrossAttention(dim=32, visual_dim=64)
        >>> dynamic_mask = torch.rand(2, 5, 49) > 0.7
        >>> refinement(torch.randn(2, 5, 32), torch.randn(2, 49, 64), dynamic_mask).shape
        torch.Size([2, 5, 32])

    Args:
        dim: d, channels of the aggregated tokens.
        visual_dim: c, channels of the visual tokens.
        num_heads: Number of heads.
        mlp_ratio: Hidden channels of the MLP per channel.
        dropout: Probability of zeroing a channel that attention or MLP adds, in [0, 1).
        norm: "pre" or "none" (Eq. 6 to the letter), as in `AttentionLayer`.
        backend: As in `masked_attention`.
    """

    def __init__(
        self,
        dim: int,
        visual_dim: int,
        *,
        num_heads: int = 8,
        mlp_ratio: float = 4.0,
        dropout: float = 0.0,
        norm: Norm = "pre",
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        self.dim, self.visual_dim = dim, visual_dim
        self.layer = AttentionLayer(
            dim,
            visual_dim,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            dropout=dropout,
            norm=norm,
            backend=backend,
        )

    def forward(
        self, aggregated: Tensor, visual: Tensor, dynamic_mask: Tensor, *, assume_finite: bool = False
    ) -> Tensor:
        """Refine.

        Args:
            aggregated: (b, l, d) tokens F_a.
            visual: (b, n, c) tokens F_v. What no row curates may hold anything, NaN too.
            dynamic_mask: (b, l, n) bool; True = curated.
            assume_finite: Vouch that tokens no row curates are finite as well: saves a pass over ``visual``.

        Returns:
            (b, l, d) refined tokens F_r.
        """
        check_axes(
            "DynamicMaskCrossAttention",
            dim=(self.dim, "d"),
            visual_dim=(self.visual_dim, "c"),
            aggregated=(aggregated, "b l d"),
            visual=(visual, "b n c"),
            dynamic_mask=(dynamic_mask, "b l n bool"),
        )
        if not assume_finite:
            (visual,) = zero_unless_any(dynamic_mask, visual)
        out: Tensor = self.layer(aggregated, visual, dynamic_mask)
        return out
