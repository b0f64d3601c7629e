"""Read the parquet files of ``jxu124/refcoco``, ``refcocoplus`` and ``refcocog`` from Hugging Face."""

import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from reference_model.data.images import CocoImages, Folders
from reference_model.data.readers.reader import OnError, Reader, Text
from reference_model.data.records import Record, segmentation_defect
from reference_model.data.splits import COCO
from reference_model.data.untrusted import MEND, listing, plain_field, plain_json, plain_path
from reference_model.files import InputError, one_line, shown

LARGEST_GROUP = 2**30
"""Bytes of a row group, unpacked, at most."""

LONGEST_CELL = 2**24
"""Characters of a cell, at most."""

_NAME = re.compile(r"([A-Za-z]\w{0,63})-([0-9]{5})-of-([0-9]{5})(?:-[0-9a-f]+)?\.parquet")
_COLUMNS = ("ref_id", "ann_id", "image_id", "category_id", "raw_anns", "raw_image_info")
_SENTENCES = ("sentences", "captions", "sent_ids")
LARGEST_ROW = 4 * LONGEST_CELL
"""Bytes of a row, written out, at most."""

MOST_VALUES = 2**26
"""Values of a column in a row group, at most."""

_ROWS = 64
# What pyarrow raises on damaged files; its own errors are among these.
_DAMAGED = (OSError, ValueError, LookupError, TypeError, NotImplementedError, MemoryError, RuntimeError)


class Hub(Reader):
    """A folder of ``<split>-00000-of-00001.parquet`` files, or one with them in ``data/``; a row is a ref.

    The files hold no images: COCO's are looked for in one of ``IMAGE_FOLDERS`` of the folder. The names of
    the splits are REFER's: ``validation`` becomes val, and ``test`` testA where there is a testB. The files
    are checked whole once, and read again, a few rows at a time, when records are asked for.

    Args:
        root: The folder.
        text: The form of sentences that is read, cleaned (``sent``) or ``raw``; where it is blank, the other.
        on_error: What a malformed row does: ``stop`` with an InputError, or be left out (``skip``).
            A sentence without words is left out in either case, and a file that cannot be read stops.
        images: Whether images must be there; False where none will be opened.

    Raises:
        InputError: A file is missing or malformed, or pyarrow is not installed.
    """

    def __init__(
        self, root: str | Path, *, text: Text = "sent", on_error: OnError = "stop", images: bool = True
    ) -> None:
        self.root = Path(root)
        super().__init__(self.root, text=text, on_error=on_error, images=images)
        self._files = _by_split(self.root)
        self._coco = CocoImages(self.root, needed=images)
        self._folders = Folders()
        self.categories = dict(COCO)
        self._bad: set[str] = set()
        self._names: dict[int, str] = {}  # of the images, by their ids
        self._images: dict[str, set[Path | bytes]] = {}
        for split in self._files:
            images: set[Path | bytes] = set()
            count = 0
            for where, row in self._rows(split):
                try:
                    records = self._records_of(row, split, where)
                except InputError as error:
                    self._leave_out(error)
                    self._bad.add(where)
                    continue
                count += len(records)
                images |= {record.image for record in records}
            if count:
                self.splits[split], self._images[split] = count, images
        self._tell_skipped()

    def _stream(self, split: str) -> Iterator[Record]:
        self._refuse_missing(split, self._images[split])
        for where, row in self._rows(split):
            if where not in self._bad:
                yield from self._records_of(row, split, where)

    def _rows(self, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield what messages call a row, and the row, with few of them in memory."""
        for path in self._files[split]:
            for index, row in enumerate(_rows(path)):
                yield f"{path}: row {index}", row

    def _records_of(self, row: dict[str, Any], split: str, where: str) -> list[Record]:
        """Make the records of a row, one a sentence; they share its segmentation."""
        ref_id = plain_field(row, "ref_id", int, where)
        where = f"{where} (ref_id {ref_id})"
        ann_id, image_id, category_id = (
            plain_field(row, key, int, where) for key in ("ann_id", "image_id", "category_id")
        )
        info = _parsed(row, "raw_image_info", where)
        height, width = (
            plain_field(info, key, int, f"{where} raw_image_info") for key in ("height", "width")
        )
        image = self._image(plain_field(info, "file_name", str, f"{where} raw_image_info"), image_id, where)
        segmentation = _segmentation(_parsed(row, "raw_anns", where), ann_id, image_id, where)
        if defect := segmentation_defect(segmentation, height, width):
            raise InputError(f"{where} raw_anns: {defect}; {MEND}")
        self._names[image_id] = info["file_name"]
        return [
            Record(
                image=image,
                height=height,
                width=width,
                expression=expression,
                segmentation=segmentation,
                split=split,
                ref_id=ref_id,
                ann_id=ann_id,
                image_id=image_id,
                sent_id=sent_id,
                raw=raw,
                category_id=category_id,
            )
            for sent_id, expression, raw in self._sentences(_with_sentences(row, where), where)
        ]

    def _image(self, name: str, image_id: int, where: str) -> Path:
        if not plain_path(name):
            raise InputError(f"{where} has file_name {shown(name)}, not a plain path (without ':'); {MEND}")
        if self._names.get(image_id, name) != name:
            raise InputError(
                f"{where} has image_id {image_id} for {shown(name)}, but it is that of "
                f"{shown(self._names[image_id])}; {MEND}"
            )
        path = self._coco.path(name)
        # Otherwise told for a whole split, and only when that is asked for.
        if self.images and self.on_error == "skip" and (defect := self._folders.defect(path)):
            raise InputError(f"{where} names {path}, which {defect}; put the image there")
        return path


def parquet_files(root: Path) -> list[Path]:
    """List the ``<split>-<number>-of-<count>.parquet`` files of a folder, or else of its folder data."""
    for folder in (root, root / "data"):
        found = sorted(path for path in folder.glob("*.parquet") if _NAME.fullmatch(path.name))
        if found:
            return found
    return []


def _by_split(root: Path) -> dict[str, list[Path]]:
    """Give the files of each split, all of them; splits as REFER names them."""
    parts: dict[str, dict[int, Path]] = {}
    counts: dict[str, int] = {}
    for path in parquet_files(root):
        name, number, count = _NAME.fullmatch(path.name).groups()  # type: ignore[union-attr]
        twin = parts.setdefault(name, {}).setdefault(int(number), path)
        if twin != path or counts.setdefault(name, int(count)) != int(count):
            twin = next(found for found in parts[name].values() if found != path)
            raise InputError(f"{path}: is of another version than {twin.name}; keep the files of one of them")
    if not parts:
        raise InputError(f"{root}: holds no <split>-00000-of-00001.parquet, but {listing(root)}")
    for name, found in parts.items():
        missing = sorted(set(range(counts[name])) - set(found))
        if missing:
            folder = next(iter(found.values())).parent
            raise InputError(f"{folder}: lacks {name}-{missing[0]:05}-of-{counts[name]:05}.parquet; fetch it")
    refer = {"validation": "val"} | ({"test": "testA"} if "testB" in parts else {})
    order = sorted(parts, key=lambda name: (name != "train", name != "validation", name))
    return {refer.get(name, name): [path for _, path in sorted(parts[name].items())] for name in order}


def _bounded(batch: Any, path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a batch as plain values, one at a time where all at once would be too large."""
    if sum(map(_written_out, batch.columns)) <= LARGEST_ROW:
        yield from batch.to_pylist()
        return
    for row in (batch.slice(index, 1) for index in range(len(batch))):
        if (size := sum(map(_written_out, row.columns))) > LARGEST_ROW:
            raise InputError(f"{path}: a row has {size} bytes, at most {LARGEST_ROW} are read; {MEND}")
        yield from row.to_pylist()


def _written_out(array: Any) -> int:
    """Count the bytes of an arrow array once it is written out: shared text as often as it is named."""
    types = _import("pyarrow.types")
    if types.is_struct(array.type):
        return sum(map(_written_out, array.flatten()))
    if types.is_list(array.type) or types.is_large_list(array.type):
        return 8 * len(array) + _written_out(array.flatten())
    if types.is_dictionary(array.type):
        compute = _import("pyarrow.compute")
        named = array.indices.drop_null()
        return int(compute.sum(compute.binary_length(array.dictionary).take(named)).as_py() or 0)
    return int(array.nbytes)


def _import(name: str) -> ModuleType:
    try:
        return import_module(name)
    except ImportError as error:
        raise InputError("parquet files need pyarrow; pip install 'metris-blocks[data]'") from error


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a parquet file.

    Raises:
        InputError: It is missing, damaged, or lacks a column.
    """
    parquet = _import("pyarrow.parquet")
    if not path.is_file():
        raise InputError(f"{path}: is not a file; fetch it again")
    try:
        with parquet.ParquetFile(path) as file:
            _refuse_bomb(file.metadata, path)
            known = file.schema_arrow.names
            columns = [*_COLUMNS, *(name for name in _SENTENCES if name in known)]
            lacking = [name for name in _COLUMNS if name not in known]
            if lacking or columns == [*_COLUMNS]:
                there = f"only {shown(known)}; use the files of jxu124/refcoco, refcocoplus or refcocog"
                raise InputError(f"{path}: has no column {(lacking or _SENTENCES)[0]!r}, {there}")
            # Text that a file holds once and names often stays so, until it is known what it comes to.
            leaves = [file.schema.column(index) for index in range(len(file.schema))]
            texts = [leaf.path for leaf in leaves if leaf.physical_type == "BYTE_ARRAY"]
        with parquet.ParquetFile(path, read_dictionary=texts) as file:
            # A row group for itself: text in lists has one dictionary there, as pyarrow wants it.
            for group in range(file.num_row_groups):
                options = {"row_groups": [group], "columns": columns, "use_threads": False}
                for batch in file.iter_batches(_ROWS, **options):
                    yield from _bounded(batch, path)
    except InputError:
        raise
    except _DAMAGED as error:
        raise InputError(f"{path}: not a whole parquet file ({one_line(error)}); fetch it again") from error


def _refuse_bomb(metadata: Any, path: Path) -> None:
    """Refuse what would unpack to far more than the file has."""
    size = path.stat().st_size
    if metadata.num_rows > size:
        raise InputError(f"{path}: states {metadata.num_rows} rows in {size} bytes; fetch it again")
    for index in range(metadata.num_row_groups):
        group = metadata.row_group(index)
        for column in map(group.column, range(group.num_columns)):
            if column.num_values > MOST_VALUES or column.physical_type in ("FIXED_LEN_BYTE_ARRAY", "INT96"):
                raise InputError(
                    f"{path}: column {shown(column.path_in_schema)} of row group {index} has "
                    f"{column.num_values} values of {column.physical_type}; at most {MOST_VALUES} of plain "
                    "numbers and texts are read"
                )
        if (unpacked := group.total_byte_size) > LARGEST_GROUP:
            raise InputError(
                f"{path}: row group {index} has {unpacked} bytes, more than the {LARGEST_GROUP} that are "
                "read; write it with smaller ones"
            )


def _parsed(row: dict[str, Any], key: str, where: str) -> Any:
    """Take a cell of JSON text."""
    text = plain_field(row, key, str, where)
    if len(text) > LONGEST_CELL:
        raise InputError(f"{where} has {len(text)} characters of {key}, more than {LONGEST_CELL}; {MEND}")
    return plain_json(text, f"{where} {key}", "cell")


def _segmentation(annotation: Any, ann_id: int, image_id: int, where: str) -> Any:
    """Take the segmentation of an annotation, which must be that of the row."""
    spot = f"{where} raw_anns"
    for key, expected in (("id", ann_id), ("image_id", image_id)):
        if plain_field(annotation, key, int, spot) != expected:
            raise InputError(f"{spot} has {key!r} = {annotation[key]}, but the row has {expected}; {MEND}")
    if "segmentation" not in annotation:
        raise InputError(f"{spot} has no 'segmentation', only {shown(list(annotation))}; {MEND}")
    return annotation["segmentation"]


def _with_sentences(row: dict[str, Any], where: str) -> dict[str, Any]:
    """Give a row its ``sentences``, made of captions and their numbers where it has none."""
    found = row.get("sentences")
    if type(found) is list:  # every row has every field; what is absent is None
        return {"sentences": [_present(one) for one in found]}
    if found is not None:
        return row
    captions, numbers = (plain_field(row, key, list, where) for key in ("captions", "sent_ids"))
    if len(captions) != len(numbers):
        raise InputError(f"{where} has {len(captions)} captions, but {len(numbers)} sent_ids; {MEND}")
    return {"sentences": [{"sent": c, "sent_id": n} for c, n in zip(captions, numbers, strict=True)]}


def _present(sentence: Any) -> Any:
    if type(sentence) is not dict:
        return sentence
    return {key: value for key, value in sentence.items() if value is not None}
