"""Contrastive block: supervises the global cue's relevance by the target mask (METRIS Eq. 4)."""

import math

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from metris_blocks.ops.contrastive import pixel_contrastive_loss
from metris_blocks.ops.shapes import at_least_float32, check_axes


class PixelContrastiveLoss(nn.Module):
    """Pixel contrastive loss with its own learnable temperature (METRIS Eq. 4).

    ``L = mean_z(-m_z log σ(s_z/τ) - (1 - m_z) log(1 - σ(s_z/τ)))``, m_z the target's share of token z's cell.

    Example:
        >>> import torch
        >>> loss = PixelContrastiveLoss(temperature=0.07)
        >>> mask = torch.zeros(2, 56, 56)
        >>> mask[:, 10:30, 10:30] = 1
        >>> loss(torch.rand(2, 49), mask).ndim
        0

    Args:
        temperature: Where τ starts, > 0; learned as its logarithm. The paper does not say where.

    Raises:
        ValueError: ``temperature`` is not positive.
    """

    def __init__(self, *, temperature: float = 0.07) -> None:
        super().__init__()
        if not temperature > 0:
            raise ValueError(f"PixelContrastiveLoss: temperature must be > 0, got {temperature:g}")
        self.log_temperature = nn.Parameter(torch.tensor(math.log(temperature)))

    def forward(
        self,
        scores: Tensor,
        mask: Tensor,
        *,
        grid: tuple[int, int] | None = None,
        visual_mask: Tensor | None = None,
    ) -> Tensor:
        """Compare the relevance of each visual token with the share of the target in its cell.

        Args:
            scores: (b, n) relevance s of the global expression token, row-major over the token grid.
            mask: (b, h, w) target in [0, 1] or bool, at any resolution; area-averaged to the token grid.
            grid: Rows and columns of the token grid. None: the grid of n cells with the mask's aspect.
            visual_mask: (b, n) bool; True = real visual token. None: all are real.

        Returns:
            () loss, float32 or wider.

        Raises:
            ValueError: The grid does not have n cells, or none of the mask's aspect has.
        """
        owner = "PixelContrastiveLoss"
        axes = {"scores": (scores, "b n"), "mask": (mask, "b h w")}
        sizes = check_axes(owner, **axes, visual_mask=(visual_mask, "b n bool"))
        n, h, w = sizes["n"], sizes["h"], sizes["w"]
        if grid is None:
            # Both sides from the aspect: n = 12 below a square mask is a mistake, not a grid of 3 x 4.
            grid = (max(1, round(math.sqrt(n * h / w))), max(1, round(math.sqrt(n * w / h))))
        if grid[0] * grid[1] != n:
            raise ValueError(
                f"{owner}: scores 'b n' has n={n}, but the grid {grid[0]} x {grid[1]} (mask: {h} x {w}) has "
                f"{grid[0] * grid[1]} cells; give grid=(rows, columns)"
            )
        mask = at_least_float32(mask) if mask.is_floating_point() else mask.float()
        area = F.adaptive_avg_pool2d(mask, grid)
        target = rearrange(area, "b rows columns -> b (rows columns)")
        return pixel_contrastive_loss(scores, target, self.log_temperature.exp(), valid=visual_mask)
