"""Training loss: binary cross-entropy on the mask and the pixel contrastive term (METRIS 3.2, 3.3)."""

from typing import NamedTuple

from torch import Tensor, nn
from torch.nn import functional as F

from metris_blocks import PixelContrastiveLoss
from reference_model.model.metris import MetrisOutput


class Losses(NamedTuple):
    """What `MetrisLoss` returns: scalars, no unit."""

    total: Tensor
    """mask + weight · contrastive; what to differentiate."""
    mask: Tensor
    """Binary cross-entropy per pixel."""
    contrastive: Tensor
    """Eq. 4 per visual token, before its weight."""


class MetrisLoss(nn.Module):
    """Sum of the two losses; owns the learnable τ of Eq. 4, so its parameters are trained too.

    Args:
        contrastive_weight: Weight of Eq. 4, >= 0; the paper does not print it.
        temperature: Where τ starts, > 0; the paper does not print it.
    """

    def __init__(self, *, contrastive_weight: float, temperature: float) -> None:
        super().__init__()
        self.contrastive_weight = contrastive_weight
        self.contrastive = PixelContrastiveLoss(temperature=temperature)

    def forward(self, output: MetrisOutput, target: Tensor) -> Losses:
        """Output of the model, (b, h, w) target in [0, 1] -> losses."""
        mask = F.binary_cross_entropy_with_logits(output.logits.float(), target)
        contrastive = self.contrastive(output.scores[:, 0], target, grid=output.grid)
        return Losses(mask + self.contrastive_weight * contrastive, mask, contrastive)
