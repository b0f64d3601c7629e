"""Whatever a file holds, a reader gives sound records or one line of InputError, and soon.

The suite runs 180 cases of each reader. More, with a table:

    python -m tests.reference_model.data.readers.test_fuzz_readers 10000
"""

import copy
import faulthandler
import io
import json
import pickle
import random
import signal
import sys
import tarfile
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from PIL import Image
from pyarrow import parquet

from reference_model.data.config import ConvertConfig, DataConfig
from reference_model.data.convert import convert
from reference_model.data.dataset import ReferringDataset
from reference_model.data.images import image_size, open_image, open_mask
from reference_model.data.readers.cris import Cris
from reference_model.data.readers.grefer import GRefer, RefZom
from reference_model.data.readers.jsonl import Jsonl
from reference_model.data.readers.parquet import Hub
from reference_model.data.readers.refer import Refer
from reference_model.data.readers.shards import Shards
from reference_model.data.streaming import ShardedDataset
from reference_model.files import InputError
from tests.reference_model.data.readers import test_cris, test_grefer, test_jsonl, test_refer
from tests.reference_model.data.readers import test_parquet as test_hub

MOST_SECONDS = 5.0
"""A case that takes more of this process hangs."""

HOSTILE = (
    *(None, True, 0, -1, 1, 2**31, 2**63, 10**400, 0.5, -0.0, 1e308, float("nan"), float("inf")),
    *("", " ", "\0", "..", "../../x.jpg", "/etc/passwd", "a\nb", "é" * 50, "\ud800", "x" * 20_000),
    *([], {}, [[]], [None], {"": None}, [[0, 0, 1e9, 0, 1, 1]], [[0] * 7], [["0"] * 6]),
    *({"size": [12, 16], "counts": "04"}, {"size": [12, 16], "counts": [192]}, {"counts": b"x"}),
    {"boxes": [[]]},
)  # fmt: skip


KINDS = ("jpg", "png", "tiff", "gif", "bmp", "webp", "ppm")


class Part(NamedTuple):
    """A file of a data set: its content as plain data, and what makes bytes of that."""

    value: Any
    encode: Callable[[Any], bytes]


@dataclass
class Subject:
    """A reader, and a sound data set of its layout."""

    write: Callable[[Path], Any]
    parts: dict[str, Part]
    read: Callable[[Path, str], None]
    more: tuple[str, ...] = ()
    """Files whose bytes alone are changed."""


@dataclass
class Tally:
    """What became of the cases of a reader."""

    cases: Counter = field(default_factory=Counter)
    slowest: float = 0.0
    failures: list[str] = field(default_factory=list)


class Hang(BaseException):
    """A case took too long."""


def as_json(value):
    return json.dumps(value, default=lambda other: other.decode("latin-1")).encode()


def as_pickle(value):
    return pickle.dumps(value, protocol=2)


def as_lines(value):
    lines = value if isinstance(value, list) else [value]
    return b"\n".join(as_json(line) for line in lines)


def as_parquet(value):
    """Types that the columns cannot hold are left to pyarrow to guess; where it cannot, there is no case."""
    stream = io.BytesIO()
    rows = [row for row in value if isinstance(row, dict)] if isinstance(value, list) else []
    try:
        table = pa.Table.from_pylist(rows, schema=test_hub.COLUMNS)
    except (pa.ArrowException, TypeError, ValueError, OverflowError):
        table = pa.Table.from_pylist(rows)
    parquet.write_table(table, stream, row_group_size=1, compression="none")
    return stream.getvalue()


def read_whole(reader):
    """Ask a reader for everything, and check that what it gives is sound."""
    for split in reader.splits:
        records = reader.records(split)
        assert len(records) == reader.splits[split] > 0
        for record in records:
            assert record.mask().shape == record.mask("exactly_one").shape == (record.height, record.width)
            assert not (record.no_target and record.mask().any())
            assert record.expression == record.expression.strip() != ""
            assert ".." not in record.image.parts and record.image.is_file()
            assert all(type(number) is int for number in (record.ref_id, record.sent_id, record.image_id))
        ReferringDataset(records, 8, on_error=reader.on_error).__getitems__(range(len(records)))
    assert all("\n" not in reason and len(reason) < 1500 for reason in reader.skipped)


def read_images(root, on_error):
    for path in sorted(root.glob("picture.*")):
        size = image_size(path)
        image = open_image(path)
        assert image.mode == "RGB" and (image.height, image.width) == size
    assert open_mask(root / "mask.png", 12, 16).shape == (12, 16)


def read_shards(root, on_error):
    """Stream and decode every split; what the index says of the sizes of shards is made true first."""
    index = root / "index.json"
    before = index.read_bytes()
    with suppress(ValueError, TypeError, KeyError, AttributeError, OSError, RecursionError):
        told = json.loads(before)
        for shard in told["shards"]:
            shard["bytes"] = (root / Path(shard["name"]).name).stat().st_size
        index.write_text(json.dumps(told))
    try:
        reader = Shards(root, on_error=on_error)
        for split in reader.splits:
            for record in reader.stream(split):
                assert record.mask().shape == (record.height, record.width)
                assert type(record.image) is bytes and record.expression.strip() != ""
            dataset = ShardedDataset(reader, split, 8)
            assert all(item.image.shape == (3, 8, 8) for items in dataset for item in items)
    finally:
        index.write_bytes(before)


def as_tar(value):
    """A tar of members [name, content], where a content that is not bytes is JSON."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.GNU_FORMAT) as archive:
        for name, content in value:
            if type(name) is not str:
                raise TypeError("no tar has a member of such a name")
            data = content if isinstance(content, bytes) else as_json(content)
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return stream.getvalue()


def shards_subject(refs, instances):
    """The data set of the subject refer, converted."""
    with tempfile.TemporaryDirectory() as folder:
        test_refer.written(Path(folder) / "refer", refs, instances)
        made = convert(ConvertConfig(DataConfig(Path(folder) / "refer"), Path(folder) / "shards"))
        files = {path.name: path.read_bytes() for path in sorted(made.iterdir())}
    name = "train-000000.tar"
    with tarfile.open(fileobj=io.BytesIO(files[name])) as archive:
        members = [[member.name, archive.extractfile(member).read()] for member in archive]
    parted = [[path, json.loads(data) if path.endswith(".json") else data] for path, data in members]

    def write(root):
        for path, data in files.items():
            (root / path).write_bytes(data)

    index = Part(json.loads(files["index.json"]), as_json)
    return Subject(write, {"index.json": index, name: Part(parted, as_tar)}, read_shards)


def write_images(root):
    picture = Image.effect_noise((16, 12), 90).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6
    for kind in KINDS:
        picture.save(root / f"picture.{kind}", exif=exif)
    picture.quantize(16).save(root / "picture.p.png", transparency=3)
    Image.new("L", (16, 12)).save(root / "mask.png")


def zom_write(root):
    test_grefer.zom_written(root, *test_grefer.zom())


def subjects() -> dict[str, Subject]:
    refs, instances = test_refer.refs_and_instances()
    several, of_several = test_grefer.refs_and_instances()
    zom, of_zom = test_grefer.zom()
    of_cris, of_hub = test_cris.splits(), test_hub.rows()
    picture = "images/train2014/COCO_train2014_000000000100.jpg"
    lines = [
        test_jsonl.entry(),
        test_jsonl.entry(expression=["one", "two"], split="val", height=12, width=16, sent_id=[1, 2]),
        test_jsonl.entry(image="pictures/b.jpg", mask="one.png", image_id=7, ann_id=[3, 4], category_id=5),
        test_jsonl.entry(mask={"boxes": [[1, 2, 3, 4], [5.5, 2, 3, 4]]}, raw="Raw"),
        test_jsonl.entry(mask=test_jsonl.runs_of(test_jsonl.filled(2, 3, 9, 8))),
        test_jsonl.entry(mask=None),
    ]
    return {
        "refer": Subject(
            lambda root: test_refer.written(root, refs, instances),
            {
                "refcoco/refs(unc).p": Part(refs, as_pickle),
                "refcoco/instances.json": Part(instances, as_json),
            },
            lambda root, on_error: read_whole(Refer(root, on_error=on_error)),
            (picture,),
        ),
        "refer, Python 2": Subject(
            lambda root: test_refer.written(root, test_refer.python2_pickle(refs, 0), instances),
            {"refcoco/refs(unc).p": Part(refs, lambda value: pickle.dumps(value, protocol=0))},
            lambda root, on_error: read_whole(Refer(root, on_error=on_error)),
        ),
        "grefer": Subject(
            lambda root: test_grefer.written(root, several, of_several),
            {
                "grefcoco/grefs(unc).json": Part(several, as_json),
                "grefcoco/instances.json": Part(of_several, as_json),
            },
            lambda root, on_error: read_whole(GRefer(root, "grefcoco", on_error=on_error)),
        ),
        "ref-zom": Subject(
            zom_write,
            {"ref-zom/refs(final).p": Part(zom, as_pickle), "ref-zom/instances.json": Part(of_zom, as_json)},
            lambda root, on_error: read_whole(RefZom(root, "ref-zom", "final", on_error=on_error)),
        ),
        "cris": Subject(
            lambda root: test_cris.written(root, of_cris),
            {f"anns/refcoco/{split}.json": Part(found, as_json) for split, found in of_cris.items()},
            lambda root, on_error: read_whole(Cris(root, on_error=on_error)),
            ("masks/refcoco/1.png", "masks/refcoco/3.png", picture),
        ),
        "hub": Subject(
            lambda root: test_hub.written(root, of_hub),
            {
                f"data/{split}-00000-of-00001-0abc.parquet": Part(found, as_parquet)
                for split, found in of_hub.items()
            },
            lambda root, on_error: read_whole(Hub(root, on_error=on_error)),
        ),
        "jsonl": Subject(
            lambda root: test_jsonl.written(root, *lines),
            {"data.jsonl": Part(lines, as_lines)},
            lambda root, on_error: read_whole(Jsonl(root / "data.jsonl", on_error=on_error)),
            ("one.png", "pictures/a.jpg"),
        ),
        "shards": shards_subject(refs, instances),
        "images": Subject(
            write_images,
            {},
            read_images,
            ("mask.png", "picture.p.png", *(f"picture.{kind}" for kind in KINDS)),
        ),
    }  # fmt: skip


# ---- cases --------------------------------------------------------------------------------------


def places_in(value, path=()) -> Iterator[tuple]:
    """Yield the path to every value inside of a value, also inside of JSON text in it."""
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield (*path, key)
            yield from places_in(inner, (*path, key))
    elif isinstance(value, str) and value[:1] in ("{", "["):
        with suppress(ValueError):
            yield from places_in(json.loads(value), (*path, json))


def at(value, path):
    for key in path:
        value = json.loads(value) if key is json else value[key]
    return value


def swapped(value, path, other):
    """Put another value at a path; ... takes out what is there."""
    if not path:
        return other
    key, *rest = path
    if key is json:
        return json.dumps(swapped(json.loads(value), rest, other), default=repr)
    value = copy.copy(value)
    if not rest and other is ...:
        del value[key]
    else:
        value[key] = swapped(value[key], rest, other)
    return value


def changed_bytes(data: bytes, rng: random.Random) -> bytes:
    """Truncate, or change, repeat, insert and delete a few bytes; or a word of text."""
    kind = rng.randrange(8)
    if kind == 0:
        return data[: rng.randrange(len(data))]
    if kind < 3 and data[:1] in b"[{":
        return test_grefer.edited(data, rng)
    if kind < 5:  # headers are where the harm is
        head = bytearray(data)
        for _ in range(rng.randrange(1, 5)):
            head[rng.randrange(min(len(head), rng.choice((16, 64, 256))))] = rng.choice(
                (0, 255, rng.randrange(256))
            )
        return bytes(head)
    if kind == 5 and data[-4:] == b"PAR1":  # parquet's header is at its end
        tail = bytearray(data)
        for _ in range(rng.randrange(1, 5)):
            tail[-rng.randrange(1, min(len(tail), 2000))] = rng.randrange(256)
        return bytes(tail)
    return test_refer.mutated(data, rng)


class Bench:
    """Runs cases of one subject in a folder of its own, one after the other."""

    def __init__(self, subject: Subject, root: Path) -> None:
        self.subject = subject
        self.root = root
        subject.write(root)
        self.sound = {name: (root / name).read_bytes() for name in (*subject.parts, *subject.more)}
        self.tally = Tally()

    def run(self, files: dict[str, bytes], on_error: str) -> None:
        """Read the data set with some files changed, and note what became of it."""
        for name, data in files.items():
            (self.root / name).write_bytes(data)
        started = time.process_time()
        try:
            with time_limit(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self.subject.read(self.root, on_error)
            outcome = "read"
        except InputError as error:
            outcome = "refused" if self._is_clear(str(error)) else "unclear"
        except Hang:
            outcome = "hang"
        except Exception as error:  # noqa: BLE001 - what else comes out is what is looked for
            outcome = type(error).__name__
            self.tally.failures.append(f"{outcome}: {error}"[:300])
        finally:
            self.tally.slowest = max(self.tally.slowest, time.process_time() - started)
            for name in files:
                (self.root / name).write_bytes(self.sound[name])
        self.tally.cases[outcome] += 1

    def _is_clear(self, message: str) -> bool:
        clear = "\n" not in message and len(message) < 1500 and str(self.root) in message
        if not clear:
            self.tally.failures.append(message[:300])
        return clear

    def bytes_case(self, rng: random.Random) -> None:
        """Change the bytes of one file, or of two."""
        names = rng.sample(list(self.sound), min(len(self.sound), rng.choice((1, 1, 1, 2))))
        on_error = rng.choice(("stop", "skip"))
        self.run({name: changed_bytes(self.sound[name], rng) for name in names}, on_error)

    def value_case(self, data: st.DataObject) -> None:
        """Put hostile values, or ones from elsewhere in the file, into one to three places of a file."""
        name = data.draw(st.sampled_from(sorted(self.subject.parts)))
        value, encode = self.subject.parts[name]
        for _ in range(data.draw(st.integers(1, 3))):
            places = list(places_in(value))
            if not places:
                break
            path = data.draw(st.sampled_from(places))
            other = data.draw(
                st.sampled_from(HOSTILE)
                | st.just(...)
                | st.sampled_from(places).map(lambda place, value=value: at(value, place))
                | st.integers(-(2**70), 2**70)
                | st.floats()
                | st.text(max_size=8)
                | st.lists(st.floats(-40, 60), max_size=9)
            )
            value = swapped(value, path, other)
        try:
            content = encode(value)
        except (pa.ArrowException, TypeError, ValueError, OverflowError, RecursionError):
            self.tally.cases["no such file"] += 1
            return
        self.run({name: content}, data.draw(st.sampled_from(["stop", "skip"])))


@contextmanager
def time_limit() -> Iterator[None]:
    """Raise Hang after MOST_SECONDS of this process, or after a minute of waiting for something."""
    late = []

    def stop(*_: Any) -> None:
        late.append(True)
        raise Hang

    before = {number: signal.signal(number, stop) for number in (signal.SIGPROF, signal.SIGALRM)}
    signal.setitimer(signal.ITIMER_PROF, MOST_SECONDS)
    signal.setitimer(signal.ITIMER_REAL, 12 * MOST_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)
    if late:  # and what it was raised in swallowed it
        raise Hang


def value_cases(bench: Bench, count: int) -> None:
    @seed(5)
    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def run(data):
        bench.value_case(data)

    run()


SUBJECTS = subjects()
SOUND_ENDS = {"read", "refused", "no such file"}


@pytest.mark.parametrize("name", SUBJECTS)
def test_sound_data_is_read(tmp_path, name):
    bench = Bench(SUBJECTS[name], tmp_path)
    for on_error in ("stop", "skip"):
        bench.run({}, on_error)
    assert bench.tally.cases == {"read": 2}, bench.tally.failures


@pytest.mark.parametrize("name", SUBJECTS)
def test_changed_bytes_give_records_or_an_input_error(tmp_path, name):
    bench, rng = Bench(SUBJECTS[name], tmp_path), random.Random(17)
    for _ in range(120):
        bench.bytes_case(rng)
    assert set(bench.tally.cases) <= SOUND_ENDS, bench.tally.failures
    assert min(bench.tally.cases["read"], bench.tally.cases["refused"]) > 2  # the changes reach both ends


@pytest.mark.parametrize("name", [name for name in SUBJECTS if SUBJECTS[name].parts])
def test_swapped_values_give_records_or_an_input_error(tmp_path, name):
    bench = Bench(SUBJECTS[name], tmp_path)
    value_cases(bench, 60)
    assert set(bench.tally.cases) <= SOUND_ENDS, bench.tally.failures
    assert min(bench.tally.cases["read"], bench.tally.cases["refused"]) > 2


def main(arguments: list[str]) -> int:
    """Run many cases of each reader, or of those named, and print what became of them."""
    faulthandler.enable()
    count = int(arguments[0]) if arguments else 10_000
    failed = 0
    head = ("cases", "read", "InputError", "other", "slowest, s", "all, s")  # seconds of this process
    print(f"{'reader':16}" + "".join(f"{name:>12}" for name in head))
    for name in arguments[1:] or SUBJECTS:
        with tempfile.TemporaryDirectory() as folder:
            bench, rng = Bench(SUBJECTS[name], Path(folder)), random.Random(f"{name} {count}")
            started = time.process_time()
            if SUBJECTS[name].parts:
                value_cases(bench, count // 2)
            while sum(bench.tally.cases.values()) - bench.tally.cases["no such file"] < count:
                bench.bytes_case(rng)
        ends = bench.tally.cases
        other = sum(number for end, number in ends.items() if end not in SOUND_ENDS)
        row = (ends["read"] + ends["refused"] + other, ends["read"], ends["refused"], other)
        times = (bench.tally.slowest, time.process_time() - started)
        print(
            f"{name:16}" + "".join(f"{n:12}" for n in row) + "".join(f"{t:12.2f}" for t in times), flush=True
        )
        for failure in bench.tally.failures[:10]:
            print("   ", failure)
        failed += other
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
