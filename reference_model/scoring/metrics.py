"""The scores as a torchmetrics metric: sums of whole numbers, the same on one process and on many."""

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric

from reference_model.scoring.outcome import METRIS, Outcome, outcome, scores, tally, tally_length
from reference_model.scoring.protocols import Protocol


class SegmentationMetrics(Metric):
    """Accumulate oIoU, mIoU, P@X and, with sentences that refer to nothing, gIoU, cIoU, N-acc and T-acc.

    What they are is said in `outcome.scores`. Where torch.distributed runs, ``compute`` adds up the
    processes; each sentence must have gone to one of them.

    Args:
        protocol: How masks are compared.
    """

    tallies: Tensor
    latest: Outcome | None
    """Of the last update."""

    def __init__(self, protocol: Protocol = METRIS) -> None:
        super().__init__()
        self.protocol = protocol
        self.latest = None
        empty = torch.zeros(tally_length(protocol), dtype=torch.int64)
        self.add_state("tallies", empty, dist_reduce_fx="sum")

    def update(
        self,
        prediction: np.ndarray,
        truth: np.ndarray,
        *,
        target: bool | None = None,
        withdrawn: bool | None = None,
    ) -> None:
        """Add one sentence; arguments and errors are those of `outcome`."""
        self.latest = outcome(prediction, truth, self.protocol, target=target, withdrawn=withdrawn)
        self.tallies += torch.from_numpy(tally(self.latest, self.protocol)).to(self.tallies.device)

    def compute(self) -> dict[str, float]:
        """Return the scores as fractions 0 to 1, and ``count``, the number of sentences.

        Raises:
            ValueError: No sentence was added.
        """
        if not self.tallies[0]:
            raise ValueError("SegmentationMetrics: nothing to compute, no sentence was added")
        return scores(self.tallies.cpu().numpy(), self.protocol)
