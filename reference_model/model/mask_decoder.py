"""Mask decoder: the image attends to the guidance set, from the coarsest map to the finest (METRIS 3.3)."""

import math
from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from metris_blocks.layers import AttentionLayer, Norm
from metris_blocks.ops.backends import Backend


class Fusion(nn.Sequential):
    """Two 3x3 convolutions over the upsampled map and the next finer encoder map, side by side."""

    def __init__(self, channels: int, coarser_dim: int, dim: int) -> None:
        # GroupNorm and not the peers' BatchNorm: small batches break that (LAVT#10), and an image's logits
        # should not depend on what else is in its batch.
        groups = math.gcd(32, max(1, dim // 8), dim)  # of at least 8 channels each
        super().__init__(
            nn.Conv2d(channels + coarser_dim, dim, 3, padding=1, bias=False),
            nn.GroupNorm(groups, dim),
            nn.ReLU(inplace=True),
            nn.Conv2d(dim, dim, 3, padding=1, bias=False),
            nn.GroupNorm(groups, dim),
            nn.ReLU(inplace=True),
        )


class MaskDecoder(nn.Module):
    """Feature maps and guidance set -> logits on the finest map's grid.

    Args:
        channels: c_1..c_4 of the encoder maps, fine to coarse.
        guidance_dim: d, channels of the guidance tokens.
        dim: Channels inside the decoder, one number or one a stage, coarse to fine; not in the paper.
        num_heads: Heads per stage.
        mlp_ratio: Hidden channels of the MLPs per channel.
        dropout: Probability of zeroing a channel that attention or MLP adds, in [0, 1).
        norm: "pre" or "none", as in `AttentionLayer`.
        backend: As in `masked_attention`.
    """

    def __init__(
        self,
        channels: Sequence[int],
        guidance_dim: int,
        dim: int | Sequence[int],
        *,
        num_heads: int = 8,
        mlp_ratio: float = 4.0,
        dropout: float = 0.0,
        norm: Norm = "pre",
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        dims = [dim] * len(channels) if isinstance(dim, int) else list(dim)
        if len(dims) != len(channels):
            raise ValueError(f"MaskDecoder: dim has {len(dims)} widths, but there are {len(channels)} stages")
        self.inlet = nn.Linear(channels[-1], dims[0])
        self.stages = nn.ModuleList(
            AttentionLayer(
                width,
                guidance_dim,
                num_heads=num_heads,
                mlp_ratio=mlp_ratio,
                dropout=dropout,
                norm=norm,
                backend=backend,
            )
            for width in dims
        )
        finer = reversed(channels[:-1])
        self.fusions = nn.ModuleList(Fusion(*widths) for widths in zip(finer, dims, dims[1:], strict=False))
        self.head = nn.Linear(dims[-1], 1)

    def forward(
        self,
        features: Sequence[Tensor],
        guidance: Tensor,
        guidance_mask: Tensor | None = None,
        *,
        maps: list[Tensor] | None = None,
    ) -> Tensor:
        """Decode.

        Args:
            features: (b, c_i, h_i, w_i), fine to coarse.
            guidance: (b, g, d) tokens.
            guidance_mask: (b, g) bool; True = takes part.
            maps: Where to append each stage's attention, (b, heads, h_i, w_i, g), coarse to fine.

        Returns:
            Logits (b, h_1, w_1).
        """
        x = self.inlet(rearrange(features[-1], "b c h w -> b h w c"))
        x = self._guided(self.stages[0], x, guidance, guidance_mask, maps)
        finer = reversed(features[:-1])
        for encoded, fuse, stage in zip(finer, self.fusions, self.stages[1:], strict=True):
            x = rearrange(x, "b h w d -> b d h w")
            x = F.interpolate(x, encoded.shape[-2:], mode="bilinear", align_corners=False)
            x = rearrange(fuse(torch.cat([x, encoded], dim=1)), "b d h w -> b h w d")
            x = self._guided(stage, x, guidance, guidance_mask, maps)
        return self.head(x)[..., 0]

    @staticmethod
    def _guided(
        stage: AttentionLayer,
        x: Tensor,
        guidance: Tensor,
        guidance_mask: Tensor | None,
        maps: list[Tensor] | None,
    ) -> Tensor:
        """Let every cell of a (b, h, w, d) map attend to the guidance tokens."""
        h = x.shape[1]
        x = rearrange(x, "b h w d -> b (h w) d")
        if maps is not None:
            attention = stage.attention_map(x, guidance, guidance_mask)
            maps.append(rearrange(attention, "b heads (h w) g -> b heads h w g", h=h))
        return rearrange(stage(x, guidance, guidance_mask), "b (h w) d -> b h w d", h=h)
