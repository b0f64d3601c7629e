"""Training loss: binary cross-entropy on the mask and the pixel contrastive term (METRIS 3.2, 3.3)."""

from typing import NamedTuple

from torch import Tensor, nn
from torch.nn import functional as F

from metris_blocks import PixelContrastiveLoss
from reference_model.model.metris import MetrisOutput


class Losses(NamedTuple):
    """What `MetrisLoss` returns: scalars, no unit."""

    total: Tensor
    """mask + weight · contrastive + weight · no-target; what to differentiate."""
    mask: Tensor
    """Binary cross-entropy per pixel."""
    contrastive: Tensor
    """Eq. 4 per visual token, before its weight; 0 where nothing is curated."""
    no_target: Tensor
    """Binary cross-entropy per sentence of "names nothing", before its weight; 0 without a classifier."""


class MetrisLoss(nn.Module):
    """Sum of the losses; owns the learnable τ of Eq. 4, so its parameters are trained too.

    Args:
        contrastive_weight: Weight of Eq. 4, >= 0; the paper does not print it.
        temperature: Where τ starts, > 0; the paper does not print it.
        no_target_weight: Weight of the no-target classifier's loss, >= 0; ReLA's is 0.1.
    """

    def __init__(
        self,
        *,
        contrastive_weight: float,
        temperature: float,
        no_target_weight: float = 0.1,
    ) -> None:
        super().__init__()
        self.contrastive_weight = contrastive_weight
        self.no_target_weight = no_target_weight
        self.contrastive = PixelContrastiveLoss(temperature=temperature)

    def forward(
        self,
        output: MetrisOutput,
        target: Tensor,
        no_target: Tensor | None = None,
    ) -> Losses:
        """Compare.

        Args:
            output: Of the model.
            target: (b, h, w) in [0, 1].
            no_target: (b) bool; True = nothing in the image is meant. None: where ``target`` is empty.
        """
        mask = F.binary_cross_entropy_with_logits(output.logits.float(), target)
        contrastive, absence = self._contrastive(output, target), mask.new_zeros(())
        if output.no_target is not None:
            absent = target.flatten(1).amax(dim=1) == 0 if no_target is None else no_target
            absence = F.binary_cross_entropy_with_logits(output.no_target.float(), absent.float())
        total = mask + self.contrastive_weight * contrastive + self.no_target_weight * absence
        return Losses(total, mask, contrastive, absence)

    def _contrastive(self, output: MetrisOutput, target: Tensor) -> Tensor:
        if output.scores is None:
            return target.new_zeros(())
        h, w = target.shape[1:]
        # Cells beyond the image, where the encoder pads it, hold nothing of the target.
        target = F.pad(target, (0, output.extent[1] - w, 0, output.extent[0] - h))
        return self.contrastive(output.scores[:, 0], target, grid=output.grid)
