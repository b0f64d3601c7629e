"""Relationship block: visual tokens of one expression complete one another (METRIS Eq. 7)."""

from torch import Tensor, nn

from metris_blocks.layers import AttentionLayer, Norm
from metris_blocks.ops.backends import Backend
from metris_blocks.ops.masks import zero_unless_any
from metris_blocks.ops.shapes import check_axes


class VisualRelationshipSelfAttention(nn.Module):
    """Self-attention among the refined tokens (METRIS Eq. 7).

    ``Q̂ = MHSA(F_r) + F_r; Q̂_V = MLP(Q̂) + Q̂``

    Example:
        >>> import torch
        >>> relationship = VisualRelationshipSelfAttention(dim=32)
        >>> language_mask = torch.tensor([[True, True, True], [True, True, False]])
        >>> tokens = relationship(torch.randn(2, 3, 32), language_mask)
        >>> tokens.shape, tokens[1, 2].any().item()
        (torch.Size([2, 3, 32]), False)

    Args:
        dim: d, channels of the tokens.
        num_heads: Number of heads.
        mlp_ratio: Hidden channels of the MLP per channel.
        dropout: Probability of zeroing a channel that attention or MLP adds, in [0, 1).
        norm: "pre" or "none" (Eq. 7 to the letter), as in `AttentionLayer`.
        backend: As in `masked_attention`.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int = 8,
        mlp_ratio: float = 4.0,
        dropout: float = 0.0,
        norm: Norm = "pre",
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        self.dim = dim
        self.layer = AttentionLayer(
            dim, num_heads=num_heads, mlp_ratio=mlp_ratio, dropout=dropout, norm=norm, backend=backend
        )

    def forward(self, refined: Tensor, language_mask: Tensor | None = None) -> Tensor:
        """Relate.

        Args:
            refined: (b, l, d) tokens F_r.
            language_mask: (b, l) bool; True = real word. None: all are.

        Returns:
            (b, l, d) visual expression Q̂_V; rows of padded words are zero.
        """
        check_axes(
            "VisualRelationshipSelfAttention",
            dim=(self.dim, "d"),
            refined=(refined, "b l d"),
            language_mask=(language_mask, "b l bool"),
        )
        if language_mask is None:
            unpadded: Tensor = self.layer(refined)
            return unpadded
        (refined,) = zero_unless_any(language_mask, refined)
        (tokens,) = zero_unless_any(language_mask, self.layer(refined, mask=language_mask))
        return tokens
