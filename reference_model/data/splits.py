"""Seen and unseen classes: the open-vocabulary setting of RIS (CGFormer, METRIS), by lists of categories."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from reference_model.data.untrusted import note_beside, plain_list, read_plain_json
from reference_model.files import InputError, shown

SEEN = (
    1, 2, 3, 4, 7, 8, 9, 15, 16, 19, 20, 23, 24, 25, 27, 31, 33, 34, 35, 38, 42, 44, 48, 50, 51, 52, 53, 54,
    55, 56, 57, 59, 60, 62, 65, 70, 72, 73, 74, 75, 78, 79, 80, 82, 84, 85, 86, 90
)  # fmt: skip
"""The 48 COCO classes that a model may train on (Zareian et al. 2021; Detic, ``coco_zeroshot.py``)."""

UNSEEN = {
    5: "airplane", 6: "bus", 17: "cat", 18: "dog", 21: "cow", 22: "elephant", 28: "umbrella", 32: "tie",
    36: "snowboard", 41: "skateboard", 47: "cup", 49: "knife", 61: "cake", 63: "couch", 76: "keyboard",
    81: "sink", 87: "scissors"
}  # fmt: skip
"""The 17 held out, with COCO's names; the 15 in neither list are left out of every part."""

COCO = {
    1: "person", 2: "bicycle", 3: "car", 4: "motorcycle", 5: "airplane", 6: "bus", 7: "train", 8: "truck",
    9: "boat", 10: "traffic light", 11: "fire hydrant", 13: "stop sign", 14: "parking meter", 15: "bench",
    16: "bird", 17: "cat", 18: "dog", 19: "horse", 20: "sheep", 21: "cow", 22: "elephant", 23: "bear",
    24: "zebra", 25: "giraffe", 27: "backpack", 28: "umbrella", 31: "handbag", 32: "tie", 33: "suitcase",
    34: "frisbee", 35: "skis", 36: "snowboard", 37: "sports ball", 38: "kite", 39: "baseball bat",
    40: "baseball glove", 41: "skateboard", 42: "surfboard", 43: "tennis racket", 44: "bottle",
    46: "wine glass", 47: "cup", 48: "fork", 49: "knife", 50: "spoon", 51: "bowl", 52: "banana", 53: "apple",
    54: "sandwich", 55: "orange", 56: "broccoli", 57: "carrot", 58: "hot dog", 59: "pizza", 60: "donut",
    61: "cake", 62: "chair", 63: "couch", 64: "potted plant", 65: "bed", 67: "dining table", 70: "toilet",
    72: "tv", 73: "laptop", 74: "mouse", 75: "remote", 76: "keyboard", 77: "cell phone", 78: "microwave",
    79: "oven", 80: "toaster", 81: "sink", 82: "refrigerator", 84: "book", 85: "clock", 86: "vase",
    87: "scissors", 88: "teddy bear", 89: "hair drier", 90: "toothbrush"
}  # fmt: skip
"""COCO's 80 categories: id -> name."""

LISTS = "classes.json"
"""A file of this name beside the annotations, ``{"seen": [ids], "unseen": [ids]}``, replaces COCO's lists;
NAME.classes.json those of NAME.jsonl alone."""

CATEGORIES = "categories.json"
"""NAME.categories.json, ``{"id": name}``, holds the names of the categories of NAME.jsonl."""


class Part(NamedTuple):
    """A split restricted to seen or to unseen classes."""

    splits: tuple[str, ...]
    """The whole splits it is taken from."""
    seen: bool
    """Of seen classes, or of unseen ones."""


def part_of(name: str, splits: Iterable[str]) -> Part | None:
    """Tell what a name such as ``val_unseen`` stands for; None where it is no such name.

    ``test_seen`` takes all splits whose names begin with test: RefCOCO's testA and testB.
    """
    whole, _, kind = name.rpartition("_")
    found = tuple(
        split for split in splits if split == whole or (whole == "test" and split.startswith(whole))
    )
    return Part(found, kind == "seen") if kind in ("seen", "unseen") and found else None


def seen_and_unseen(source: Path, categories: Mapping[int, str]) -> dict[bool, frozenset[int]]:
    """Give {True: ids of the seen classes, False: of the unseen ones} of a data set.

    Args:
        source: The file that lists its records, or its folder.
        categories: Id -> name, as far as the layout has names.

    Raises:
        InputError: The categories are not COCO's, and there is no `LISTS` file beside the source.
    """
    folder = source if source.is_dir() else source.parent
    lists = lists_of(source)
    if lists is not None:
        found = read_plain_json(lists)
        seen, unseen = (frozenset(plain_list(found, key, int, str(lists))) for key in ("seen", "unseen"))
        if seen & unseen:
            raise InputError(f"{lists}: category {min(seen & unseen)} is both seen and unseen; mend the file")
        return {True: seen, False: unseen}
    for id, name in categories.items():
        if COCO.get(id, name) != name:
            raise InputError(
                f"{source}: category {id} is {shown(name)}, not COCO's {COCO[id]!r}: its lists do not fit; "
                f'write {folder / LISTS} with {{"seen": [ids], "unseen": [ids]}}'
            )
    return {True: frozenset(SEEN), False: frozenset(UNSEEN)}


def lists_of(source: Path) -> Path | None:
    """Find the `LISTS` file of what lists the records: its own, that of its folder or of the one above."""
    folder = source if source.is_dir() else source.parent
    return note_beside(source, LISTS) or note_beside(folder.parent, LISTS)
