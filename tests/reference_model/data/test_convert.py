"""Conversion: what is read from the output is what was read from the input, and memory does not grow."""

import json
import os
import pickle
import shutil
import tarfile
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import reference_model.data.convert as convert_module
from reference_model.data.config import ConvertConfig, DataConfig
from reference_model.data.convert import convert, made_of
from reference_model.data.datasets import read
from reference_model.data.readers.jsonl import Jsonl
from reference_model.data.readers.reader import Reader
from reference_model.data.readers.shards import Shards
from reference_model.data.records import Record
from reference_model.files import InputError
from reference_model.synthetic.config import GenerateConfig
from reference_model.synthetic.generate import generate

FIELDS = ("height", "width", "expression", "split", "ref_id", "ann_id", "image_id", "sent_id", "category_id")
SQUARE = [[1, 1, 6, 1, 6, 6, 1, 6]]


@pytest.fixture(scope="module")
def any_targets(tmp_path_factory):
    """Sentences that mean one object, several or none, in gRefCOCO's layout."""
    root = tmp_path_factory.mktemp("scenes") / "data"
    config = GenerateConfig(root=root, scenes="standard", targets="any", size=64, train=12, val=4, test=2)
    return DataConfig(generate(config), dataset="grefcoco")


class Fake(Reader):
    """Records as they are given, each time anew."""

    def __init__(self, made, *, streamed=False):
        super().__init__(Path("fake/list"))
        self.made = made
        self.splits = {}
        for record in made():
            self.splits[record.split] = self.splits.get(record.split, 0) + 1
        type(self).streamed = streamed

    def _stream(self, split):
        return (record for record in self.made() if record.split == split)


def record(path, number, **changes):
    fields = dict(image=path, height=8, width=8, expression="it", segmentation=SQUARE, split="train")
    ids = dict(ref_id=number, ann_id=number, image_id=number, sent_id=number, category_id=1)
    return Record(**fields | ids | changes)


@pytest.fixture
def faked(monkeypatch):
    """Make `convert` read a Fake."""

    def fake(made, **options):
        reader = Fake(made, **options)
        monkeypatch.setattr(convert_module, "read", lambda config: reader)
        return reader

    yield fake
    Fake.streamed = False


def assert_same(ours, theirs, *, images=True):
    assert list(ours.splits) == list(theirs.splits)
    for split in theirs.splits:
        for a, b in zip(ours.stream(split), theirs.stream(split), strict=True):
            assert [getattr(a, key) for key in FIELDS] == [getattr(b, key) for key in FIELDS]
            assert np.array_equal(a.mask(), b.mask()) and a.no_target == b.no_target
            assert contents(a) == contents(b)


def contents(record):
    return record.image if isinstance(record.image, bytes) else Path(record.image).read_bytes()


@pytest.mark.parametrize("set", ["refcoco", "grefcoco"])
@pytest.mark.parametrize(
    "kind", ["lines", "shards", "lines of shards", "shards of shards", "shards of lines"]
)
def test_what_is_read_from_the_output_is_what_was_read_from_the_input(
    set, kind, scenes, any_targets, tmp_path, capsys
):
    data = DataConfig(scenes) if set == "refcoco" else any_targets
    source = read(data)
    root = tmp_path / "root"
    root.mkdir()
    for name in os.listdir(data.root):
        (root / name).symlink_to(data.root / name)
    data = replace(data, root=root)
    for number, step in enumerate(reversed(kind.split(" of "))):
        out = root / (f"{number}.jsonl" if step == "lines" else f"{number}")
        assert convert(ConvertConfig(data, out)) == out
        data = DataConfig(out)
        assert f"{out}: train " in capsys.readouterr().out
    converted = read(data)
    assert isinstance(converted, Jsonl if kind.startswith("lines") else Shards)
    assert_same(converted, source)
    if kind.endswith("shards") and kind.startswith("shards"):
        assert converted.categories == source.categories
        assert converted.made_of == {"dataset": set, "split_by": "unc", "generated": True}


@pytest.mark.parametrize("layout", ["grefer-pickle", "refzom", "cris", "parquet", "jsonl"])
def test_every_layout_is_converted(layout, tmp_path):
    root = tmp_path / "data"
    targets = "one" if layout in ("cris", "parquet") else "any"
    generate(GenerateConfig(root=root, layout=layout, targets=targets, size=48, train=4, val=2, test=1))
    names = {"grefer-pickle": "grefcoco", "refzom": "ref-zom"}
    split_by = "final" if layout == "refzom" else "unc"
    place = next(root.glob("*.jsonl")) if layout == "jsonl" else root
    data = DataConfig(place, dataset=names.get(layout, "refcoco"), split_by=split_by)
    for out in (root / "all_of.jsonl", tmp_path / "shards"):
        convert(ConvertConfig(data, out))
        assert_same(read(DataConfig(out)), read(data))


def test_lines_say_what_the_contract_says(any_targets, tmp_path):
    root = tmp_path / "root"
    root.symlink_to(any_targets.root)
    out = root.parent / "all.jsonl"
    convert(ConvertConfig(replace(any_targets, root=root), out))
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    keys = ["image", "expression", "mask", "split", "height", "width"]
    keys += ["image_id", "ref_id", "sent_id", "ann_id", "category_id"]
    assert all(list(line) == keys for line in lines)
    assert all(line["image"].startswith("root/images/train2014/COCO_") for line in lines)
    many = [line for line in lines if isinstance(line["expression"], list)]
    assert many and all(len(line["sent_id"]) == len(line["expression"]) > 1 for line in many)
    assert all((line["mask"] is None) == (line["ann_id"] == []) for line in lines)
    assert any(line["mask"] is None for line in lines)


def test_masks_of_files_and_of_run_lengths_survive(faked, tmp_path):
    values = np.zeros((8, 8), dtype=np.uint8)
    values[2:5, 3:] = 254
    Image.fromarray(values).save(tmp_path / "mask.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    runs = {"size": [8, 8], "counts": b"T1P1"}
    segmentations = [tmp_path / "mask.png", runs | {"counts": [10, 20, 34]}, SQUARE]
    records = [
        record(tmp_path / "a.png", n, image_id=1, segmentation=found) for n, found in enumerate(segmentations)
    ]
    reader = faked(lambda: iter(records))
    for out, names in ((tmp_path / "all.jsonl", ["mask.png"]), (tmp_path / "shards", [])):
        convert(ConvertConfig(DataConfig(tmp_path), out))
        converted = Jsonl(out) if names else Shards(out)
        assert_same(converted, reader)
    assert json.loads((tmp_path / "all.jsonl").read_text().splitlines()[0])["mask"] == "mask.png"


def test_compressed_run_lengths_survive(any_targets, tmp_path):
    # Of several objects, some of them crowds, readers make run lengths as bytes.
    source = read(any_targets)
    found = [r for split in source.splits for r in source.stream(split) if isinstance(r.segmentation, dict)]
    assert found
    convert(ConvertConfig(any_targets, tmp_path / "out"))
    converted = {r.sent_id: r for split in source.splits for r in Shards(tmp_path / "out").stream(split)}
    assert all(np.array_equal(converted[r.sent_id].mask(), r.mask()) for r in found)


def test_shards_hold_images_as_they_were_and_stay_below_their_size(faked, tmp_path):
    rng = np.random.default_rng(0)
    for n in range(12):
        Image.fromarray(rng.integers(0, 256, (320, 320, 3), dtype=np.uint8)).save(tmp_path / f"{n}.png")
    size = {"height": 320, "width": 320}
    faked(lambda: (record(tmp_path / f"{n}.png", n, **size) for n in range(12)))
    out = convert(ConvertConfig(DataConfig(tmp_path), tmp_path / "out", shard_size=1))
    index = json.loads((out / "index.json").read_text())
    sizes = [(out / shard["name"]).stat().st_size for shard in index["shards"]]
    assert len(sizes) == 4 and all(size <= 2**20 for size in sizes)  # an image takes 0.3 MiB
    assert sizes == [shard["bytes"] for shard in index["shards"]]
    assert index["splits"] == {"train": {"images": 12, "sentences": 12}}
    names = []
    for shard in index["shards"]:
        with tarfile.open(out / shard["name"]) as archive:
            members = {member.name: archive.extractfile(member).read() for member in archive}
        assert shard["samples"] == len(members) / 2
        for name, content in members.items():
            if name.endswith(".png"):
                names.append(name)
                assert content == (tmp_path / f"{int(name.removesuffix('.png'))}.png").read_bytes()
    assert names == [f"{n:09d}.png" for n in range(12)]


def test_bytes_of_shards_follow_from_the_data(scenes, tmp_path):
    one, two = (convert(ConvertConfig(DataConfig(scenes), tmp_path / name)) for name in ("one", "two"))
    assert sorted(os.listdir(one)) == sorted(os.listdir(two))
    assert all((one / name).read_bytes() == (two / name).read_bytes() for name in os.listdir(one))


def test_refs_of_an_image_meet_in_one_sample_however_far_apart(faked, tmp_path, monkeypatch):
    for n in range(4):
        Image.new("RGB", (8, 8), (n, 0, 0)).save(tmp_path / f"{n}.png")
    order = [0, 1, 2, 3, 0, 1, 2, 3]
    records = [record(tmp_path / f"{n}.png", k, image_id=n) for k, n in enumerate(order)]
    faked(lambda: iter(records))
    whole = Shards(convert(ConvertConfig(DataConfig(tmp_path), tmp_path / "whole")))
    assert [[r.sent_id for r in found] for found in whole.samples(whole.shards[0])] == [
        [0, 4], [1, 5], [2, 6], [3, 7]
    ]  # fmt: skip
    monkeypatch.setattr(convert_module, "WAITING", 2)
    parted = Shards(convert(ConvertConfig(DataConfig(tmp_path), tmp_path / "parted")))
    assert sorted(r.sent_id for r in parted.stream("train")) == list(range(8))
    assert parted.shards[0].samples == 8


@pytest.mark.parametrize("name", ["out", "out.jsonl"])
@pytest.mark.parametrize("streamed", [False, True])
def test_memory_does_not_grow_with_the_samples(name, streamed, faked, tmp_path, monkeypatch):
    monkeypatch.setattr(convert_module, "WAITING", 8)
    rng = np.random.default_rng(0)
    path = tmp_path / "a.png"
    Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path)
    content = path.read_bytes()

    def peak(count):
        def made():
            for n in range(count):
                # bytes(bytearray) so that each image is an object of its own, as from a file
                image = bytes(bytearray(content)) if streamed else path
                yield record(
                    image, n, height=64, width=64, expression=f"thing {n}", segmentation=list(SQUARE)
                )

        reader = faked(made, streamed=streamed)
        assert reader.splits == {"train": count}
        config = ConvertConfig(DataConfig(tmp_path), tmp_path / str(count) / name)
        (tmp_path / "a.jsonl").unlink(missing_ok=True)
        out = config.out if streamed or name == "out" else tmp_path / "a.jsonl"
        tracemalloc.start()
        convert(replace(config, out=out))
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    peak(20)  # what is imported and made once
    few, many = peak(100), peak(1000)
    assert many < 1.5 * few, (few, many)


def test_broken_off_conversion_leaves_nothing(faked, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
    before = set(os.listdir(tmp_path))

    def made():
        yield record(tmp_path / "0.png", 0)
        yield record(tmp_path / "1.png", 1)  # is not there

    faked(made)
    with pytest.raises(InputError, match=r"1.png: no such file"):
        convert(ConvertConfig(DataConfig(tmp_path), tmp_path / "out"))
    assert set(os.listdir(tmp_path)) == before
    faked(lambda: (record(Path("/elsewhere/0.png"), n) for n in range(2)))
    with pytest.raises(
        InputError, match=r"/elsewhere/0.png: lies outside of .*choose an --out above the images"
    ):
        convert(ConvertConfig(DataConfig(tmp_path), tmp_path / "out.jsonl"))
    assert set(os.listdir(tmp_path)) == before


def test_broken_images_can_be_left_out_and_are_counted(faked, tmp_path, capsys):
    Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
    faked(lambda: (record(tmp_path / f"{n}.png", n) for n in range(3)))
    data = DataConfig(tmp_path, on_error="skip")
    out = convert(ConvertConfig(data, tmp_path / "out", json=True))
    told = json.loads(capsys.readouterr().out)
    counts = {"sentences": 1, "refs": 1, "images": 1}
    assert told == {"out": str(out), "splits": {"train": counts}, "left_out": 2}
    assert [r.sent_id for r in Shards(out).stream("train")] == [0]


def test_splits_are_chosen(scenes, tmp_path):
    data = DataConfig(scenes)
    out = convert(ConvertConfig(data, tmp_path / "some", splits="testA, val"))
    assert Shards(out).splits == {split: read(data).splits[split] for split in ("testA", "val")}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"splits": "train,valid"}, r"splits: 'valid', expected some of train, val"),
        ({"splits": "val_unseen"}, r"splits: 'val_unseen', expected"),
        ({"splits": "val,val"}, r"each once"),
        ({"shard_size": 0}, r"shard_size: must be in \[1, 1048576\] MiB, got 0"),
        ({"out": Path("x/data.json")}, r"out x/data.json: expected NAME.jsonl, or a folder"),
        ({"out": Path("/")}, r"expected NAME.jsonl"),
    ],
)
def test_what_cannot_be_done_is_refused(changes, says, scenes, tmp_path):
    config = ConvertConfig(DataConfig(scenes), tmp_path / "out")
    with pytest.raises(InputError, match=says):
        convert(replace(config, **changes))
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("name", ["out", "out.jsonl"])
def test_what_is_there_already_stays(name, scenes, tmp_path):
    out = tmp_path / name
    out.write_text("precious")
    with pytest.raises(InputError, match=r"is there already; choose another --out or remove it"):
        convert(ConvertConfig(DataConfig(scenes), out))
    assert out.read_text() == "precious"


def test_split_that_cannot_name_a_file_is_refused(faked, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
    faked(lambda: iter([record(tmp_path / "0.png", 0, split="../../x")]))
    with pytest.raises(InputError, match=r"split '../../x': cannot name a file"):
        convert(ConvertConfig(DataConfig(tmp_path), tmp_path / "out"))
    assert os.listdir(tmp_path) == ["0.png"]


def test_images_of_one_id_are_not_mixed_up(faked, tmp_path):
    images = []
    for n in range(2):
        Image.new("RGB", (8, 8 + n)).save(tmp_path / f"{n}.png")
        images.append((tmp_path / f"{n}.png").read_bytes())
    faked(lambda: (record(images[n], n, image_id=7) for n in range(2)), streamed=True)
    with pytest.raises(InputError, match=r"image_id 7: is that of several images"):
        convert(ConvertConfig(DataConfig(tmp_path), tmp_path / "out.jsonl"))
    out = Shards(convert(ConvertConfig(DataConfig(tmp_path), tmp_path / "out")))
    assert [r.image for r in out.stream("train")] == images


# ---- what goes along ----------------------------------------------------------------------------


@pytest.fixture
def cleaned(scenes, tmp_path):
    """A copy of the scenes whose raw sentences differ from the cleaned ones."""
    root = tmp_path / "cleaned"
    (root / "refcoco").mkdir(parents=True)
    (root / "images").symlink_to(scenes / "images")
    shutil.copyfile(scenes / "refcoco/instances.json", root / "refcoco/instances.json")
    refs = pickle.loads((scenes / "refcoco/refs(unc).p").read_bytes())
    for sentence in (sentence for ref in refs for sentence in ref["sentences"]):
        sentence["raw"] = f"{sentence['sent'].capitalize()}."
    (root / "refcoco/refs(unc).p").write_bytes(pickle.dumps(refs))
    return root


@pytest.mark.parametrize("kind", ["lines", "shards", "lines of shards", "shards of lines"])
@pytest.mark.parametrize("asked", ["sent", "raw"])
def test_both_forms_of_sentences_survive_and_are_chosen_when_read(kind, asked, cleaned):
    place = DataConfig(cleaned, text=asked)  # whatever is asked for when it is converted
    for number, step in enumerate(reversed(kind.split(" of "))):
        out = cleaned / (f"{number}.jsonl" if step == "lines" else f"{number}")
        convert(ConvertConfig(place, out))
        place = DataConfig(out, text=asked)
    for text in ("sent", "raw"):
        ours, theirs = (read(DataConfig(root, text=text)) for root in (out, cleaned))
        assert_same(ours, theirs)
        assert all(record.expression.endswith(".") == (text == "raw") for record in ours.stream("val"))


def test_notes_are_those_of_the_file_and_touch_no_neighbour(scenes, cleaned):
    """A file of generated scenes in the root of real data says nothing about what else is there."""
    (cleaned / "scenes").symlink_to(scenes)
    (cleaned / "classes.json").write_text(json.dumps({"seen": [7], "unseen": [8]}))
    before = {path: path.read_bytes() for path in cleaned.glob("*.json")}
    toy = convert(ConvertConfig(DataConfig(cleaned / "scenes"), cleaned / "toy.jsonl"))
    assert {path.name for path in cleaned.glob("*.json")} == {
        "classes.json", "toy.generated.json", "toy.categories.json"
    }  # fmt: skip
    assert all(path.read_bytes() == content for path, content in before.items())
    assert (cleaned / "toy.generated.json").read_bytes() == (scenes / "generated.json").read_bytes()
    made = [made_of(read(config), config)["generated"] for config in (DataConfig(cleaned), DataConfig(toy))]
    assert made == [False, True]
    assert read(DataConfig(toy)).categories == read(DataConfig(scenes)).categories != {}


def test_own_lists_of_classes_go_along_and_win(scenes, tmp_path):
    (tmp_path / "classes.json").write_text(json.dumps({"seen": [90], "unseen": [91]}))
    root = tmp_path / "root"
    root.mkdir()
    for name in os.listdir(scenes):
        (root / name).symlink_to(scenes / name)
    ids = sorted(read(DataConfig(scenes)).categories)
    (root / "classes.json").write_text(json.dumps({"seen": ids[1:], "unseen": ids[:1]}))
    out = convert(ConvertConfig(DataConfig(root), tmp_path / "toy.jsonl"))
    for part in ("val_seen", "val_unseen", "train_unseen"):
        ours, theirs = (read(DataConfig(place)).records(part) for place in (out, root))
        assert [r.sent_id for r in ours] == [r.sent_id for r in theirs] != []


def test_names_of_categories_are_kept_so_that_lists_of_others_are_refused(scenes, tmp_path):
    (tmp_path / "root").symlink_to(scenes)
    out = convert(ConvertConfig(DataConfig(tmp_path / "root"), tmp_path / "toy.jsonl"))
    with pytest.raises(InputError, match=r"category 1 is .*, not COCO's 'person'"):
        read(DataConfig(out)).records("val_seen")
    note = out.with_name(f"{out.stem}.categories.json")
    for malformed in ("[]", '{"a": "b"}', '{"1": 2}'):
        note.write_text(malformed)
        with pytest.raises(InputError, match=r"categories.json: holds .*, expected \{id: name\}"):
            read(DataConfig(out))


@pytest.mark.parametrize("name", ["toy.generated.json", "toy.classes.json", "toy.categories.json"])
def test_notes_that_are_there_are_not_overwritten(name, scenes, tmp_path):
    (tmp_path / name).write_text("precious")
    with pytest.raises(InputError, match=rf"{name}: is there already"):
        convert(ConvertConfig(DataConfig(scenes), tmp_path / "toy.jsonl"))
    assert [path.read_text() for path in tmp_path.iterdir()] == ["precious"]


@pytest.mark.parametrize("name", ["x.ndjson", "x.JSONL", "x.Json"])
def test_other_endings_do_not_become_folders(name, scenes, tmp_path):
    with pytest.raises(InputError, match=r"expected NAME.jsonl, or a folder"):
        convert(ConvertConfig(DataConfig(scenes), tmp_path / name))
    assert not list(tmp_path.iterdir())
