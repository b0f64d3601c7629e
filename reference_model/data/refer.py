"""Read RefCOCO, RefCOCO+ and G-Ref in the layout of REFER: a pickle of refs beside COCO annotations."""

import difflib
import os
import warnings
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar, NamedTuple

from reference_model.data.plain import (
    MEND,
    listing,
    plain_field,
    read_plain_json,
    read_plain_pickle,
    shown,
)
from reference_model.data.records import Record, segmentation_defect
from reference_model.files import InputError

IMAGE_FOLDERS = (
    "images/train2014",
    "images/mscoco/images/train2014",
    "images/mscoco/train2014",
    "trainval2014",
    "images/trainval2014",
    "coco2014/train2014",
    "train2014",
)


class Target(NamedTuple):
    """What a ref refers to; the fields are those of `Record`."""

    ann_id: int | tuple[int, ...]
    category_id: int | tuple[int, ...]
    segmentation: Any


class Refer:
    """A data set in REFER's layout, read and checked whole.

    ``splits`` maps the name of each split to its count of records.

    Args:
        root: Folder with ``<dataset>/refs(<split_by>).p``, ``<dataset>/instances.json`` and the COCO images
            in one of ``IMAGE_FOLDERS``.
        dataset: refcoco, refcoco+, refcocog, or any folder of that layout.
        split_by: unc, umd, google: the name between the brackets of the refs file.

    Raises:
        InputError: A file is missing or malformed, or an entry contradicts another one.
    """

    refs_name: ClassVar[str] = "refs({}).p"
    read_refs: ClassVar[Any] = staticmethod(read_plain_pickle)

    def __init__(self, root: str | Path, dataset: str = "refcoco", split_by: str = "unc") -> None:
        self.root = Path(root)
        self.refs_file = _refs_file(self.root, dataset, split_by, self.refs_name)
        self.instances_file = self.root / dataset / "instances.json"
        refs = self.read_refs(self.refs_file)
        if type(refs) is not list or not refs:
            raise InputError(f"{self.refs_file}: holds {shown(refs)}, expected a list of refs; {MEND}")
        instances = read_plain_json(self.instances_file)
        self._images = self._by_id(instances, "images")
        self._annotations = self._by_id(instances, "annotations")
        self._annotations_of: dict[int, list[dict[str, Any]]] = {}
        for id, annotation in self._annotations.items():
            where = f"{self.instances_file}: annotation {id}"
            image_id = plain_field(annotation, "image_id", int, where)
            self._annotations_of.setdefault(image_id, []).append(annotation)
        self._sizes = {id: self._checked_image(id, image) for id, image in self._images.items()}
        self._sound: set[int] = set()  # annotations whose segmentation was checked
        self._records: dict[str, list[Record]] = {}
        self._read(refs)
        self.splits = {split: len(records) for split, records in self._records.items()}

    def records(self, split: str) -> list[Record]:
        """List the records of a split in file order, one a sentence.

        Raises:
            InputError: There is no split of exactly this name, or images of it are missing.
        """
        if split not in self._records:
            near = [name for name in self.splits if name.casefold() == split.casefold()]
            near = near or difflib.get_close_matches(split, self.splits, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}? " if near else ""
            known = ", ".join(f"{name!r} ({count})" for name, count in self.splits.items())
            raise InputError(f"{self.refs_file}: no split {split!r}; {hint}there are {known}")
        records = self._records[split]
        paths = list(dict.fromkeys(record.image for record in records))
        present = {folder: _names(folder) for folder in {path.parent for path in paths}}
        missing = [path for path in paths if path.name not in present[path.parent]]
        if missing:
            raise InputError(
                f"{missing[0].parent}: lacks {shown(missing[0].name)}, as {len(missing)} of the {len(paths)} "
                f"images of split {split!r}; unpack COCO train2014 there"
            )
        return list(records)

    def annotations(self, image_id: int) -> list[dict[str, Any]]:
        """List all COCO annotations of an image, in file order."""
        return list(self._annotations_of.get(image_id, ()))

    def _by_id(self, instances: Any, key: str) -> dict[int, dict[str, Any]]:
        entries = plain_field(instances, key, list, f"{self.instances_file}: the top level")
        by_id: dict[int, dict[str, Any]] = {}
        for index, entry in enumerate(entries):
            where = f"{self.instances_file}: {key}[{index}]"
            id = plain_field(entry, "id", int, where)
            if id in by_id:
                raise InputError(f"{where} has id {id} a second time; {MEND}")
            by_id[id] = entry
        return by_id

    def _checked_image(self, id: int, image: dict[str, Any]) -> tuple[int, int]:
        where = f"{self.instances_file}: image {id}"
        height, width = (plain_field(image, side, int, where) for side in ("height", "width"))
        name = plain_field(image, "file_name", str, where)
        parts = PurePosixPath(name).parts
        if not parts or parts[0] == "/" or ".." in parts or set(name) & set("\\:\0"):
            raise InputError(
                f"{where} has file_name {shown(name)}, not a plain path inside the image folder; {MEND}"
            )
        return height, width

    def _read(self, refs: list[Any]) -> None:
        folder: Path | None = None
        paths: dict[int, Path] = {}
        wordless: list[str] = []
        for index, ref in enumerate(refs):
            where = f"{self.refs_file}: refs[{index}]"
            ref_id = plain_field(ref, "ref_id", int, where)
            where = f"{where} (ref_id {ref_id})"
            image_id = plain_field(ref, "image_id", int, where)
            split = plain_field(ref, "split", str, where)
            if image_id not in self._images:
                raise InputError(
                    f"{where} names image {image_id}, which is not among the {len(self._images)} of "
                    f"{self.instances_file}; use the instances.json that came with the refs file"
                )
            target = self._target(ref, image_id, where)
            height, width = self._sizes[image_id]
            if image_id not in paths:
                name = self._images[image_id]["file_name"]
                folder = folder or _image_folder(self.root, name)
                paths[image_id] = folder / name
            for number, sentence in enumerate(plain_field(ref, "sentences", list, where)):
                spot = f"{where} sentences[{number}]"
                sent_id = plain_field(sentence, "sent_id", int, spot)
                expression = _expression(sentence, spot)
                if not expression:
                    wordless.append(spot)
                    continue
                record = Record(
                    image=paths[image_id],
                    height=height,
                    width=width,
                    expression=expression,
                    split=split,
                    ref_id=ref_id,
                    image_id=image_id,
                    sent_id=sent_id,
                    **target._asdict(),
                )
                self._records.setdefault(split, []).append(record)
        if wordless:
            warnings.warn(f"{wordless[0]} has no words; {len(wordless)} such left out", stacklevel=3)

    def _target(self, ref: dict[str, Any], image_id: int, where: str) -> Target:
        """Take what a ref refers to, checked."""
        ann_id, category_id = (plain_field(ref, key, int, where) for key in ("ann_id", "category_id"))
        return Target(ann_id, category_id, self._segmentation(ann_id, image_id, where))

    def _segmentation(self, ann_id: int, image_id: int, where: str) -> Any:
        """Take the segmentation of an annotation that must lie on this image, checked."""
        if ann_id not in self._annotations:
            raise InputError(
                f"{where} names annotation {ann_id}, which is not among the {len(self._annotations)} of "
                f"{self.instances_file}; use the instances.json that came with the refs file"
            )
        annotation = self._annotations[ann_id]
        if annotation["image_id"] != image_id:
            raise InputError(
                f"{where} names image {image_id}, but its annotation {ann_id} lies on image "
                f"{annotation['image_id']} in {self.instances_file}; {MEND}"
            )
        if ann_id not in self._sound:
            self._check_segmentation(annotation, *self._sizes[image_id])
            self._sound.add(ann_id)
        return annotation["segmentation"]

    def _check_segmentation(self, annotation: dict[str, Any], height: int, width: int) -> None:
        where = f"{self.instances_file}: annotation {annotation['id']}"
        if "segmentation" not in annotation:
            raise InputError(f"{where} has no 'segmentation', only {shown(list(annotation))}; {MEND}")
        defect = segmentation_defect(annotation["segmentation"], height, width)
        if defect is not None:
            raise InputError(f"{where}: {defect}; {MEND}")


def _refs_file(root: Path, dataset: str, split_by: str, name: str) -> Path:
    folder = root / dataset
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; {root} holds {listing(root)}")
    path = folder / name.format(split_by)
    if not path.is_file():
        before, after = map(len, name.split("{}"))
        known = sorted(found.name[before:-after] for found in folder.glob(name.format("*")))
        there = f"use split_by {' or '.join(known)}" if known else f"{folder} holds {listing(folder)}"
        raise InputError(f"{path}: no such file; {there}")
    return path


def _image_folder(root: Path, name: str) -> Path:
    """Find the folder of the images: of those that exist, the first with this image, or else the first."""
    folders = [root / folder for folder in IMAGE_FOLDERS if (root / folder).is_dir()]
    if not folders:
        raise InputError(
            f"{root}: holds no image folder; put COCO train2014 into {' or '.join(IMAGE_FOLDERS)}"
        )
    parent = PurePosixPath(name).parent
    return next((folder for folder in folders if Path(name).name in _names(folder / parent)), folders[0])


def _names(folder: Path) -> set[str]:
    try:
        return set(os.listdir(folder))
    except OSError:
        return set()


def _expression(sentence: dict[str, Any], where: str) -> str:
    """Take the cleaned sentence, or the raw one where the cleaned one is absent or blank."""
    texts = [plain_field(sentence, key, str, where).strip() for key in ("sent", "raw") if key in sentence]
    if not texts:
        raise InputError(f"{where} has neither 'sent' nor 'raw', only {shown(list(sentence))}; {MEND}")
    return next(filter(None, texts), "")
