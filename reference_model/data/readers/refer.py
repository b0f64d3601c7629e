"""Read RefCOCO, RefCOCO+ and G-Ref in the layout of REFER: a pickle of refs beside COCO annotations."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from reference_model.data.images import CocoImages, Folders
from reference_model.data.readers.reader import OnError, Reader, Text, split_of
from reference_model.data.records import Record, segmentation_defect
from reference_model.data.untrusted import (
    MEND,
    listing,
    plain_field,
    plain_path,
    read_plain_json,
    read_plain_pickle,
)
from reference_model.files import InputError, shown


class Target(NamedTuple):
    """What a ref refers to; the fields are those of `Record`."""

    ann_id: int | tuple[int, ...]
    category_id: int | tuple[int, ...]
    segmentation: Any


class Refer(Reader):
    """A data set in REFER's layout, read and checked whole.

    Args:
        root: Folder with ``<dataset>/refs(<split_by>).p``, ``<dataset>/instances.json`` and the COCO images
            in one of ``IMAGE_FOLDERS``.
        dataset: refcoco, refcoco+, refcocog, or any folder of that layout.
        split_by: unc, umd, google: the name between the brackets of the refs file.
        text: The form of sentences that is read, cleaned (``sent``) or ``raw``; where it is blank, the other.
        on_error: What a malformed record does: ``stop`` with an InputError, or be left out (``skip``).
            A sentence without words is left out in either case.
        images: Whether images must be there; False where none will be opened.

    Raises:
        InputError: A file is missing or malformed, or an entry contradicts another one.
    """

    refs_names: ClassVar[tuple[str, ...]] = ("refs({}).p",)
    """What the file of refs may be called; the first that is there is read."""

    def __init__(
        self,
        root: str | Path,
        dataset: str = "refcoco",
        split_by: str = "unc",
        *,
        text: Text = "sent",
        on_error: OnError = "stop",
        images: bool = True,
    ) -> None:
        self.root = Path(root)
        super().__init__(
            _refs_file(self.root, dataset, split_by, self.refs_names),
            text=text,
            on_error=on_error,
            images=images,
        )
        self.instances_file = self.root / dataset / "instances.json"
        refs = (read_plain_json if self.source.suffix == ".json" else read_plain_pickle)(self.source)
        if type(refs) is not list or not refs:
            raise InputError(f"{self.source}: holds {shown(refs)}, expected a list of refs; {MEND}")
        self._read_instances(read_plain_json(self.instances_file))
        self._sound: set[int] = set()  # annotations whose segmentation was checked
        self._records: dict[str, list[Record]] = {}
        self._read_refs(refs)
        self.splits = {split: len(records) for split, records in self._records.items()}
        self._tell_skipped()

    def _stream(self, split: str) -> Iterator[Record]:
        self._refuse_missing(split, (record.image for record in self._records[split]))
        yield from self._records[split]

    def annotations(self, image_id: int) -> list[dict[str, Any]]:
        """List all COCO annotations of an image, in file order."""
        return list(self._annotations_of.get(image_id, ()))

    def _read_instances(self, instances: Any) -> None:
        self.categories = _names(instances)
        self._images: dict[int, tuple[str, int, int]] = {}
        for id, image in self._by_id(instances, "images"):
            try:
                self._images[id] = self._checked_image(id, image)
            except InputError as error:
                self._leave_out(error)
        self._annotations: dict[int, dict[str, Any]] = {}
        self._annotations_of: dict[int, list[dict[str, Any]]] = {}
        for id, annotation in self._by_id(instances, "annotations"):
            try:
                where = f"{self.instances_file}: annotation {id}"
                image_id = plain_field(annotation, "image_id", int, where)
            except InputError as error:
                self._leave_out(error)
                continue
            self._annotations[id] = annotation
            self._annotations_of.setdefault(image_id, []).append(annotation)

    def _by_id(self, instances: Any, key: str) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield the entries of a list with their ids, each id once."""
        seen: set[int] = set()
        for index, entry in enumerate(
            plain_field(instances, key, list, f"{self.instances_file}: the top level")
        ):
            where = f"{self.instances_file}: {key}[{index}]"
            try:
                id = plain_field(entry, "id", int, where)
                if id in seen:
                    raise InputError(f"{where} has id {id} a second time; {MEND}")
            except InputError as error:
                self._leave_out(error)
                continue
            seen.add(id)
            yield id, entry

    def _checked_image(self, id: int, image: dict[str, Any]) -> tuple[str, int, int]:
        """Take name, height and width of an image."""
        where = f"{self.instances_file}: image {id}"
        height, width = (plain_field(image, side, int, where) for side in ("height", "width"))
        name = plain_field(image, "file_name", str, where)
        if not plain_path(name):
            raise InputError(
                f"{where} has file_name {shown(name)}, not a plain path in the images (without ':'); {MEND}"
            )
        return name, height, width

    def _read_refs(self, refs: list[Any]) -> None:
        images = CocoImages(self.root, needed=self.images)
        self._paths = {id: images.path(name) for id, (name, _, _) in self._images.items()}
        self._folders = Folders()
        for index, ref in enumerate(refs):
            try:
                for record in self._records_of(ref, f"{self.source}: refs[{index}]"):
                    self._records.setdefault(record.split, []).append(record)
            except InputError as error:
                self._leave_out(error)

    def _records_of(self, ref: Any, where: str) -> list[Record]:
        """Make the records of a ref, one a sentence."""
        ref_id = plain_field(ref, "ref_id", int, where)
        where = f"{where} (ref_id {ref_id})"
        image_id = plain_field(ref, "image_id", int, where)
        split = split_of(ref, where)
        if image_id not in self._images:
            raise InputError(
                f"{where} names image {image_id}, which is not among the {len(self._images)} of "
                f"{self.instances_file}; use the instances.json that came with the refs file"
            )
        target = self._target(ref, image_id, where)
        _, height, width = self._images[image_id]
        path = self._paths[image_id]
        # Otherwise told for a whole split, and only when that is asked for.
        if self.images and self.on_error == "skip" and (defect := self._folders.defect(path)):
            raise InputError(f"{where} names {path}, which {defect}; put the image there")
        return [
            Record(
                image=path,
                height=height,
                width=width,
                expression=expression,
                split=split,
                ref_id=ref_id,
                image_id=image_id,
                sent_id=sent_id,
                raw=raw,
                **target._asdict(),
            )
            for sent_id, expression, raw in self._sentences(ref, where)
        ]

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
            self._check_segmentation(annotation, image_id)
            self._sound.add(ann_id)
        return annotation["segmentation"]

    def _check_segmentation(self, annotation: dict[str, Any], image_id: int) -> None:
        where = f"{self.instances_file}: annotation {annotation['id']}"
        if "segmentation" not in annotation:
            raise InputError(f"{where} has no 'segmentation', only {shown(list(annotation))}; {MEND}")
        _, height, width = self._images[image_id]
        defect = segmentation_defect(annotation["segmentation"], height, width)
        if defect is not None:
            raise InputError(f"{where}: {defect}; {MEND}")


def _refs_file(root: Path, dataset: str, split_by: str, names: tuple[str, ...]) -> Path:
    folder = root / dataset
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; {root} holds {listing(root)}")
    paths = [folder / name.format(split_by) for name in names]
    for path in paths:
        if path.is_file():
            return path
    known: set[str] = set()
    for name in names:
        before, after = map(len, name.split("{}"))
        known |= {found.name[before:-after] for found in folder.glob(name.format("*"))}
    there = f"use split_by {' or '.join(sorted(known))}" if known else f"{folder} holds {listing(folder)}"
    raise InputError(f"{paths[0]}: no such file; {there}")


def _names(instances: Any) -> dict[int, str]:
    """Take the names of the categories, as far as they are what COCO has there: nothing rests on them."""
    entries = instances.get("categories") if type(instances) is dict else None
    found = [entry for entry in (entries if type(entries) is list else []) if type(entry) is dict]
    return {
        entry["id"]: entry["name"]
        for entry in found
        if type(entry.get("id")) is int and type(entry.get("name")) is str
    }
