"""The precision-recall curve of all pixels (METRIS Fig. 5) and the area under it, from a histogram."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric

BINS = 1001
"""Thresholds are 0, 0.001, ... 1."""


class Curve(NamedTuple):
    """Precision and recall at each threshold."""

    thresholds: np.ndarray
    """(1001) float64, rising from 0 to 1; a pixel is predicted where its probability reaches it."""
    precision: np.ndarray
    """(1001) float64: share of the predicted pixels that are true; 1 where none is predicted."""
    recall: np.ndarray
    """(1001) float64: share of the true pixels that are predicted, falling; 0 where none is true."""

    @property
    def area(self) -> float:
        """AUC-PR as average precision: Σ precision · step of recall, no line drawn between thresholds.

        A line from point to point would promise precisions that no threshold reaches.
        """
        return float(-np.sum(np.diff(self.recall, append=0.0) * self.precision))


class PrecisionRecall(Metric):
    """Accumulate the curve over the pixels of all sentences, pooled: a large image weighs more.

    Probabilities are those of the mask at the protocol's size; a no-target classifier plays no part. They are
    cut to steps of 1/1000, so that the state is two histograms and a sentence costs about a millisecond.
    """

    histogram: Tensor
    masks: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("histogram", torch.zeros(2, BINS, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("masks", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, probability: np.ndarray | None, truth: np.ndarray) -> None:
        """Add one sentence.

        Args:
            probability: (h, w) float32, 0 to 1. None: the answer was a mask, which has no curve.
            truth: (h, w) bool, True inside the object.

        Raises:
            ValueError: The shapes differ, or a probability is outside of 0 to 1 or NaN.
        """
        if probability is None:
            self.masks += 1
        else:
            self.histogram += torch.from_numpy(histogram(probability, truth)).to(self.histogram.device)

    def compute(self) -> Curve | None:
        """Return the curve; None where a sentence was answered by a mask, or there was none."""
        if self.masks or not self.histogram.any():
            return None
        counts = self.histogram.cpu().numpy()
        background, inside = np.cumsum(counts[:, ::-1], axis=1)[:, ::-1]
        predicted = background + inside
        precision = np.divide(inside, predicted, out=np.ones(BINS), where=predicted > 0)
        recall = inside / max(inside[0], 1)
        return Curve(np.arange(BINS) / (BINS - 1), precision, recall)


def histogram(probability: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Count the pixels of each step of probability: (2, 1001) int64, background and inside.

    Raises:
        ValueError: As `PrecisionRecall.update`.
    """
    if probability.shape != truth.shape:
        raise ValueError(
            f"histogram: probability has shape {probability.shape}, truth has {truth.shape}, "
            "expected one (h, w)"
        )
    low, high = probability.min(), probability.max()
    if not (low >= 0 and high <= 1):  # NaN fails both
        raise ValueError(f"histogram: probability must be in [0, 1], got {low:g} to {high:g}")
    step = (probability * np.float32(BINS - 1)).astype(np.uint16)
    step += truth * np.uint16(BINS)
    return np.bincount(step.ravel(), minlength=2 * BINS).reshape(2, BINS)
