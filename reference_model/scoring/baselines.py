"""What a score is worth: predictions that never read the sentence."""

import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from reference_model.data.readers.reader import OnError, Reader
from reference_model.data.records import Record, segmentation_mask
from reference_model.data.transforms import resize_mask
from reference_model.files import InputError
from reference_model.processes import anywhere
from reference_model.scoring.evaluator import Scored, Scores, computed
from reference_model.scoring.metrics import SegmentationMetrics
from reference_model.scoring.protocols import Protocol

MOST_MASKS = 2000


def evenly(records: Iterable[Record], count: int) -> list[Record]:
    """Pick at most ``MOST_MASKS`` of ``count`` records, evenly spaced; the others are not kept."""
    picked = set(np.linspace(0, count - 1, min(count, MOST_MASKS)).round().astype(int).tolist())
    return [record for index, record in enumerate(records) if index in picked]


def mean_mask_baseline(
    train_records: Sequence[Record], size: int, *, on_error: OnError = "stop"
) -> np.ndarray:
    """Find the one mask that fits all training masks best.

    It holds the pixels where the mean training mask is at least t, with the t of highest mIoU on the
    training masks. Bring it to the size of each image with ``resize_mask`` to score it.

    Args:
        train_records: Records of the training split, or of them what `evenly` picks.
        size: Side of the square grid, pixels.
        on_error: What a mask that cannot be read does: ``stop``, or be left out with a warning (``skip``).

    Returns:
        (size, size) bool.

    Raises:
        InputError: A mask cannot be read, or under ``skip`` none can.
        ValueError: There are no records.
    """
    if not train_records:
        raise ValueError("mean_mask_baseline: train_records is empty")
    # 8 pixels a byte: 2000 masks of 480 x 480 take 58 MB.
    masks, first = [], None
    for record in train_records:
        try:
            masks.append(np.packbits(resize_mask(record.mask(), size, size)))
        except InputError as error:
            if on_error == "stop":
                raise
            first = first or error
    if first is not None:
        warnings.warn(f"{first}; left out of the mean training mask", stacklevel=2)
        if not masks:
            raise first
    unpacked = lambda mask: np.unpackbits(mask, count=size * size)
    total = np.zeros(size * size, dtype=np.int64)
    for mask in masks:
        total += unpacked(mask)
    # Highest mean first: then each threshold is a prefix, and one running sum gives all intersections.
    order = np.argsort(-total, kind="stable")
    taken = np.arange(1, size * size + 1)
    iou_sum = np.zeros(size * size)
    for mask in masks:
        intersection = np.cumsum(unpacked(mask)[order], dtype=np.int64)
        iou_sum += intersection / (taken + intersection[-1] - intersection)
    # A threshold cannot part pixels of equal mean: only the last of each level counts.
    level = total[order]
    iou_sum[:-1][level[:-1] == level[1:]] = -1
    return (total >= level[np.argmax(iou_sum)]).reshape(size, size)


def largest_object(
    annotations: Sequence[dict[str, Any]], height: int, width: int, *, on_error: OnError = "stop"
) -> np.ndarray:
    """Take the object of an image that covers most pixels; crowds (``iscrowd``) are not one object.

    Args:
        annotations: COCO annotations of the image, from ``Refer.annotations``.
        height: Image height, pixels.
        width: Image width, pixels.
        on_error: What a malformed annotation does: ``stop``, or be left out with a warning (``skip``).

    Returns:
        (height, width) bool; all False where the image has no object.

    Raises:
        InputError: A segmentation is malformed.
    """
    largest, most = np.zeros((height, width), dtype=bool), 0
    for annotation in annotations:
        if annotation.get("iscrowd"):
            continue
        owner = f"annotation {annotation.get('id')}"
        try:
            mask = segmentation_mask(annotation.get("segmentation"), height, width, owner=owner)
        except InputError as error:
            if on_error == "stop":
                raise
            warnings.warn(f"{error}; left out of the largest objects", stacklevel=2)
            continue
        if (area := np.count_nonzero(mask)) > most:
            largest, most = mask, area
    return largest


class Baselines:
    """Scores of the mean training mask and, where objects are annotated, of the largest of each image.

    Args:
        reader: Knows the annotations.
        mean_mask: (h, w) bool, of `mean_mask_baseline`.
        protocol: How masks are compared.
    """

    def __init__(self, reader: Reader, mean_mask: np.ndarray, protocol: Protocol) -> None:
        self.reader, self.mean_mask = reader, mean_mask
        self._by_mean, self._by_size = SegmentationMetrics(protocol), SegmentationMetrics(protocol)
        self._annotated = False
        self._image: int | None = None

    def add(self, scored: Scored) -> None:
        """Add a sentence that the model was scored on, so that all stand on the same ones."""
        record, truth = scored.record, scored.truth
        if record.image_id != self._image:  # sentences of an image come together
            self._image, annotations = record.image_id, self.reader.annotations(record.image_id)
            self._annotated |= bool(annotations)
            self._largest = largest_object(
                annotations, record.height, record.width, on_error=self.reader.on_error
            )
        for metrics, guess in ((self._by_mean, self.mean_mask), (self._by_size, self._largest)):
            here = guess if guess.shape == truth.shape else resize_mask(guess, *truth.shape)
            metrics.update(here, truth, target=not record.no_target)

    def scores(self) -> dict[str, Scores]:
        """Give the scores of each."""
        found = {"mean training mask": computed(self._by_mean)}
        return found | {"largest object": computed(self._by_size)} if anywhere(self._annotated) else found
