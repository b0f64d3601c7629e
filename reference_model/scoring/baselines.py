"""What a score is worth: predictions that never read the sentence."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from reference_model.data.reader import Reader
from reference_model.data.records import Record, segmentation_mask
from reference_model.data.transforms import resize_mask
from reference_model.scoring.evaluator import ImageGroups, Scores, truth_of
from reference_model.scoring.metrics import SegmentationMetrics
from reference_model.scoring.protocols import Protocol

MOST_MASKS = 2000


def evenly(records: Iterable[Record], count: int) -> list[Record]:
    """Pick at most ``MOST_MASKS`` of ``count`` records, evenly spaced; the others are not kept."""
    picked = set(np.linspace(0, count - 1, min(count, MOST_MASKS)).round().astype(int).tolist())
    return [record for index, record in enumerate(records) if index in picked]


def mean_mask_baseline(train_records: Sequence[Record], size: int) -> np.ndarray:
    """Find the one mask that fits all training masks best.

    It holds the pixels where the mean training mask is at least t, with the t of highest mIoU on the
    training masks. Bring it to the size of each image with ``resize_mask`` to score it.

    Args:
        train_records: Records of the training split, or of them what `evenly` picks.
        size: Side of the square grid, pixels.

    Returns:
        (size, size) bool.

    Raises:
        ValueError: There are no records.
    """
    if not train_records:
        raise ValueError("mean_mask_baseline: train_records is empty")
    # 8 pixels a byte: 2000 masks of 480 x 480 take 58 MB.
    masks = [np.packbits(resize_mask(record.mask(), size, size)) for record in train_records]
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


def largest_object(annotations: Sequence[dict[str, Any]], height: int, width: int) -> np.ndarray:
    """Take the object of an image that covers most pixels; crowds (``iscrowd``) are not one object.

    Args:
        annotations: COCO annotations of the image, from ``Refer.annotations``.
        height: Image height, pixels.
        width: Image width, pixels.

    Returns:
        (height, width) bool; all False where the image has no object.

    Raises:
        InputError: A segmentation is malformed.
    """
    masks = [
        segmentation_mask(
            annotation.get("segmentation"), height, width, owner=f"annotation {annotation.get('id')}"
        )
        for annotation in annotations
        if not annotation.get("iscrowd")
    ]
    return max(masks, key=np.count_nonzero, default=np.zeros((height, width), dtype=bool))


def score_baselines(
    reader: Reader, records: Iterable[Record], mean_mask: np.ndarray, protocol: Protocol
) -> dict[str, Scores]:
    """Score the mean training mask and, where objects are annotated, the largest of the image."""
    by_mean, by_size = SegmentationMetrics(protocol), SegmentationMetrics(protocol)
    annotated = False
    for record in (record for group in ImageGroups(records, protocol) for record in group):
        truth, annotations = truth_of(record, protocol), reader.annotations(record.image_id)
        annotated |= bool(annotations)
        largest = largest_object(annotations, record.height, record.width)
        for metrics, guess in ((by_mean, mean_mask), (by_size, largest)):
            here = guess if guess.shape == truth.shape else resize_mask(guess, *truth.shape)
            metrics.update(here, truth, target=not record.no_target)
    found = {"mean training mask": by_mean.compute()}
    return found | {"largest object": by_size.compute()} if annotated else found
