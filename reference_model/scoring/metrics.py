"""How well predicted masks cover the true ones: oIoU, mIoU, P@X, and gRefCOCO's gIoU, cIoU, N-acc, T-acc."""

import numpy as np
import torch
import torch.distributed as dist

THRESHOLDS = (0.5, 0.7, 0.9)


class SegmentationMetrics:
    """Accumulate the metrics of RefCOCO over expressions, each at its image's own size.

    oIoU = Σ intersection / Σ union; mIoU = mean of the IoU of each expression; P@X = share of expressions
    with IoU >= X (LAVT and ReLA count equality, CGFormer and CRIS do not). A pair that is empty on both
    sides has IoU 0 (LAVT) and adds nothing to oIoU. Sums are integers and float64.

    With ``no_target``, for sets with sentences that refer to nothing, gRefCOCO's too. gIoU = mean IoU where a
    pair that is empty on both sides counts 1, and cIoU = oIoU, whose union takes in whatever is predicted
    where nothing is. N-acc = share of the empty truths that are predicted empty, T-acc = share of the others
    that are not; 0 where there is none to share. Empty means without one pixel, whoever emptied it. ReLA
    scores at 480 x 480 instead, calls empty what its classifier calls so, and keeps in cIoU's union the mask
    that this withdrew, so its cIoU is no higher.

    Args:
        no_target: Compute gIoU, cIoU, N-acc and T-acc.
    """

    def __init__(self, *, no_target: bool = False) -> None:
        self.no_target = no_target
        self.count = 0
        self.intersection = 0
        self.union = 0
        self.iou_sum = 0.0
        self.hits = dict.fromkeys(THRESHOLDS, 0)
        self.absent = self.absent_found = self.present_found = 0

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
        absent, found = not truth.any(), bool(prediction.any())
        self.absent += absent
        self.absent_found += absent and not found
        self.present_found += found and not absent
        self.count += 1
        self.intersection += intersection
        self.union += union
        self.iou_sum += iou
        for threshold in THRESHOLDS:
            self.hits[threshold] += iou >= threshold
        return iou

    def compute(self) -> dict[str, float]:
        """Return the metrics as fractions 0 to 1, and ``count``, the number of expressions.

        Where torch.distributed runs, the sums of all processes count, and all of them must ask.

        Raises:
            ValueError: No expression was added.
        """
        if dist.is_initialized():
            self._add_up()
        if not self.count:
            raise ValueError("SegmentationMetrics: nothing to compute, no expression was added")
        scores = {
            "oIoU": self.intersection / self.union if self.union else 0.0,
            "mIoU": self.iou_sum / self.count,
            **{f"P@{threshold}": hits / self.count for threshold, hits in self.hits.items()},
            "count": self.count,
        }
        if self.no_target:
            present = self.count - self.absent
            scores["gIoU"] = (self.iou_sum + self.absent_found) / self.count
            scores["cIoU"] = scores["oIoU"]
            scores["N-acc"] = self.absent_found / self.absent if self.absent else 0.0
            scores["T-acc"] = self.present_found / present if present else 0.0
        return scores

    def _add_up(self) -> None:
        names = ("no_target", "count", "intersection", "union", "iou_sum", "absent", "absent_found")
        names += ("present_found",)
        sums = [float(getattr(self, name)) for name in names] + [float(x) for x in self.hits.values()]
        total = torch.tensor(sums, dtype=torch.float64)
        dist.all_reduce(total)
        for name, value in zip(names, total.tolist()):
            setattr(self, name, type(getattr(self, name))(value))
        self.hits = dict(zip(self.hits, (int(x) for x in total[len(names) :].tolist())))
