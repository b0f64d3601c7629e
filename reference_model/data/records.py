"""The one record type of all readers: one sentence about one image, with what it refers to there."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from reference_model.data.images import Overlaps, open_mask
from reference_model.files import InputError, shown

LONGEST_SIDE = 20_000
MOST_PIXELS = 89_478_485  # Pillow's own limit
MOST_POINTS = 100_000
LONGEST_OUTLINE = 2_000_000  # pixels; pycocotools takes 80 bytes for each


@dataclass(frozen=True, slots=True)
class Record:
    """One referring expression with what it refers to."""

    image: Path | bytes = field(repr=False)
    """Image file, or the content of one."""

    height: int
    """Height of the image, pixels."""

    width: int
    """Width of the image, pixels."""

    expression: str
    """The sentence."""

    segmentation: list[list[float]] | dict[str, Any] | Path = field(repr=False, hash=False)
    """All it refers to: COCO polygons ``[[x0, y0, x1, y1, ...], ...]`` in pixels, any RLE dict, or a PNG
    file whose background is 0."""

    split: str
    """train, val, testA, testB or test."""

    ref_id: int
    """The object with all of its sentences."""

    ann_id: int | tuple[int, ...]
    """The annotation in ``instances.json``; in gRefCOCO any number of them, () where there is no target."""

    image_id: int
    """The image, the same wherever the data set names it again."""

    sent_id: int
    """The sentence."""

    category_id: int | tuple[int, ...]
    """COCO category of the object, 1 to 90, or 0 where it is not known; in gRefCOCO those of the objects."""

    raw: str | None = None
    """The sentence before it was cleaned, where the cleaned one is read and this form of it differs."""

    place: str | None = field(default=None, repr=False, compare=False)
    """What messages call the place that the content of an image came from, such as a sample of a shard."""

    @property
    def no_target(self) -> bool:
        """Whether the sentence refers to nothing in the image, so that its mask is empty."""
        return self.ann_id == ()

    @property
    def image_name(self) -> str:
        """What messages call the image: its file, or its place and number."""
        if isinstance(self.image, Path):
            return str(self.image)
        return f"{self.place}: image {self.image_id}" if self.place else f"image {self.image_id}"

    def mask(self, overlaps: Overlaps = "union") -> np.ndarray:
        """(height, width) bool, True inside what it refers to; see `segmentation_mask`, `open_mask`."""
        if isinstance(self.segmentation, Path):
            return open_mask(self.segmentation, self.height, self.width, overlaps)
        owner = f"{self.image_name}: annotation {self.ann_id}"
        return segmentation_mask(self.segmentation, self.height, self.width, owner=owner, overlaps=overlaps)


def segmentation_mask(
    segmentation: Any, height: int, width: int, *, owner: str, overlaps: Overlaps = "union"
) -> np.ndarray:
    """Fill a COCO segmentation: its polygons, or its run lengths.

    Polygons are filled by pycocotools, whose choice of border pixels the published numbers rest on.

    Args:
        segmentation: COCO polygons, or RLE with ``counts`` as integers or as COCO's compressed text.
        height: Image height, pixels.
        width: Image width, pixels.
        owner: What the error message begins with.
        overlaps: Pixels in several polygons are inside (``union``), or are background, as the code of LAVT,
            CGFormer and others has it (``exactly_one``). Run lengths have no overlaps.

    Returns:
        (height, width) bool. A polygon outside of the image adds nothing.

    Raises:
        InputError: The segmentation is malformed.
    """
    defect = segmentation_defect(segmentation, height, width)
    if defect is not None:
        raise InputError(f"{owner}: {defect}; mend that annotation")
    found = coco_mask.frPyObjects(segmentation, height, width) if isinstance(segmentation, list) else None
    runs = [_run_lengths(part["counts"]) for part in found or [segmentation]]
    if len(runs) == 1:
        flat = np.repeat(np.arange(len(runs[0])) % 2 == 1, runs[0])
    else:
        at, depth = _depths(runs)
        inside = depth == 1 if overlaps == "exactly_one" else depth > 0
        flat = np.repeat(np.append(False, inside), np.diff(at, prepend=0, append=height * width))
    return flat.reshape(width, height).T.copy()  # COCO counts down the columns


def segmentation_union(segmentations: list[Any], height: int, width: int) -> Any:
    """Make one segmentation of several sound ones: polygons as they are, else all as run lengths."""
    if len(segmentations) == 1:
        return segmentations[0]
    if all(isinstance(segmentation, list) for segmentation in segmentations):
        return [polygon for segmentation in segmentations for polygon in segmentation]
    parts: list[Any] = []
    for found in segmentations:
        if isinstance(found, dict):
            counts = _run_lengths(found["counts"])
            parts.append(coco_mask.frPyObjects({"size": [height, width], "counts": counts}, height, width))
        else:
            parts += coco_mask.frPyObjects(found, height, width)
    return coco_mask.merge(parts)


def _depths(runs: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Overlay several run lengths, each of which begins with background.

    Returns:
        (e,) pixels where a run ends, in order, and (e,) how many hold the pixels from there to the next one.
    """
    edges = [np.cumsum(lengths) for lengths in runs]
    at = np.concatenate(edges)
    steps = np.concatenate([np.where(np.arange(len(part)) % 2, -1, 1) for part in edges])
    order = at.argsort()
    return at[order], np.cumsum(steps[order])


def segmentation_defect(segmentation: Any, height: int, width: int) -> str | None:
    """Say what is wrong with a segmentation, or None. pycocotools itself reads beyond its memory."""
    whole = type(height) is type(width) is int
    if not (whole and 1 <= min(height, width) <= max(height, width) <= LONGEST_SIDE):
        size = f"height {shown(height)} and width {shown(width)}"
        return f"the image has {size}, expected whole numbers from 1 to {LONGEST_SIDE}"
    if height * width > MOST_PIXELS:
        return f"the image has {height} x {width} pixels, more than the {MOST_PIXELS} that are read"
    if isinstance(segmentation, dict):
        return _runs_defect(segmentation, height, width)
    if not isinstance(segmentation, list):
        return f"segmentation is {shown(segmentation)}, expected a list of polygons or an RLE dict"
    if not segmentation:
        return "segmentation has no polygon"
    side, points = max(height, width), 0
    for index, polygon in enumerate(segmentation):
        if not isinstance(polygon, list) or not {type(number) for number in polygon} <= {int, float}:
            return f"polygon {index} is {shown(polygon)}, expected a list of numbers"
        if len(polygon) < 6 or len(polygon) % 2:
            return f"polygon {index} has {len(polygon)} numbers, expected an even count from 6 on"
        points += len(polygon) // 2
        if points > MOST_POINTS:
            return f"its polygons have more than {MOST_POINTS} points"
        if not all(-side <= number <= 2 * side for number in polygon):
            return f"polygon {index} leaves its {height} x {width} image by more than a side (or holds NaN)"
    if points * 3 * side > LONGEST_OUTLINE and (length := sum(map(_outline, segmentation))) > LONGEST_OUTLINE:
        return f"its polygons are {length:.0f} pixels long, expected at most {LONGEST_OUTLINE}"
    return None


def _outline(polygon: list[float]) -> float:
    """Steps of one pixel along a polygon, pixels."""
    corners = np.asarray(polygon, dtype=float).reshape(-1, 2)
    return float(np.abs(corners - np.roll(corners, 1, axis=0)).max(axis=1).sum())


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
