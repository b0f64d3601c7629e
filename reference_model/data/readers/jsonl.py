"""Read one's own data: a line of JSON for each object that is referred to."""

import re
from array import array
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple

from reference_model.data.images import Folders, image_size, mask_size
from reference_model.data.readers.reader import OnError, Reader, Text, checked_expression, split_of
from reference_model.data.records import LONGEST_SIDE, Record, segmentation_defect
from reference_model.data.splits import CATEGORIES
from reference_model.data.untrusted import (
    MEND,
    listing,
    note_of,
    plain_field,
    plain_json,
    plain_list,
    plain_path,
    read_plain_json,
)
from reference_model.files import InputError, shown

LONGEST_LINE = 16 * 2**20
"""Bytes of a line, at most: an object with 100,000 points takes 2 MiB."""

MOST_SENTENCES = 1000
"""Sentences of one line, at most."""


class _Image(NamedTuple):
    path: Path
    id: int
    height: int
    width: int


class _Lines(NamedTuple):
    """Where the lines of a split are: 16 bytes each, so that a file of any length fits in memory."""

    offsets: "array[int]"
    numbers: "array[int]"


class Jsonl(Reader):
    """A file of lines such as ``{"image": "cats/1.jpg", "expression": "left cat", "mask": "cats/1.png"}``.

    ========================  ================================================================================
    image                     path from the folder of this file, inside of it
    expression                a sentence, or a list of sentences about the same object
    mask                      path of a PNG (0 = background) · polygons ``[[x0, y0, x1, y1, ...], ...]`` in
                              pixels · RLE as COCO has it · ``{"boxes": [[x, y, width, height], ...]}`` in
                              pixels · null where nothing is meant
    split                     train, if absent, or any other name
    height, width             the size that masks were drawn at, pixels; if absent, the image's own
    raw                       the sentences as they were before cleaning, for ``data.text=raw``
    image_id, ref_id, ann_id  whole numbers; if absent, the number of the line. An image has one id throughout
    sent_id                   a whole number for each sentence; if absent, 1000 · line + 0, 1, ...
    category_id               COCO's; if absent, 0. It and ann_id may be lists
    ========================  ================================================================================

    Other keys are not looked at. The whole file is checked once, and each line is parsed again when its
    records are asked for.

    Args:
        path: The file.
        text: Whether ``expression`` is read (``sent``), or ``raw`` where a line has it.
        on_error: What a malformed line does: ``stop`` with an InputError, or be left out (``skip``).
        images: Whether images must be there; False where none will be opened.

    Raises:
        InputError: The file is missing, or a line is malformed.
    """

    def __init__(
        self, path: str | Path, *, text: Text = "sent", on_error: OnError = "stop", images: bool = True
    ) -> None:
        super().__init__(Path(path), text=text, on_error=on_error, images=images)
        self.root = self.source.parent
        self._images: dict[str, _Image] = {}
        self._names: dict[int, str] = {}  # of the images, by their ids
        self._folders = Folders()
        self._lines: dict[str, _Lines] = {}
        self.categories = _names(note_of(self.source, CATEGORIES))
        with self._open() as file:
            for number, offset, line in self._numbered(file):
                try:
                    records = self._records_of(line, number)
                except InputError as error:
                    self._leave_out(error)
                    continue
                lines = self._lines.setdefault(records[0].split, _Lines(array("q"), array("q")))
                lines.offsets.append(offset)
                lines.numbers.append(number)
                self.splits[records[0].split] = self.splits.get(records[0].split, 0) + len(records)
        if not self.splits and not self.skipped:
            raise InputError(f"{self.source}: holds no line; write one for each object")
        self._tell_skipped()

    def _stream(self, split: str) -> Iterator[Record]:
        with self._open() as file:
            for offset, number in zip(*self._lines[split], strict=True):
                file.seek(offset)
                yield from self._records_of(file.readline(LONGEST_LINE + 1), number)

    def _open(self) -> BinaryIO:
        if not self.source.is_file():
            raise InputError(f"{self.source}: no such file; {self.root} holds {listing(self.root)}")
        try:
            return self.source.open("rb")
        except OSError as error:
            raise InputError(
                f"{self.source}: cannot be read ({error.strerror}); check its permissions"
            ) from error

    def _numbered(self, file: BinaryIO) -> Iterator[tuple[int, int, bytes]]:
        """Yield number from 1 on, offset and text of each line that is not blank; overlong ones cut."""
        number = offset = 0
        while line := file.readline(LONGEST_LINE + 1):
            number += 1
            start, offset = offset, offset + len(line)
            rest = line
            while len(line) > LONGEST_LINE and not rest.endswith(b"\n"):
                if not (rest := file.readline(LONGEST_LINE)):
                    break
                offset += len(rest)
            if line.strip():
                yield number, start, line

    def _records_of(self, line: bytes, number: int) -> list[Record]:
        """Make the records of a line, one a sentence; they share its segmentation."""
        where = f"{self.source}: line {number}"
        if len(line) > LONGEST_LINE:
            raise InputError(f"{where} has more than {LONGEST_LINE} bytes; write its mask as a PNG file")
        entry = plain_json(line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line, where, "line")
        name = str(PurePosixPath(plain_field(entry, "image", str, where)))
        sentences, raws = self._expressions(entry, where)
        sent_ids = _ids(entry, "sent_id", where, [1000 * number + k for k in range(len(sentences))])
        if len(sent_ids) != len(sentences):
            raise InputError(
                f"{where} has {len(sent_ids)} 'sent_id' for {len(sentences)} sentences; mend them"
            )
        split = split_of(entry, where) if "split" in entry else "train"
        image = self._image(entry, name, number, where)
        segmentation = self._segmentation(entry, image, where)
        ann_id = _one_or_many(entry, "ann_id", where, number)
        category_id = _one_or_many(entry, "category_id", where, 0)
        if entry["mask"] is None:
            ann_id = category_id = ()
        elif ann_id == ():
            raise InputError(f"{where} has a mask, but 'ann_id' = []; name the object, or write mask: null")
        ref_id = plain_field(entry, "ref_id", int, where) if "ref_id" in entry else number
        self._images[name], self._names[image.id] = image, name
        return [
            Record(
                image=image.path,
                height=image.height,
                width=image.width,
                expression=expression,
                segmentation=segmentation,
                split=split,
                ref_id=ref_id,
                ann_id=ann_id,
                image_id=image.id,
                sent_id=sent_id,
                raw=raw,
                category_id=category_id,
            )
            for expression, raw, sent_id in zip(sentences, raws, sent_ids, strict=True)
        ]

    def _expressions(self, entry: dict[str, Any], where: str) -> tuple[list[str], list[str | None]]:
        """Take the sentences in the form asked for, and what `Record.raw` keeps of each."""
        if "raw" not in entry:
            sentences = self._texts(entry, "expression", where)
            return sentences, [None] * len(sentences)
        if self.text == "raw":
            sentences = self._texts(entry, "raw", where)
            return sentences, [None] * len(sentences)
        sentences, raws = (self._texts(entry, key, where) for key in ("expression", "raw"))
        if len(sentences) != len(raws):
            raise InputError(f"{where} has {len(raws)} 'raw' for {len(sentences)} sentences; mend them")
        return sentences, [raw if raw != one else None for one, raw in zip(sentences, raws, strict=True)]

    def _texts(self, entry: dict[str, Any], key: str, where: str) -> list[str]:
        """Take a sentence or a list of them; raises where one has no words."""
        found = [entry[key]] if type(entry.get(key)) is str else plain_list(entry, key, str, where)
        if not 1 <= len(found) <= MOST_SENTENCES:
            raise InputError(f"{where} has {len(found)} sentences, expected 1 to {MOST_SENTENCES}; mend it")
        sentences = [checked_expression(sentence, where) for sentence in found]
        if not all(sentences):
            raise InputError(f"{where} has {key!r} = {shown(entry[key])}, without words; write what to find")
        return sentences

    def _image(self, entry: dict[str, Any], name: str, number: int, where: str) -> _Image:
        """Find an image with its id and size; what a line leaves out is as the first that named it had it."""
        known = self._images.get(name)
        sized = "height" in entry or "width" in entry
        path = known.path if known else self._file(name, "image", where, needed=self.images or not sized)
        id = known.id if known else number
        if "image_id" in entry:
            id = plain_field(entry, "image_id", int, where)
        if self._names.get(id, name) != name:
            taken = f"that of {shown(self._names[id])}"
            raise InputError(f"{where}: image_id {id} of {shown(name)} is {taken}; give each image its own")
        if sized:
            size = plain_field(entry, "height", int, where), plain_field(entry, "width", int, where)
        else:
            size = (known.height, known.width) if known else image_size(path, name=f"{where}: {path}")
        found = _Image(path, id, *size)
        if known and found != known:
            was, now = (f"id {image.id}, {image.height} x {image.width} pixels" for image in (known, found))
            raise InputError(f"{where}: {shown(name)} has {now}, but before {was}; mend one of them")
        return found

    def _segmentation(self, entry: dict[str, Any], image: _Image, where: str) -> Any:
        if "mask" not in entry:
            raise InputError(f"{where} has no 'mask'; write null where the sentence means nothing")
        mask, height, width = entry["mask"], image.height, image.width
        if type(mask) is str:
            path = self._file(mask, "mask", where)
            size = mask_size(path, name=f"{where}: {path}")
            if size == (height, width):
                return path
            raise InputError(
                f"{where}: {path} has height {size[0]} and width {size[1]}, but the image has height "
                f"{height} and width {width}; draw it on the image as it is shown, or give height and width"
            )
        if mask is None:
            mask = {"size": [height, width], "counts": [height * width]}
        elif type(mask) is dict and "boxes" in mask:
            mask = _polygons(plain_list(mask, "boxes", list, f"{where}: 'mask'"), where)
        defect = segmentation_defect(mask, height, width)
        if defect is not None:
            raise InputError(f"{where}: 'mask': {defect}; mend that line")
        return mask

    def _file(self, name: str, what: str, where: str, *, needed: bool = True) -> Path:
        """Find a file that a line names below the folder of this file."""
        if not plain_path(name):
            raise InputError(
                f"{where} has {what!r} = {shown(name)}, expected a path below {self.root} without '..', ':' "
                "or '\\\\'; move or rename the files, or link their folder"
            )
        path = self.root / name
        if needed and (defect := self._folders.defect(path)):
            raise InputError(f"{where} names {path}, which {defect}; put the {what} itself there")
        return path


def _names(path: Path) -> dict[int, str]:
    """Read the names of the categories that conversion keeps beside a file."""
    if not path.is_file():
        return {}
    found = read_plain_json(path)
    fits = type(found) is dict and all(re.fullmatch(r"-?\d{1,18}", id) for id in found)
    if not (fits and {type(name) for name in found.values()} <= {str}):
        raise InputError(f"{path}: holds {shown(found)}, expected {{id: name}}; {MEND}")
    return {int(id): name for id, name in found.items()}


def _polygons(boxes: list[list[Any]], where: str) -> list[list[float]]:
    """Turn boxes x, y, width, height into polygons."""
    polygons = []
    for box in boxes:
        numbers = len(box) == 4 and {type(number) for number in box} <= {int, float}
        if not (numbers and all(abs(number) <= LONGEST_SIDE for number in box) and min(box[2:]) > 0):
            raise InputError(f"{where} has the box {shown(box)}, expected [x, y, width, height]; mend it")
        left, top, right, bottom = box[0], box[1], box[0] + box[2], box[1] + box[3]
        polygons.append([left, top, right, top, right, bottom, left, bottom])
    return polygons


def _one_or_many(entry: dict[str, Any], key: str, where: str, default: int) -> int | tuple[int, ...]:
    """Take a whole number as it is, and a list of them as a tuple."""
    if type(entry.get(key, default)) is list:
        return tuple(plain_list(entry, key, int, where))
    return plain_field(entry, key, int, where) if key in entry else default


def _ids(entry: dict[str, Any], key: str, where: str, default: list[int]) -> list[int]:
    """Take a list of whole numbers, or one as a list of one."""
    if key not in entry:
        return default
    found = _one_or_many(entry, key, where, 0)
    return list(found) if isinstance(found, tuple) else [found]
