"""What one sentence contributes to the scores, and the scores of any number of them; NumPy alone."""

from typing import Any, NamedTuple

import numpy as np

from reference_model.scoring.protocols import PROTOCOLS, Protocol

METRIS = PROTOCOLS["metris"]

UNIT = 2.0**-40
"""IoUs are summed as whole numbers of this unit, so that no order of summing changes the last digit."""

_FIXED = (
    *("count", "targets", "intersection", "union", "iou"),
    *("giou", "pooled_intersection", "pooled_union", "absent_found", "present_found"),
)


class Outcome(NamedTuple):
    """What came of one sentence."""

    intersection: int
    """Pixels that the answer and the truth share."""
    union: int
    """Pixels in either; a mask that the no-target classifier withdrew has none."""
    iou: float
    """Their ratio by the protocol, 0 to 1."""
    truth_area: int
    """Pixels of the true mask."""
    target: bool
    """Whether the sentence refers to something."""
    answered: bool
    """Whether something was predicted; see `Protocol.empty_by`."""
    pooled_union: int
    """What the union of cIoU takes in."""

    @property
    def giou(self) -> float:
        """The IoU that gIoU takes in: 1 for right silence."""
        if self.target != self.answered:
            return 0.0
        return self.iou if self.target else 1.0


def outcome(
    prediction: np.ndarray,
    truth: np.ndarray,
    protocol: Protocol = METRIS,
    *,
    target: bool | None = None,
    withdrawn: bool | None = None,
) -> Outcome:
    """Compare a predicted mask with the true one.

    The last two columns are ReLA's table; P is the prediction, G the truth.

    ======== ========== ========= ================= ==================
    target   answered   gIoU      cIoU intersection cIoU union
    ======== ========== ========= ================= ==================
    no       no         1         0                 0
    no       yes        0         0                 P ∪ G, which is P
    yes      no         0         0                 G; by classifier P ∪ G
    yes      yes        IoU       P ∩ G             P ∪ G
    ======== ========== ========= ================= ==================

    Args:
        prediction: (h, w) bool, True inside the predicted object, before any withdrawal.
        truth: (h, w) bool, True inside the object.
        protocol: What counts as IoU, and as empty.
        target: Whether the sentence refers to something. None: whether the truth has a pixel.
        withdrawn: Whether the model's no-target classifier says that nothing is meant, so that its answer is
            an empty mask. None: there is no such classifier.

    Raises:
        ValueError: The shapes differ or are not (h, w).
        TypeError: A mask is not bool.
    """
    prediction, truth = np.asarray(prediction), np.asarray(truth)
    if prediction.shape != truth.shape or truth.ndim != 2:
        raise ValueError(
            f"outcome: prediction has shape {prediction.shape}, truth has {truth.shape}, "
            "expected one (h, w) for both"
        )
    for name, mask in (("prediction", prediction), ("truth", truth)):
        if mask.dtype != bool:
            raise TypeError(f"outcome: {name} must be bool, got {mask.dtype}")
    truth_area = int(np.count_nonzero(truth))
    shared = int(np.count_nonzero(prediction & truth))
    whole = int(np.count_nonzero(prediction)) + truth_area - shared
    intersection, union = (0, truth_area) if withdrawn else (shared, whole)
    if protocol.empty_by == "classifier" and withdrawn is not None:
        answered, pooled = not withdrawn, whole
    else:
        answered, pooled = union - truth_area + intersection > 0, union
    target = truth_area > 0 if target is None else target
    return Outcome(
        intersection,
        union,
        iou=intersection / (union + protocol.epsilon) if union else protocol.empty_iou,
        truth_area=truth_area,
        target=target,
        answered=answered,
        pooled_union=pooled if target or answered else 0,
    )


def tally(found: Outcome, protocol: Protocol = METRIS) -> np.ndarray:
    """Turn an outcome into what is summed over sentences: (k) int64, read by `scores` alone."""
    hit = found.iou.__ge__ if protocol.inclusive else found.iou.__gt__
    both = found.target and found.answered
    return np.array(
        [
            1,
            found.target,
            found.intersection,
            found.union,
            round(found.iou / UNIT),
            round(found.giou / UNIT),
            both * found.intersection,
            found.pooled_union,
            not (found.target or found.answered),
            both,
            *(found.target and hit(precision) for precision in protocol.precisions),
        ],
        dtype=np.int64,
    )


def tally_length(protocol: Protocol = METRIS) -> int:
    """Give k of `tally`."""
    return len(_FIXED) + len(protocol.precisions)


def scores(
    tallies: np.ndarray, protocol: Protocol = METRIS, *, no_target: bool | None = None
) -> dict[str, Any]:
    """Compute the scores of summed tallies, as fractions 0 to 1.

    oIoU = Σ intersection / Σ union; mIoU = mean IoU; P@X = share of the sentences with a target whose IoU
    reaches X. With sentences that refer to nothing also gIoU and cIoU, their likes under gRefCOCO's rules
    (see `outcome`); N-acc = share of the sentences without target that are not answered; T-acc = share of
    the others that are. A share of nothing is 0. In mIoU a sentence without target counts 0 even where the
    model is rightly silent; DMMI's code for Ref-ZOM leaves such sentences out of mIoU and oIoU instead.

    Args:
        tallies: (..., k) sums; whole numbers, in float64 too.
        protocol: The one of `tally`.
        no_target: Give gIoU, cIoU, N-acc and T-acc. None: where some sentence has no target.

    Returns:
        Each score, and ``count``, the number of sentences: floats and an int, or arrays (...) of both.
    """
    of = dict(zip(_FIXED, np.moveaxis(np.asarray(tallies), -1, 0)))
    hits = np.moveaxis(np.asarray(tallies), -1, 0)[len(_FIXED) :]
    found = {"oIoU": _share(of["intersection"], of["union"]), "mIoU": _share(of["iou"] * UNIT, of["count"])}
    for precision, hit in zip(protocol.precisions, hits, strict=True):
        found[f"P@{precision}"] = _share(hit, of["targets"])
    absent = of["count"] - of["targets"]
    if no_target or (no_target is None and np.any(absent)):
        found["gIoU"] = _share(of["giou"] * UNIT, of["count"])
        found["cIoU"] = _share(of["pooled_intersection"], of["pooled_union"])
        found["N-acc"] = _share(of["absent_found"], absent)
        found["T-acc"] = _share(of["present_found"], of["targets"])
    found["count"] = of["count"]
    return {name: value.item() if value.ndim == 0 else value for name, value in found.items()}


def _share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.divide(part, whole, out=np.zeros(np.shape(whole)), where=np.asarray(whole) > 0)
