"""Tar shards as webdataset has them: read from front to back, from disk or over HTTP, never unpacked."""

import json
import re
import tarfile
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from http.client import HTTPException
from importlib import import_module
from itertools import groupby, islice
from pathlib import Path
from types import ModuleType, NoneType
from typing import Any, BinaryIO, ClassVar, NamedTuple
from urllib.request import urlopen

import numpy as np
from pycocotools import mask as coco_mask

from reference_model.data.readers.reader import OnError, Reader, Text
from reference_model.data.records import Record, segmentation_defect
from reference_model.data.untrusted import MEND, listing, plain_field, plain_list
from reference_model.files import InputError, one_line, shown

VERSION = 1
INDEX = "index.json"
LARGEST_MEMBER = 128 * 2**20
"""Bytes of a member of a tar, and of the index, beyond which it is refused."""

_NAME = re.compile(r"([A-Za-z0-9_+-]{1,64})-\d{6,}\.tar")
_URL = re.compile(r"(https?):/{1,2}([^/].*)")
_BLOCK, _TAIL = 512, 10_240  # tar pads members to blocks, and a whole file to 20 of them
# What a damaged tar or connection raises; found by fuzzing.
_DAMAGED = (tarfile.TarError, HTTPException, OSError, EOFError, ValueError, OverflowError, RecursionError)


class Shard(NamedTuple):
    """One tar file."""

    name: str
    """``<split>-<number>.tar``."""
    split: str
    """The split that all of it belongs to."""
    samples: int
    """Count of samples, one an image."""
    sentences: int
    """Count of sentences about them."""


def webdataset() -> ModuleType:
    """Import the package webdataset.

    Raises:
        InputError: It is not installed.
    """
    try:
        return import_module("webdataset")
    except ImportError as error:
        raise InputError("shards: need webdataset; pip install 'metris-blocks[data]'") from error


class Shards(Reader):
    """A folder of ``<split>-<number>.tar`` with an ``index.json``, as ``metris convert`` writes it.

    A sample is an image (``<key>.jpg``, its bytes as they were) and ``<key>.json`` with its refs and their
    sentences. Nothing is unpacked to disk, and names in a tar are never used as paths.

    Args:
        root: Folder, or http(s) address of one.
        text: The form of sentences that is read, cleaned (``sent``) or ``raw``; where it is blank, the other.
        on_error: "stop" at the first malformed sample, or "skip" and count it.

    Raises:
        InputError: The folder or its index is missing or malformed, or names a shard that is missing.
    """

    streamed: ClassVar[bool] = True

    def __init__(self, root: str | Path, *, text: Text = "sent", on_error: OnError = "stop") -> None:
        super().__init__(Path(root) / INDEX, text=text, on_error=on_error)
        self.root = _place(root)
        index = self._index()
        where = str(self.source)
        version = plain_field(index, "version", int, where)
        if version != VERSION:
            raise InputError(f"{where}: version {version}, but this metris reads {VERSION}; convert anew")
        self.shards = [
            self._shard(entry, f"{where}: shards[{number}]")
            for number, entry in enumerate(plain_field(index, "shards", list, where))
        ]
        for shard in self.shards:
            self.splits[shard.split] = self.splits.get(shard.split, 0) + shard.sentences
        names = plain_field(index, "categories", dict, where)
        if not all(re.fullmatch(r"-?\d{1,18}", id) and type(name) is str for id, name in names.items()):
            raise InputError(f"{where} has categories {shown(names)}, expected {{id: name}}; {MEND}")
        self.categories = {int(id): name for id, name in names.items()}
        self.made_of = plain_field(index, "made_of", dict, where)
        for key, kinds in (
            ("dataset", (str, NoneType)),
            ("split_by", (str, NoneType)),
            ("generated", (bool,)),
        ):
            if key in self.made_of and type(self.made_of[key]) not in kinds:
                raise InputError(f"{where} has made_of {shown(self.made_of)}, with another {key!r}; {MEND}")
        self.made_of = {"dataset": None, "split_by": None, "generated": False} | self.made_of
        """The config's dataset and split_by of what was converted, and whether it was generated."""

    def records(self, split: str) -> list[Record]:
        """Refuse: all images of a split would lie in memory."""
        raise InputError(f"{self.root}: shards are only streamed; convert to a .jsonl for this")

    def sentences(self, split: str) -> Iterator[str]:
        """Yield the sentences of a split alone, past the images."""
        for shard in self.of_split(split):
            for records in self.samples(shard, images=False):
                yield from (record.expression for record in records)

    def of_split(self, split: str) -> list[Shard]:
        """List the shards of a split; raises as `stream` does."""
        if split not in self.splits:
            self._refuse(split)
        return [shard for shard in self.shards if shard.split == split]

    def samples(self, shard: Shard, *, images: bool = True) -> Iterator[list[Record]]:
        """Yield the records of each sample of a shard, which share its image.

        Args:
            shard: One of ``shards``.
            images: Read the images too; without, they are empty bytes.

        Raises:
            InputError: The shard or a sample is malformed; unless malformed ones are skipped.
        """
        where, found = f"{self.root}/{shard.name}", 0
        try:
            with self._opened(shard.name) as stream:
                for sample in webdataset().tariterators.group_by_keys(_members(stream, where, images)):
                    found += 1
                    records = self._sound(sample, shard, images)
                    if records:
                        yield records
            if found != shard.samples:
                raise ValueError(f"holds {found} samples, but {INDEX} says {shard.samples}")
        except InputError as error:
            self._leave_out(error)
        except _DAMAGED as error:
            self._leave_out(InputError(f"{where}: not a whole shard ({one_line(error)}); copy it again"))

    def _stream(self, split: str) -> Iterator[Record]:
        for shard in self.of_split(split):
            for records in self.samples(shard):
                yield from records

    def _sound(self, sample: dict[str, Any], shard: Shard, images: bool) -> list[Record]:
        try:
            return self._of_sample(sample, shard.split, images)
        except InputError as error:
            self._leave_out(error)
            return []

    def _of_sample(self, sample: dict[str, Any], split: str, images: bool) -> list[Record]:
        where = f"{sample['__url__']}: sample {shown(sample['__key__'])}"
        parts = {suffix: part for suffix, part in sample.items() if not suffix.startswith("__")}
        if "json" not in parts or len(parts) != 1 + images:
            wanted = "'json' and one image" if images else "'json'"
            raise InputError(f"{where} holds {shown(list(parts))}, expected {wanted}; {MEND}")
        try:
            entry = json.loads(parts.pop("json"))
        except (ValueError, RecursionError) as error:
            raise InputError(f"{where}: its JSON is malformed ({one_line(error)}); {MEND}") from error
        image = next(iter(parts.values()), b"")
        image_id, height, width = (
            plain_field(entry, key, int, where) for key in ("image_id", "height", "width")
        )
        records = []
        for number, ref in enumerate(plain_field(entry, "refs", list, where)):
            spot = f"{where} refs[{number}]"
            ref_id = plain_field(ref, "ref_id", int, spot)
            ann_id, category_id = (_ids(ref, key, spot) for key in ("ann_id", "category_id"))
            segmentation = _segmentation(ref, height, width, spot)
            for sentence in plain_field(ref, "sentences", list, spot):
                sent_id = plain_field(sentence, "sent_id", int, spot)
                expression, raw = self._expression(sentence, spot)
                records.append(
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
                        place=where,
                    )
                )
        return records

    def _leave_out(self, error: InputError) -> None:
        super()._leave_out(error)
        if len(self.skipped) == 1:  # found while reading, maybe in a worker process: the first one is told
            warnings.warn(f"{error}; left out, as further ones will be", stacklevel=2)

    def _opened(self, name: str) -> BinaryIO:
        if isinstance(self.root, Path):
            return (self.root / name).open("rb")
        return urlopen(f"{self.root}/{name}", timeout=60)

    def _index(self) -> Any:
        try:
            with self._opened(INDEX) as stream:
                # In parts: a read of so many bytes at once would reserve memory for them.
                parts = islice(iter(partial(stream.read, 2**20), b""), LARGEST_MEMBER // 2**20)
                return json.loads(b"".join(parts))
        except FileNotFoundError as error:
            there = listing(self.root) if isinstance(self.root, Path) else "none"
            raise InputError(
                f"{self.source}: no such file, but {there}; write shards with metris convert"
            ) from error
        except _DAMAGED as error:
            raise InputError(f"{self.source}: cannot be read ({one_line(error)}); copy it again") from error

    def _shard(self, entry: Any, where: str) -> Shard:
        name = plain_field(entry, "name", str, where)
        match = _NAME.fullmatch(name)
        if match is None:
            raise InputError(f"{where} has name {shown(name)}, expected such as 'train-000000.tar'; {MEND}")
        samples, sentences = (plain_field(entry, key, int, where) for key in ("samples", "sentences"))
        if not 0 < samples <= sentences:
            raise InputError(f"{where} has {samples} samples with {sentences} sentences; {MEND}")
        if isinstance(self.root, Path):
            path, size = self.root / name, plain_field(entry, "bytes", int, where)
            if not path.is_file():
                raise InputError(f"{path}: no such file, but {INDEX} names it; copy it there")
            if path.stat().st_size != size:
                found = path.stat().st_size
                self._leave_out(
                    InputError(f"{path}: has {found} bytes, but {INDEX} says {size}; copy it again")
                )
        return Shard(name, match[1], samples, sentences)


class ShardWriter:
    """Write samples to shards in a folder; used in a ``with``, after which `finish` writes the index.

    Args:
        folder: A new folder.
        shard_size: Most bytes of a shard, unless a single sample is larger.
    """

    def __init__(self, folder: Path, shard_size: int) -> None:
        folder.mkdir()
        self.folder = folder
        self.shard_size = shard_size
        self.shards: list[dict[str, Any]] = []
        self._written: Counter[str] = Counter()
        self._tar: Any = None
        self._used = 0

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, *_: object) -> None:
        if self._tar is not None:
            self._tar.close()
            self._file.close()
            self._tar = None

    def write(self, image: bytes, records: Sequence[Record]) -> None:
        """Append an image with all of its records, which belong to one split.

        Raises:
            InputError: The split's name cannot be a file's, the image is too large, or a mask is malformed.
        """
        first, name = records[0], f"image {records[0].image_id}"
        if not 0 < len(image) <= LARGEST_MEMBER:
            raise InputError(
                f"{name}: has {len(image)} bytes, expected 1 to {LARGEST_MEMBER}; save it afresh"
            )
        entry = {key: getattr(first, key) for key in ("image_id", "height", "width")}
        entry["refs"] = [ref_entry(refs) for refs in by_ref(records)]
        text = json.dumps(entry, separators=(",", ":")).encode()
        size = sum(_BLOCK + -(-len(part) // _BLOCK) * _BLOCK for part in (image, text))
        if self._tar is None or self.shards[-1]["split"] != first.split or self._full(size):
            self._start(first.split)
        shard = self.shards[-1]
        key = f"{self._written[first.split]:09d}"
        self._written[first.split] += 1
        self._tar.write({"__key__": key, image_suffix(image): image, "json": text})
        self._tar.tarstream.members = []  # tarfile keeps every header otherwise
        self._used += size
        shard["samples"] += 1
        shard["sentences"] += len(records)

    def finish(self, categories: Mapping[int, str], made_of: Mapping[str, Any]) -> None:
        """Write the index."""
        self.__exit__()
        splits = {shard["split"]: {"images": 0, "sentences": 0} for shard in self.shards}
        for shard in self.shards:
            split = splits[shard.pop("split")]
            split["images"] += shard["samples"]
            split["sentences"] += shard["sentences"]
            shard["bytes"] = (self.folder / shard["name"]).stat().st_size
        index = {
            "version": VERSION,
            "made_of": dict(made_of),
            "splits": splits,
            "categories": {str(id): name for id, name in categories.items()},
            "shards": self.shards,
        }
        (self.folder / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")

    def _full(self, size: int) -> bool:
        return -(-(self._used + size + 2 * _BLOCK) // _TAIL) * _TAIL > self.shard_size

    def _start(self, split: str) -> None:
        self.__exit__()
        name = f"{split}-{sum(shard['split'] == split for shard in self.shards):06d}.tar"
        if not _NAME.fullmatch(name):
            raise InputError(f"split {shown(split)}: cannot name a file; rename it with letters and digits")
        self.shards.append({"name": name, "split": split, "samples": 0, "sentences": 0})
        self._used = 0
        # One time for all, so that the bytes of a shard follow from what is in it.
        self._file = (self.folder / name).open("wb")
        self._tar = webdataset().TarWriter(self._file, mtime=0, encoder=False)


def by_ref(records: Iterable[Record]) -> Iterator[list[Record]]:
    """Part records into the neighbours that differ in their sentence alone."""
    same = lambda r: (r.image_id, r.image, r.split, r.ref_id, r.ann_id, r.category_id, id(r.segmentation))
    return (list(group) for _, group in groupby(records, same))


def ref_entry(records: Sequence[Record]) -> dict[str, Any]:
    """Give what a shard holds of one ref: ids, mask and sentences, as plain JSON."""
    ref = records[0]
    entry = {key: plain_ids(getattr(ref, key)) for key in ("ref_id", "ann_id", "category_id")}
    entry["mask"] = None if ref.no_target else plain_mask(ref)
    entry["sentences"] = [
        {"sent_id": one.sent_id, "sent": one.expression} | ({} if one.raw is None else {"raw": one.raw})
        for one in records
    ]
    return entry


def plain_mask(record: Record) -> Any:
    """Give a record's segmentation as polygons or compressed run lengths, ready for JSON.

    Of a PNG's polygons the union is left; a .jsonl names the PNG itself, for protocols that heed overlaps.
    """
    found = record.segmentation
    if isinstance(found, Path):
        found = coco_mask.encode(np.asfortranarray(record.mask().astype(np.uint8)))
    if isinstance(found, dict) and isinstance(found["counts"], bytes):
        found = {"size": list(found["size"]), "counts": found["counts"].decode("ascii")}
    return found


def plain_ids(ids: int | tuple[int, ...]) -> int | list[int]:
    """Give ids ready for JSON."""
    return list(ids) if isinstance(ids, tuple) else ids


def image_suffix(image: bytes) -> str:
    """Tell the ending of an image file from how its content begins."""
    kinds = {b"\xff\xd8\xff": "jpg", b"\x89PNG": "png"}
    return next((suffix for magic, suffix in kinds.items() if image.startswith(magic)), "img")


def _place(root: str | Path) -> Path | str:
    """Tell a folder from an http(s) address, whose slashes a Path may have eaten."""
    match = _URL.fullmatch(str(root))
    if match is not None:
        return f"{match[1]}://{match[2]}".rstrip("/")
    path = Path(root)
    if not path.is_dir():
        raise InputError(f"{root}: no such folder; give one of shards, or the http(s) address of one")
    return path


def _members(stream: BinaryIO, where: str, images: bool) -> Iterator[dict[str, Any]]:
    """Yield name and content of each regular file of a plain tar, as webdataset groups them."""
    key, parts = "", 0
    with tarfile.open(fileobj=stream, mode="r|") as archive:
        for member in archive:
            archive.members = []  # as in ShardWriter.write
            if member.issparse():  # a few bytes could state any size
                raise InputError(f"{where}: member {shown(member.name)} is sparse; write the shard anew")
            if not member.isreg() or not (images or member.name.endswith(".json")):
                continue
            before, key = key, webdataset().tariterators.base_plus_ext(member.name)[0] or ""
            parts = parts + 1 if key == before else 1
            if key and parts > 2:  # all of a sample lies in memory
                raise InputError(
                    f"{where}: sample {shown(key)} has a third member {shown(member.name)}, expected .json "
                    "and one image; write the shard anew"
                )
            if member.size > LARGEST_MEMBER:
                raise InputError(
                    f"{where}: member {shown(member.name)} has {member.size} bytes, at most {LARGEST_MEMBER} "
                    "are read; write the shard anew"
                )
            content = archive.extractfile(member)
            yield {"fname": member.name, "data": content.read() if content else b"", "__url__": where}


def _segmentation(ref: dict[str, Any], height: int, width: int, where: str) -> Any:
    nothing = {"size": [height, width], "counts": [height * width]}
    found = ref.get("mask") or nothing
    if found is nothing and ref.get("ann_id") != []:
        raise InputError(
            f"{where} has no mask, though it names annotation {shown(ref.get('ann_id'))}; {MEND}"
        )
    defect = segmentation_defect(found, height, width)
    if defect is not None:
        raise InputError(f"{where}: {defect}; {MEND}")
    return found


def _ids(ref: dict[str, Any], key: str, where: str) -> int | tuple[int, ...]:
    if isinstance(ref.get(key), list):
        return tuple(plain_list(ref, key, int, where))
    return plain_field(ref, key, int, where)
