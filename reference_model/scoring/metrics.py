"""How well predicted masks cover the true ones: oIoU, mIoU and P@X."""

import numpy as np

THRESHOLDS = (0.5, 0.7, 0.9)


class SegmentationMetrics:
    """Accumulate the metrics of RefCOCO over expressions, each at its image's own size.

    oIoU = Σ intersection / Σ union; mIoU = mean of the IoU of each expression; P@X = share of expressions
    with IoU >= X (LAVT and ReLA count equality, CGFormer and CRIS do not). A pair that is empty on both
    sides has IoU 0 (LAVT) and adds nothing to oIoU. Sums are integers and float64.
    """

    def __init__(self) -> None:
        self.count = 0
        self.intersection = 0
        self.union = 0
        self.iou_sum = 0.0
        self.hits = dict.fromkeys(THRESHOLDS, 0)

    def update(self, prediction: np.ndarray, truth: np.ndarray) -> float:
        """Add one expression.

        Args:
            prediction: (h, w) bool, True inside the predicted object.
            truth: (h, w) bool, True inside the object.

        Returns:
            IoU of this expression, 0 to 1.

        Raises:
            ValueError: The shapes differ or are not (h, w).
            TypeError: A mask is not bool.
        """
        prediction, truth = np.asarray(prediction), np.asarray(truth)
        if prediction.shape != truth.shape or truth.ndim != 2:
            raise ValueError(
                f"SegmentationMetrics: prediction has shape {prediction.shape}, truth has {truth.shape}, "
                "expected one (h, w) for both, the image's own size"
            )
        for name, mask in (("prediction", prediction), ("truth", truth)):
            if mask.dtype != bool:
                raise TypeError(f"SegmentationMetrics: {name} must be bool, got {mask.dtype}")
        intersection = int(np.count_nonzero(prediction & truth))
        union = int(np.count_nonzero(prediction | truth))
        iou = intersection / union if union else 0.0
        self.count += 1
        self.intersection += intersection
        self.union += union
        self.iou_sum += iou
        for threshold in THRESHOLDS:
            self.hits[threshold] += iou >= threshold
        return iou

    def compute(self) -> dict[str, float]:
        """Return oIoU, mIoU and P@X as fractions 0 to 1, and ``count``, the number of expressions.

        Raises:
            ValueError: No expression was added.
        """
        if not self.count:
            raise ValueError("SegmentationMetrics: nothing to compute, no expression was added")
        return {
            "oIoU": self.intersection / self.union if self.union else 0.0,
            "mIoU": self.iou_sum / self.count,
            **{f"P@{threshold}": hits / self.count for threshold, hits in self.hits.items()},
            "count": self.count,
        }
