"""Convert a data set of any known layout to JSONL, which names its images, or to shards, which hold them."""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from reference_model.data.config import ConvertConfig, DataConfig
from reference_model.data.datasets import read
from reference_model.data.readers.parquet import Hub
from reference_model.data.readers.reader import Reader
from reference_model.data.readers.shards import (
    Shards,
    ShardWriter,
    by_ref,
    image_suffix,
    plain_ids,
    plain_mask,
)
from reference_model.data.records import Record
from reference_model.data.splits import CATEGORIES, LISTS, lists_of
from reference_model.data.untrusted import note_beside, note_of, plain_path, read_bytes
from reference_model.files import InputError, written_whole

GENERATED = "generated.json"
_NO_FOLDER = (".json", ".ndjson", ".tar", ".parquet")
WAITING = 32_768
"""Images of shards that wait for further refs at most; one whose refs lie further apart is stored again."""

# What git clone and the Hub's cache call the folder of jxu124's data sets -> which those are.
_CLONE = re.compile(r"(?:.*--)?(refcoco(?:plus|g)?)")
_CRIS = {"refcocog_u": ("refcocog", "umd"), "refcocog_g": ("refcocog", "google")}
_HUB = {"refcoco": ("refcoco", "unc"), "refcocoplus": ("refcoco+", "unc"), "refcocog": ("refcocog", "umd")}

Counts = dict[str, dict[str, int]]
"""Split -> what -> how many."""


def convert(config: ConvertConfig) -> Path:
    """Run the command ``convert`` and return what it wrote.

    Raises:
        InputError: The data, a split or the place to write cannot be used.
    """
    out = config.out
    if not 1 <= config.shard_size <= 2**20:
        raise InputError(f"shard_size: must be in [1, 1048576] MiB, got {config.shard_size}")
    if not out.name or out.suffix.lower() in _NO_FOLDER or out.suffix.lower() == ".jsonl" != out.suffix:
        raise InputError(f"out {out}: expected NAME.jsonl, or a folder for shards")
    lines = out.suffix == ".jsonl"
    notes = [note_of(out, name) for name in (GENERATED, LISTS, CATEGORIES)] if lines else []
    for path in (out, *notes):
        if path.exists():
            raise InputError(f"{path}: is there already; choose another --out or remove it")
    # Both forms of a sentence are kept, and data.text chooses among them when the output is read.
    reader = read(replace(config.data, text="sent"))
    splits = _splits(reader, config.splits)
    write = _write_lines if lines else _write_shards
    total = sum(reader.splits[split] for split in splits)
    with tqdm(total=total, desc="convert", unit="sentence", leave=False, disable=None) as bar:
        counts, left_out = write(config, reader, splits, bar.update)
    left_out += len(reader.skipped)
    if config.json:
        print(json.dumps({"out": str(out), "splits": counts, "left_out": left_out}))
        return out
    parts = [
        f"{split} " + ", ".join(f"{n} {what}" for what, n in found.items()) for split, found in counts.items()
    ]
    print(f"{out}: {'; '.join(parts)}" + f"; {left_out} left out" * (left_out > 0))
    return out


def made_of(reader: Reader, data: DataConfig) -> dict[str, Any]:
    """Tell which data set a reader reads, as far as its files say: what ``made_of`` in shards keeps."""
    if isinstance(reader, Shards):
        return reader.made_of
    name: tuple[str | None, str | None] = (None, None)
    if isinstance(reader, Hub):
        clones = [found[1] for part in data.root.parts if (found := _CLONE.fullmatch(part))]
        name = _HUB[clones[-1]] if clones else name
    # Layouts that hold one data set do not look at the config's dataset.
    for part in reader.source.parts[len(data.root.parts) :]:
        if part in (data.dataset, f"{data.dataset}_{data.split_by[:1]}"):
            name = _CRIS.get(part, (part, data.split_by))
    generated = generated_note(data.root) is not None
    return {"dataset": name[0], "split_by": name[1], "generated": generated}


def generated_note(root: Path) -> Path | None:
    """Find the settings by which the data set at ``data.root`` was generated; None where it was not."""
    return note_beside(root, GENERATED)


def _splits(reader: Reader, wanted: str | None) -> list[str]:
    names = list(reader.splits) if wanted is None else [name.strip() for name in wanted.split(",")]
    for name in names:
        if name not in reader.splits or names.count(name) > 1:
            known = ", ".join(reader.splits)
            raise InputError(f"splits: {name!r}, expected some of {known}, each once; parts are made of them")
    return names


def _write_lines(
    config: ConvertConfig, reader: Reader, splits: list[str], advance: Callable[[int], Any]
) -> tuple[Counts, int]:
    """Write one line a ref. Images that records hold become files of a folder NAME_images."""
    out, counts = config.out, {}
    folder = out.with_name(f"{out.stem}_images")
    if reader.streamed and folder.exists():
        raise InputError(f"{folder}: is there already; choose another --out or remove it")
    with (
        written_whole(out) as fresh,
        written_whole(folder, flush=False) if reader.streamed else nullcontext(folder) as images,
        fresh.open("w", encoding="utf-8") as file,
    ):
        if reader.streamed:
            images.mkdir()
        for split in splits:
            count = counts[split] = {"sentences": 0, "refs": 0}
            for refs in by_ref(reader.stream(split)):
                image = _image_file(refs[0], images) if reader.streamed else refs[0].image
                entry = _line(refs, folder / image.name if reader.streamed else image, out)
                file.write(json.dumps(entry, ensure_ascii=False) + "\n")
                count["sentences"] += len(refs)
                count["refs"] += 1
                advance(len(refs))
        _copy_notes(config, reader, partial(note_of, out))
        if reader.categories:
            names = {str(id): name for id, name in reader.categories.items()}
            with written_whole(note_of(out, CATEGORIES)) as path:
                path.write_text(json.dumps(names, indent=1) + "\n", encoding="utf-8")
    return counts, 0


def _line(records: list[Record], image: Path, out: Path) -> dict[str, Any]:
    ref = records[0]
    mask = None if ref.no_target else ref.segmentation
    many = len(records) > 1
    raws = [one.expression if one.raw is None else one.raw for one in records]
    cleaned = any(one.raw is not None for one in records)
    return {
        "image": _beside(image, out),
        "expression": [one.expression for one in records] if many else ref.expression,
        **({"raw": raws if many else raws[0]} if cleaned else {}),
        "mask": _beside(mask, out) if isinstance(mask, Path) else mask and plain_mask(ref),
        "split": ref.split,
        "height": ref.height,
        "width": ref.width,
        "image_id": ref.image_id,
        "ref_id": ref.ref_id,
        "sent_id": [one.sent_id for one in records] if many else ref.sent_id,
        "ann_id": plain_ids(ref.ann_id),
        "category_id": plain_ids(ref.category_id),
    }


def _beside(path: Path, out: Path) -> str:
    """Name a file as seen from the folder of ``out``, which must be above it."""
    folder = Path(os.path.abspath(out)).parent  # links stay: an image folder is often one
    try:
        name = Path(os.path.abspath(path)).relative_to(folder).as_posix()
    except ValueError as error:
        raise InputError(
            f"{path}: lies outside of {folder}, and a .jsonl names what is beside it; choose an --out above "
            "the images, or a folder for shards, which hold them"
        ) from error
    if not plain_path(name):
        raise InputError(f"{path}: has a name that a .jsonl cannot hold; rename it without \\ and :")
    return name


def _image_file(record: Record, folder: Path) -> Path:
    path = folder / f"{record.image_id}.{image_suffix(record.image)}"
    if not path.exists():
        path.write_bytes(record.image)
    elif path.read_bytes() != record.image:
        raise InputError(f"image_id {record.image_id}: is that of several images; see metris data check")
    return path


def _write_shards(
    config: ConvertConfig, reader: Reader, splits: list[str], advance: Callable[[int], Any]
) -> tuple[Counts, int]:
    """Write one sample an image, with its bytes as they are."""
    counts, left_out = {}, 0
    with (
        written_whole(config.out, flush=False) as fresh,
        ShardWriter(fresh, config.shard_size * 2**20) as writer,
    ):
        for split in splits:
            count = counts[split] = {"sentences": 0, "refs": 0, "images": 0}
            # Where records hold their images, few can wait: such layouts have those of an image together.
            for records in _by_image(reader.stream(split), 1 if reader.streamed else WAITING):
                advance(len(records))
                try:
                    image = records[0].image
                    writer.write(image if isinstance(image, bytes) else read_bytes(image), records)
                except InputError:
                    if config.data.on_error == "stop":
                        raise
                    left_out += len(records)
                    continue
                count["sentences"] += len(records)
                count["refs"] += len(list(by_ref(records)))
                count["images"] += 1
        writer.finish(reader.categories, made_of(reader, config.data))
        _copy_notes(config, reader, fresh.joinpath)
    return counts, left_out


def _by_image(records: Iterable[Record], most: int) -> Iterator[list[Record]]:
    """Yield the records of each image together, with at most ``most`` images waiting for further ones."""
    waiting: dict[tuple[int, Path | bytes], list[Record]] = {}
    for record in records:
        key = record.image_id, record.image
        if key not in waiting and len(waiting) == most:
            yield waiting.pop(next(iter(waiting)))
        waiting.setdefault(key, []).append(record)
    yield from waiting.values()


def _copy_notes(config: ConvertConfig, reader: Reader, place: Callable[[str], Path]) -> None:
    """Take along what goes with the data: that it was generated, and its lists of classes."""
    found = {GENERATED: generated_note(config.data.root), LISTS: lists_of(reader.source)}
    for name, path in found.items():
        if path is not None:
            with written_whole(place(name)) as fresh:
                shutil.copyfile(path, fresh)
