"""Model and loss as one module: what is wrapped, sharded or compiled, and called once a micro-batch."""

from collections.abc import Sequence

from torch import Tensor, nn

from reference_model.model.loss import Losses, MetrisLoss
from reference_model.model.metris import METRIS


class Objective(nn.Module):
    """From a batch to its losses.

    Args:
        model: METRIS.
        loss: Owns τ, so it is trained too.
        frozen: Parts of the model that stay as they are: no gradient, no dropout, no batch statistics.
    """

    def __init__(self, model: METRIS, loss: MetrisLoss, *, frozen: Sequence[nn.Module] = ()) -> None:
        super().__init__()
        self.model = model
        self.loss = loss
        self.frozen = tuple(frozen)  # a tuple is no submodule: their weights keep one name
        for part in self.frozen:
            part.requires_grad_(False)
        # Where nothing is curated, no gradient reaches τ, and whoever averages gradients would wait for it.
        if model.guidance.extractor is None:
            loss.contrastive.requires_grad_(False)

    def train(self, mode: bool = True) -> "Objective":
        """Switch to training, all but the frozen parts."""
        super().train(mode)
        for part in self.frozen:
            part.eval()
        return self

    def forward(
        self,
        images: Tensor,
        image_index: Tensor,
        token_ids: Tensor,
        language_mask: Tensor,
        masks: Tensor,
        no_target: Tensor,
    ) -> Losses:
        """Compare what the model finds with the masks; arguments as in `Batch` and `MetrisLoss`."""
        output = self.model(images, token_ids, language_mask, image_index)
        return self.loss(output, masks, no_target)
