"""Read what CRIS, ETRIS and CGFormer prepare: refs as JSON, a PNG mask for each, COCO's images."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from reference_model.data.images import CocoImages, Folders, mask_size
from reference_model.data.readers.reader import OnError, Reader, Text
from reference_model.data.records import Record
from reference_model.data.splits import COCO
from reference_model.data.untrusted import MEND, listing, plain_field, plain_path, read_plain_json
from reference_model.files import InputError, shown

_IDS = tuple(COCO)  # CRIS numbers the categories from 0 on
_SETS = {("refcocog", "umd"): "refcocog_u", ("refcocog", "google"): "refcocog_g"}
_NUMBER = re.compile(r"([0-9]{1,18})\.\w+$")


class Cris(Reader):
    """A data set in CRIS's layout, read and checked whole; masks are decoded when they are asked for.

    An entry has no annotation: ``ann_id`` and ``ref_id`` are both its ``segment_id``, and ``image_id`` is the
    number at the end of the image's name.

    Args:
        root: Folder with ``anns/<dataset>/<split>.json``, ``masks/<dataset>/<segment_id>.png`` and the COCO
            images in one of ``IMAGE_FOLDERS``.
        dataset: refcoco, refcoco+, refcocog_u or refcocog_g.
        split_by: With dataset refcocog, umd or google stands for ``refcocog_u`` or ``refcocog_g``.
        text: Which form of a sentence is read where there are two; CRIS keeps the cleaned one alone.
        on_error: What a malformed record does: ``stop`` with an InputError, or be left out (``skip``).
            A sentence without words is left out in either case.
        images: Whether images must be there; False where none will be opened.

    Raises:
        InputError: A file is missing or malformed, or a mask's header is.
    """

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
        name = cris_set(self.root, dataset, split_by)
        if name is None:
            anns = self.root / "anns"
            raise InputError(f"{anns / dataset}: no such folder; {anns} holds {listing(anns)}")
        super().__init__(self.root / "anns" / name, text=text, on_error=on_error, images=images)
        self.categories = dict(COCO)
        self._masks = self.root / "masks" / name
        self._coco = CocoImages(self.root, needed=images)
        self._folders = Folders()
        self._names: dict[int, str] = {}  # of the images, by their ids
        self._records: dict[str, list[Record]] = {}
        paths = sorted(self.source.glob("*.json"))
        if not paths:
            raise InputError(f"{self.source}: holds no <split>.json, but {listing(self.source)}")
        for path in paths:
            self._read(path)
        self.splits = {split: len(records) for split, records in self._records.items()}
        self._tell_skipped()

    def _stream(self, split: str) -> Iterator[Record]:
        self._refuse_missing(split, (record.image for record in self._records[split]))
        yield from self._records[split]

    def _read(self, path: Path) -> None:
        refs = read_plain_json(path)
        if type(refs) is not list:
            raise InputError(f"{path}: holds {shown(refs)}, expected a list of refs; {MEND}")
        for index, ref in enumerate(refs):
            try:
                for record in self._records_of(ref, path.stem, f"{path}: refs[{index}]"):
                    self._records.setdefault(path.stem, []).append(record)
            except InputError as error:
                self._leave_out(error)

    def _records_of(self, ref: Any, split: str, where: str) -> list[Record]:
        """Make the records of an entry, one a sentence; they share its mask."""
        ref_id = plain_field(ref, "segment_id", int, where)
        where = f"{where} (segment_id {ref_id})"
        category = plain_field(ref, "cat", int, where)
        if not 0 <= category < len(_IDS):
            raise InputError(f"{where} has 'cat' = {category}, expected 0 to {len(_IDS) - 1}; {MEND}")
        image, image_id = self._image(plain_field(ref, "img_name", str, where), where)
        mask = self._masks / f"{ref_id}.png"
        if defect := self._folders.defect(mask):
            raise InputError(f"{where} has the mask {mask}, which {defect}; make the masks again")
        height, width = mask_size(mask)
        self._names[image_id] = ref["img_name"]
        return [
            Record(
                image=image,
                height=height,
                width=width,
                expression=expression,
                segmentation=mask,
                split=split,
                ref_id=ref_id,
                ann_id=ref_id,
                image_id=image_id,
                sent_id=sent_id,
                raw=raw,
                category_id=_IDS[category],
            )
            for sent_id, expression, raw in self._sentences(ref, where)
        ]

    def _image(self, name: str, where: str) -> tuple[Path, int]:
        """Find an image and its number."""
        number = _NUMBER.search(name)
        if not plain_path(name) or number is None:
            raise InputError(f"{where} has img_name {shown(name)}, not a name such as COCO's; {MEND}")
        image_id = int(number[1])
        if self._names.get(image_id, name) != name:
            raise InputError(
                f"{where} has img_name {shown(name)}, numbered as {shown(self._names[image_id])} is; {MEND}"
            )
        path = self._coco.path(name)
        # Otherwise told for a whole split, and only when that is asked for.
        if self.images and self.on_error == "skip" and (defect := self._folders.defect(path)):
            raise InputError(f"{where} names {path}, which {defect}; put the image there")
        return path, image_id


def cris_set(root: Path, dataset: str, split_by: str) -> str | None:
    """Give the name by which CRIS's layout has a data set, or None where it is not there."""
    names = (dataset, _SETS.get((dataset, split_by), dataset))
    return next((name for name in names if (root / "anns" / name).is_dir()), None)
