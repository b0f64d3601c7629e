"""The one record type of all readers: one sentence about one image, with what it refers to there."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from reference_model.data.plain import shown
from reference_model.files import InputError

LONGEST_SIDE = 20_000


@dataclass(frozen=True, slots=True)
class Record:
    """One referring expression with what it refers to."""

    image: Path
    """Image file."""

    height: int
    """Height of the image, pixels."""

    width: int
    """Width of the image, pixels."""

    expression: str
    """The sentence."""

    segmentation: list[list[float]] | dict[str, Any] = field(repr=False, hash=False)
    """All it refers to: COCO polygons ``[[x0, y0, x1, y1, ...], ...]`` in pixels, or any RLE dict."""

    split: str
    """train, val, testA, testB or test."""

    ref_id: int
    """The object with all of its sentences."""

    ann_id: int | tuple[int, ...]
    """The annotation in ``instances.json``; in gRefCOCO any number of them, () where there is no target."""

    image_id: int
    """The image in ``instances.json``."""

    sent_id: int
    """The sentence."""

    category_id: int | tuple[int, ...]
    """COCO category of the object, 1 to 90; in gRefCOCO those of the objects."""

    @property
    def no_target(self) -> bool:
        """Whether the sentence refers to nothing in the image, so that its mask is empty."""
        return self.ann_id == ()

    def mask(self) -> np.ndarray:
        """(height, width) bool, True inside what it refers to; see :func:`segmentation_mask`."""
        owner = f"{self.image}: annotation {self.ann_id}"
        return segmentation_mask(self.segmentation, self.height, self.width, owner=owner)


def segmentation_mask(segmentation: Any, height: int, width: int, *, owner: str) -> np.ndarray:
    """Fill a COCO segmentation: the union of its polygons, or its run lengths.

    Polygons are filled by pycocotools, whose choice of border pixels the published numbers rest on.

    Args:
        segmentation: COCO polygons, or RLE with ``counts`` as integers or as COCO's compressed text.
        height: Image height, pixels.
        width: Image width, pixels.
        owner: What the error message begins with.

    Returns:
        (height, width) bool. A polygon outside of the image adds nothing.

    Raises:
        InputError: The segmentation is malformed.
    """
    defect = segmentation_defect(segmentation, height, width)
    if defect is not None:
        raise InputError(f"{owner}: {defect}; mend that annotation")
    if isinstance(segmentation, list):
        segmentation = coco_mask.merge(coco_mask.frPyObjects(segmentation, height, width))
    counts = _run_lengths(segmentation["counts"])
    # COCO counts down the columns and begins with background.
    return np.repeat(np.arange(len(counts)) % 2 == 1, counts).reshape(width, height).T.copy()


def segmentation_defect(segmentation: Any, height: int, width: int) -> str | None:
    """Say what is wrong with a segmentation, or None. pycocotools itself reads beyond its memory."""
    if not (
        type(height) is type(width) is int and 1 <= min(height, width) <= max(height, width) <= LONGEST_SIDE
    ):
        size = f"height {shown(height)} and width {shown(width)}"
        return f"the image has {size}, expected whole numbers from 1 to {LONGEST_SIDE}"
    if isinstance(segmentation, dict):
        return _runs_defect(segmentation, height, width)
    if not isinstance(segmentation, list):
        return f"segmentation is {shown(segmentation)}, expected a list of polygons or an RLE dict"
    if not segmentation:
        return "segmentation has no polygon"
    side = max(height, width)
    for index, polygon in enumerate(segmentation):
        if not isinstance(polygon, list) or not {type(number) for number in polygon} <= {int, float}:
            return f"polygon {index} is {shown(polygon)}, expected a list of numbers"
        if len(polygon) < 6 or len(polygon) % 2:
            return f"polygon {index} has {len(polygon)} numbers, expected an even count from 6 on"
        if not all(-side <= number <= 2 * side for number in polygon):
            return f"polygon {index} leaves its {height} x {width} image by more than a side (or holds NaN)"
    return None


def _runs_defect(segmentation: dict[str, Any], height: int, width: int) -> str | None:
    size, counts = segmentation.get("size"), segmentation.get("counts")
    if not isinstance(size, list | tuple) or list(size) != [height, width]:
        return f"RLE has size {shown(size)}, but the image has [{height}, {width}]"
    if not isinstance(counts, str | bytes | list):
        return f"RLE has counts {shown(counts)}, expected text or a list of whole numbers"
    if isinstance(counts, list) and not all(type(count) is int and count >= 0 for count in counts):
        return f"RLE has counts {shown(counts)}, expected whole numbers from 0 on"
    try:
        runs = _run_lengths(counts)
    except ValueError:
        return f"RLE has counts {shown(counts)}, which is not COCO's compressed text"
    if min(runs, default=0) < 0 or sum(runs) != height * width:
        return (
            f"RLE covers {shown(sum(runs))} pixels, but the image has {height} x {width} = {height * width}"
        )
    return None


def _run_lengths(counts: str | bytes | list[int]) -> list[int]:
    """Undo COCO's text form: 5 bits a character, lowest first, bit 5 = more follow; from the fourth run on
    differences to the run before the last."""
    if isinstance(counts, list):
        return counts
    runs: list[int] = []
    value = shift = 0
    for byte in counts.encode("ascii") if isinstance(counts, str) else counts:
        bits = byte - 48
        if not 0 <= bits < 64 or shift > 60:
            raise ValueError("not compressed run lengths")
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        runs.append(value + runs[-2] if len(runs) > 2 else value)
        value = shift = 0
    if shift:
        raise ValueError("compressed run lengths end in the middle of a number")
    return runs
