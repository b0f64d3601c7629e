"""Check a data set: counts beside the published ones, images, masks, ids, splits; every fault at once."""

import json
import re
import warnings
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from reference_model.data.config import CheckConfig
from reference_model.data.convert import made_of
from reference_model.data.datasets import read
from reference_model.data.images import Folders, image_size, open_image
from reference_model.data.readers.reader import Reader
from reference_model.data.readers.shards import by_ref
from reference_model.data.records import Record
from reference_model.files import InputError

EXAMPLES = 5
"""How many cases of a finding are named."""

ERRORS = {
    "missing images": "put them where the data set names them",
    "unreadable images": "fetch them again",
    "images of another size": "use the images that were annotated",
    "masks that cannot be read": "mend those annotations",
    "empty masks": "mend those annotations, or leave the refs out",
    "entries left out for an id given twice": "number them afresh",
    "sent_ids given twice": "number the sentences afresh",
    "ref_ids of several objects": "number the refs afresh",
    "ann_ids of several objects": "number the annotations afresh",
    "image_ids of several images": "number the images afresh",
    "images in two splits": "move their refs to one split, or what is scored was trained on",
    "records left out": "mend them",
    "splits that end early": "mend what stops them",
    "counts unlike the published": "fetch the data set again, or do not compare with published scores",
}
NOTES = {
    "sentences without words": "blank ones are left out",
    "images in two splits, as published": "so is G-Ref Google made: prefer split_by=umd",
    "sentences that mean several objects of an image": "no model can tell them apart",
    "seen and unseen counts unlike the published": "compare generalisation scores with care",
}


class Published(NamedTuple):
    """Sizes of a published data set."""

    refs: dict[str, int]
    """Split -> refs."""
    sentences: dict[str, int] = {}  # noqa: RUF012
    """Split -> sentences, as far as they are known; ``all`` stands for all splits."""
    parts: dict[str, int] = {}  # noqa: RUF012
    """Part by seen or unseen classes -> refs, as CGFormer counts them."""


def _sizes(names: str, *counts: int) -> dict[str, int]:
    return dict(zip(names.split(), counts, strict=True))


_UNC, _PARTS = "train val testA testB", "train_seen val_seen val_unseen test_seen test_unseen"
# Facts from the tables of CRIS and CGFormer; of gRefCOCO and Ref-ZOM none are at hand.
PUBLISHED = {
    ("refcoco", "unc"): Published(
        _sizes(_UNC, 42404, 3811, 1975, 1810),
        _sizes(_UNC, 120624, 10834, 5657, 5095),
        _sizes(_PARTS, 35473, 3175, 445, 3200, 394),
    ),
    ("refcoco+", "unc"): Published(
        _sizes(_UNC, 42278, 3805, 1975, 1798),
        _sizes(_UNC, 120191, 10758, 5726, 4889),
        _sizes(_PARTS, 35375, 3171, 444, 3189, 394),
    ),
    ("refcocog", "umd"): Published(
        _sizes("train val test", 42226, 2573, 5023),
        {"all": 95010},
        _sizes(_PARTS, 33093, 2000, 386, 3935, 759),
    ),
    ("refcocog", "google"): Published(
        _sizes("train val", 44822, 5000), {}, _sizes("train_seen val_seen val_unseen", 35105, 3923, 760)
    ),
}
# What readers say of the records that they leave out -> what kind of finding that is.
_LEFT_OUT = {
    r"has no words$": "sentences without words",
    r"which is .*; put the mask": "masks that cannot be read",
    r"which is (missing|not a file|a link)": "missing images",
    r"a second time": "entries left out for an id given twice",
    r"": "records left out",
}
_CRIS_NAMES = {"refcocog_u": ("refcocog", "umd"), "refcocog_g": ("refcocog", "google")}


@dataclass
class Finding:
    """One kind of thing that was found."""

    count: int = 0
    first: list[str] = field(default_factory=list)
    """The first cases, with file and record."""


@dataclass
class Report:
    """All that a check tells."""

    source: str
    splits: dict[str, dict[str, int]] = field(default_factory=dict)
    """Split -> refs, sentences, images, no_target."""
    parts: dict[str, int] = field(default_factory=dict)
    """Part by seen or unseen classes -> refs, where published sizes are known."""
    published: dict[str, dict[str, int]] = field(default_factory=dict)
    """refs, sentences and parts, as in `Published`; empty where the data set is none of those."""
    errors: dict[str, Finding] = field(default_factory=dict)
    notes: dict[str, Finding] = field(default_factory=dict)

    @property
    def sound(self) -> bool:
        """Whether nothing is wrong; notes are no errors."""
        return not self.errors

    def add(self, kind: str, case: str) -> None:
        """Count a case of one of ``ERRORS`` or ``NOTES``."""
        finding = (self.errors if kind in ERRORS else self.notes).setdefault(kind, Finding())
        finding.count += 1
        if len(finding.first) < EXAMPLES:
            finding.first.append(case)


def check(config: CheckConfig) -> bool:
    """Run the command ``data check``: print a report, and tell whether the data set is sound.

    Raises:
        InputError: The data set cannot be read at all.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the report says it all
        reader = read(replace(config.data, on_error="skip"))
        total = sum(reader.splits.values())
        with tqdm(total=total, desc="check", unit="sentence", leave=False, disable=None) as bar:
            report = inspect(reader, made_of(reader, config.data), decode=config.images, advance=bar.update)
    if config.json:
        print(json.dumps(asdict(report) | {"sound": report.sound}, indent=2))
    else:
        print(shown_report(report))
    return report.sound


def inspect(
    reader: Reader,
    origin: dict[str, Any],
    *,
    decode: bool = False,
    advance: Callable[[int], Any] = lambda sentences: None,
) -> Report:
    """Look at every record of a reader that skips malformed ones.

    Args:
        reader: Of any layout.
        origin: Which data set it is, as `made_of` tells.
        decode: Decode every image too.
        advance: Told the count of sentences looked at, from time to time.
    """
    report, looks = Report(str(reader.source)), _Looks(decode)
    for split in reader.splits:
        try:
            for records in by_ref(reader.stream(split)):
                for kind, case in looks.at(records):
                    report.add(kind, case)
                advance(len(records))
        except InputError as error:
            report.add("splits that end early", f"{split}: {error}")
        report.splits[split] = looks.counts(split)
    for line in reader.skipped:
        report.add(next(kind for said, kind in _LEFT_OUT.items() if re.search(said, line)), line)
    known = _published(origin)
    google = known is PUBLISHED["refcocog", "google"]
    for one, other in combinations(reader.splits, 2):
        shared = looks.images[one] & looks.images[other]
        kind = "images in two splits" + ", as published" * google
        for image in sorted(map(str, shared)):
            report.add(kind, f"{image}: in {one} and {other}")
    if known is not None:
        _compare(report, reader, known)
    return report


class _Looks:
    """What is remembered from record to record: ids and, by split, images; no record itself."""

    def __init__(self, decode: bool) -> None:
        self.decode = decode
        self.images: defaultdict[str, set[Path | int]] = defaultdict(set)
        self._folders = Folders()
        self._counts: defaultdict[str, dict[str, int]] = defaultdict(lambda: {"sentences": 0, "no_target": 0})
        self._ref_ids: defaultdict[str, set[int]] = defaultdict(set)
        self._sent_ids: set[int] = set()
        self._ref_of: dict[int, tuple] = {}
        self._annotation_of: dict[int, tuple[int, int]] = {}
        self._image_of: dict[int, Path | int] = {}
        self._meant: dict[int, int | tuple[int, ...]] = {}

    def counts(self, split: str) -> dict[str, int]:
        """Give refs, sentences, images and sentences without a target of a split so far."""
        found = self._counts[split]
        return {
            "refs": len(self._ref_ids[split]),
            "sentences": found["sentences"],
            "images": len(self.images[split]),
            "no_target": found["no_target"],
        }

    def at(self, records: list[Record]) -> Iterator[tuple[str, str]]:
        """Look at the sentences of one ref; yield (kind, case) of what is found."""
        ref = records[0]
        name = f"{ref.image_name} (ref {ref.ref_id})"
        image: Path | int = hash(ref.image) if isinstance(ref.image, bytes) else ref.image
        if self._image_of.setdefault(ref.image_id, image) != image:
            yield "image_ids of several images", f"{name}: image_id {ref.image_id}"
        if image not in self.images[ref.split]:
            self.images[ref.split].add(image)
            yield from self._at_image(ref, name)
        same = (ref.split, ref.image_id, ref.ann_id)
        if self._ref_of.setdefault(ref.ref_id, same) != same:
            yield "ref_ids of several objects", name
        self._ref_ids[ref.split].add(ref.ref_id)
        yield from self._at_mask(ref, name)
        for record in records:
            yield from self._at_sentence(record, image, f"{name}, sentence {record.sent_id}")

    def _at_image(self, ref: Record, name: str) -> Iterator[tuple[str, str]]:
        defect = None if isinstance(ref.image, bytes) else self._folders.defect(ref.image)
        if defect is not None:
            yield "missing images", f"{name}: {defect}"
            return
        stated = (ref.height, ref.width)
        try:
            another = image_size(ref.image, name=ref.image_name) != stated
        except InputError as error:
            yield "unreadable images", str(error)
            return
        if another or self.decode:
            try:  # an image as stored, before its EXIF turn, is of the stated size too
                open_image(ref.image, height_width=stated, name=ref.image_name)
            except InputError as error:
                yield "images of another size" if another else "unreadable images", str(error)

    def _at_mask(self, ref: Record, name: str) -> Iterator[tuple[str, str]]:
        if ref.no_target:
            return
        try:
            mask = ref.mask()
        except InputError as error:
            yield "masks that cannot be read", str(error)
            return
        if not mask.any():
            yield "empty masks", f"{name}: annotation {ref.ann_id}"
        if isinstance(ref.ann_id, int):
            same = (ref.image_id, zlib.crc32(np.packbits(mask).tobytes()))
            if self._annotation_of.setdefault(ref.ann_id, same) != same:
                yield "ann_ids of several objects", f"{name}: annotation {ref.ann_id}"

    def _at_sentence(self, record: Record, image: Path | int, name: str) -> Iterator[tuple[str, str]]:
        count = self._counts[record.split]
        count["sentences"] += 1
        count["no_target"] += record.no_target
        if record.sent_id in self._sent_ids:
            yield "sent_ids given twice", name
        self._sent_ids.add(record.sent_id)
        if not any(map(str.isalnum, record.expression)):
            yield "sentences without words", f"{name}: {record.expression!r}"
        words = hash((image, record.expression.casefold()))
        if self._meant.setdefault(words, record.ann_id) != record.ann_id:
            yield "sentences that mean several objects of an image", f"{name}: {record.expression!r}"


def _published(origin: dict[str, Any]) -> Published | None:
    """Find the published sizes of a data set that is not a generated one of the same name."""
    name = (origin.get("dataset"), origin.get("split_by"))
    return None if origin.get("generated") else PUBLISHED.get(_CRIS_NAMES.get(name[0], name))


def _compare(report: Report, reader: Reader, known: Published) -> None:
    """Set the counts beside the published ones."""
    report.published = known._asdict()
    blank = sum("has no words" in line for line in reader.skipped)
    found = report.splits | {
        "all": {
            what: sum(counts[what] for counts in report.splits.values()) for what in ("refs", "sentences")
        }
    }
    for what in ("refs", "sentences"):
        for split, expected in report.published[what].items():
            count = found.get(split, {}).get(what, 0)
            # Published files hold a few blank sentences, which readers leave out.
            if count != expected and not (what == "sentences" and count < expected <= count + blank):
                report.add(
                    "counts unlike the published", f"{split}: {count:,} {what}, published {expected:,}"
                )
    for part, expected in known.parts.items():
        try:
            count = len({record.ref_id for record in reader.stream(part)})
        except InputError as error:
            report.add("seen and unseen counts unlike the published", f"{part}: {error}")
            continue
        report.parts[part] = count
        if count != expected:
            report.add(
                "seen and unseen counts unlike the published",
                f"{part}: {count:,} refs, published {expected:,}",
            )


def shown_report(report: Report) -> str:
    """Lay a report out for a person."""
    refs, sentences = (report.published.get(what, {}) for what in ("refs", "sentences"))
    rows = [["split", "refs", "published", "sentences", "published", "images", "no target"]]
    for split, count in report.splits.items():
        cells = [count["refs"], refs.get(split), count["sentences"], sentences.get(split)]
        rows.append([split, *map(_cell, [*cells, count["images"], count["no_target"]])])
    for part, count in report.parts.items():
        rows.append([part, _cell(count), _cell(report.published["parts"][part]), "", "", "", ""])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [report.source]
    for first, *others in rows:
        cells = (cell.rjust(width) for cell, width in zip(others, widths[1:]))
        lines.append("  ".join([first.ljust(widths[0]), *cells]).rstrip())
    for name, findings, steps in (("error", report.errors, ERRORS), ("note", report.notes, NOTES)):
        for kind, finding in findings.items():
            lines.append(f"{name}: {finding.count:,} {kind}; {steps[kind]}")
            lines += [f"    {case}" for case in finding.first]
            lines += [f"    and {finding.count - EXAMPLES:,} more"] * (finding.count > EXAMPLES)
    verdict = "sound" if report.sound else f"not sound: {', '.join(report.errors)}"
    return "\n".join([*lines, verdict])


def _cell(count: int | None) -> str:
    return "-" if count is None else f"{count:,}"
