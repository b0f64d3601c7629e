"""Shards: streamed, safe against made-up files, and every sentence once an epoch, whoever shares the work."""

import functools
import http.server
import io
import json
import os
import random
import subprocess
import sys
import tarfile
import threading
import tracemalloc
from collections import Counter
from contextlib import suppress
from dataclasses import replace
from itertools import chain, pairwise

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

import reference_model.data.readers.shards as shards_module
from reference_model.data.config import ConvertConfig, DataConfig
from reference_model.data.convert import convert
from reference_model.data.datasets import read
from reference_model.data.images import open_image
from reference_model.data.readers.shards import Shards, ShardWriter
from reference_model.data.streaming import ShardedDataset, ShardedLoader
from reference_model.data.transforms import image_pixels, resize_mask
from reference_model.files import InputError
from reference_model.scoring.config import EvaluateConfig
from reference_model.scoring.evaluate import evaluate
from reference_model.training.train import train


@pytest.fixture(scope="session")
def shards(scenes, tmp_path_factory):
    """The scenes in shards of three images: many shards of a small set."""
    folder = tmp_path_factory.mktemp("shards") / "data"
    reader = read(DataConfig(scenes))
    with ShardWriter(folder, 2**20) as writer:
        for split in reader.splits:
            images = {}
            for record in reader.stream(split):
                images.setdefault(record.image, []).append(record)
            for number, (path, records) in enumerate(images.items()):
                if number % 3 == 0:
                    writer.shard_size = 0  # begin a new one
                writer.write(path.read_bytes(), records)
                writer.shard_size = 2**20
        writer.finish(reader.categories, {"dataset": "refcoco", "split_by": "unc", "generated": True})
    return folder


@pytest.fixture
def broken(shards, tmp_path):
    """A copy of the shards to break, and ways to do it."""
    folder = tmp_path / "broken"
    folder.mkdir()
    for name in os.listdir(shards):
        (folder / name).write_bytes((shards / name).read_bytes())
    return folder


def rewritten(folder, change, name="train-000000.tar"):
    """Write a shard anew with what ``change`` makes of its members [(TarInfo, content)]."""
    with tarfile.open(folder / name) as archive:
        members = [(member, archive.extractfile(member).read()) for member in archive]
    with tarfile.open(folder / name, "w", format=tarfile.GNU_FORMAT) as archive:
        for member, content in change(members):
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    described(folder, name)


def described(folder, name):
    """Let the index say what size a shard has."""
    index = json.loads((folder / "index.json").read_text())
    for shard in index["shards"]:
        if shard["name"] == name:
            shard["bytes"] = (folder / name).stat().st_size
    (folder / "index.json").write_text(json.dumps(index))


def edited(folder, change, **options):
    """Change the JSON of the first sample."""

    def first(members):
        at = next(k for k, (member, _) in enumerate(members) if member.name.endswith(".json"))
        entry = json.loads(members[at][1])
        found = change(entry)
        text = found if isinstance(found, bytes) else json.dumps(entry if found is None else found).encode()
        return [*members[:at], (members[at][0], text), *members[at + 1 :]]

    rewritten(folder, first, **options)


def refusal(folder, split="train"):
    with pytest.raises(InputError) as caught:
        list(Shards(folder).stream(split))
    message = str(caught.value)
    assert "\n" not in message and str(folder) in message
    return message


# ---- reading ------------------------------------------------------------------------------------


def test_shards_give_what_the_data_set_gives(shards, scenes):
    source, reader = read(DataConfig(scenes)), read(DataConfig(shards))
    assert isinstance(reader, Shards) and reader.streamed and reader.splits == source.splits
    assert len(reader.of_split("train")) == 6
    for split in source.splits:
        for ours, theirs in zip(reader.stream(split), source.stream(split), strict=True):
            assert ours.image == theirs.image.read_bytes()
            assert replace(ours, image=theirs.image, segmentation=theirs.segmentation) == theirs
            assert np.array_equal(ours.mask(), theirs.mask())
        sentences = [record.expression for record in source.stream(split)]
        assert list(reader.sentences(split)) == sentences


def test_records_are_not_listed_and_splits_must_be_there(shards):
    reader = Shards(shards)
    with pytest.raises(InputError, match=r"only streamed; convert to a .jsonl"):
        reader.records("train")
    for ask in (reader.stream, reader.sentences, lambda split: iter(reader.of_split(split))):
        with pytest.raises(InputError, match=r"no split 'testa'; did you mean 'testA'"):
            next(ask("testa"))


def test_nothing_is_written_while_reading(shards):
    before = {name: (shards / name).stat().st_mtime_ns for name in os.listdir(shards)}
    list(Shards(shards).stream("train"))
    assert {name: (shards / name).stat().st_mtime_ns for name in os.listdir(shards)} == before


def test_memory_does_not_grow_with_the_samples(scenes, tmp_path):
    records = list(read(DataConfig(scenes)).stream("train"))
    image = os.urandom(20_000)

    def peak(count):
        folder = tmp_path / str(count)
        with ShardWriter(folder, 2**26) as writer:
            for n in range(count):
                writer.write(image, [replace(records[0], image_id=n)])
            writer.finish({}, {})
        reader = Shards(folder)
        tracemalloc.start()
        assert sum(1 for _ in reader.stream("train")) == count
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    peak(10)
    few, many = peak(100), peak(1000)
    assert many < 1.5 * few, (few, many)


def test_shards_are_read_over_http_without_a_copy(shards, scenes):
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=shards))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        root = f"http://127.0.0.1:{server.server_port}"
        reader = Shards(root)
        assert [r.sent_id for r in reader.stream("val")] == [r.sent_id for r in Shards(shards).stream("val")]
        with pytest.raises(InputError, match=r"index.json: cannot be read \(HTTP Error 404"):
            Shards(f"{root}/nowhere")
    finally:
        server.shutdown()
        server.server_close()


def test_commands_are_never_run(tmp_path):
    bait = tmp_path / "bait"
    with pytest.raises(InputError, match=r"no such folder; give one of shards, or the http"):
        Shards(f"pipe:touch {bait} #")
    assert not bait.exists()


def test_missing_package_is_one_line(shards, monkeypatch):
    monkeypatch.setitem(sys.modules, "webdataset", None)
    with pytest.raises(InputError, match=r"need webdataset; pip install 'metris-blocks\[data\]'"):
        next(Shards(shards).stream("train"))


def test_importing_the_reader_loads_neither_torch_nor_webdataset():
    probe = (
        "import sys, reference_model.data.readers.shards, reference_model.data.convert,"
        "reference_model.data.check, reference_model.viewing.samples;"
        "print('torch' in sys.modules, 'webdataset' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert out.stdout.split() == ["False", "False"]


# ---- malformed ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda e: e.pop("refs") and None, r"sample '000000000' has no 'refs'"),
        (lambda e: e.update(height="64"), r"has 'height' = '64', expected int"),
        (lambda e: e["refs"][0].update(mask={"size": [9, 9], "counts": [81]}), r"RLE has size \[9, 9\], but"),
        (lambda e: e["refs"][0].update(ref_id=1.5), r"refs\[0\] has 'ref_id' = 1.5, expected int"),
        (lambda e: e["refs"][0].update(ann_id=["1"]), r"refs\[0\] has 'ann_id' = \['1'\]"),
        (lambda e: e["refs"][0].update(mask=None), r"refs\[0\] has no mask, though it names annotation"),
        (lambda e: e["refs"][0].update(mask=[[1, 2]]), r"refs\[0\]: polygon 0 has 2 numbers"),
        (lambda e: e["refs"][0].update(mask="mask.png"), r"refs\[0\]: segmentation is 'mask.png'"),
        (lambda e: e["refs"][0]["sentences"][0].update(sent=7), r"has 'sent' = 7, expected str"),
        (lambda e: e["refs"][0]["sentences"][0].update(sent="\ud800"), r"not valid Unicode"),
        (lambda e: [], r"sample '000000000' is \[\], expected a dict"),
        (lambda e: b"{", r"sample '000000000': its JSON is malformed"),
        (lambda e: b"[" * 100_000, r"sample '000000000': its JSON is malformed"),
        (lambda e: b"\xff\xfe{", r"sample '000000000': its JSON is malformed"),
    ],
)
def test_malformed_sample_is_one_line_or_left_out(change, says, broken):
    edited(broken, change)
    with pytest.raises(InputError, match=says):
        list(Shards(broken).stream("train"))
    refusal(broken)
    whole, left = read(DataConfig(broken)), Shards(broken, on_error="skip")
    with pytest.warns(UserWarning, match="left out, as further ones will be"):
        found = list(left.stream("train"))
    assert len(left.skipped) == 1 and 0 < len(found) < whole.splits["train"]


def renamed(members, name):
    members[0][0].name = name
    return members


def of_type(members, kind, target):
    member = tarfile.TarInfo("x.jpg")
    member.type, member.linkname = kind, target
    return [(member, b""), *members]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda m: m[1:], r"sample '000000000' holds .*, expected 'json' and one image"),
        (lambda m: m[2:], r"holds 2 samples, but index.json says 3"),
        (lambda m: [*m[:1], *m], r"duplicate file name"),
        (lambda m: [(m[0][0], m[0][1]), *m[1:2], *renamed(m[2:], "000000000.png")], r"sample|duplicate"),
        (lambda m: [], r"holds 0 samples"),
    ],
)
def test_malformed_shard_is_refused(change, says, broken):
    rewritten(broken, change)
    with pytest.raises(InputError, match=says):
        list(Shards(broken).stream("train"))
    refusal(broken)


def test_names_and_links_in_a_tar_reach_no_file(broken, tmp_path):
    bait = tmp_path / "bait.jpg"
    bait.write_bytes(b"secret")

    def change(members):
        for member, _ in members:
            member.name = f"../../{member.name}"
        members = of_type(members, tarfile.SYMTYPE, str(bait))
        return of_type(members, tarfile.CHRTYPE, "")

    expected = [record.image for record in Shards(broken).stream("train")]
    rewritten(broken, change)
    before = set(os.listdir(tmp_path))
    assert [record.image for record in Shards(broken).stream("train")] == expected
    assert set(os.listdir(tmp_path)) == before and bait.read_bytes() == b"secret"


def test_huge_member_is_refused_before_it_is_read(broken, monkeypatch):
    monkeypatch.setattr(shards_module, "LARGEST_MEMBER", 2**20)

    def change(members):
        return [(members[0][0], bytes(2**20 + 1)), *members[1:]]

    rewritten(broken, change)
    assert "has 1048577 bytes, at most 1048576 are read" in refusal(broken)


def test_stated_size_beyond_the_file_takes_no_memory(broken):
    path = broken / "train-000000.tar"
    content = bytearray(path.read_bytes())
    member = tarfile.TarInfo.frombuf(bytes(content[:512]), "utf-8", "strict")
    member.size = 100 * 2**20
    content[:512] = member.tobuf(tarfile.USTAR_FORMAT)
    path.write_bytes(content)
    tracemalloc.start()
    assert "not a whole shard" in refusal(broken)
    assert tracemalloc.get_traced_memory()[1] < 10 * 2**20
    tracemalloc.stop()


def test_compressed_tar_is_no_shard(broken):
    import gzip

    path = broken / "train-000000.tar"
    path.write_bytes(gzip.compress(path.read_bytes()))
    described(broken, path.name)
    assert "not a whole shard" in refusal(broken)


@pytest.mark.parametrize("keep", [0, 1, 511, 512, 700, 2000, 5000])
def test_cut_shard_is_told_at_once_and_while_reading(keep, broken):
    path = broken / "train-000000.tar"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(
        InputError, match=rf"train-000000.tar: has {keep} bytes, but index.json says \d+; copy"
    ):
        Shards(broken)
    described(broken, path.name)
    refusal(broken)
    left = Shards(broken, on_error="skip")
    with pytest.warns(UserWarning, match="left out"):
        assert 0 < len(list(left.stream("train"))) < left.splits["train"]


def test_garbage_in_a_shard_raises_nothing_else(broken):
    path, rng = broken / "train-000000.tar", random.Random(0)
    whole = path.read_bytes()
    for _ in range(300):
        content = bytearray(whole)
        for _ in range(rng.choice((1, 3, 30))):
            # The headers, where a tar is fragile, rather than pixels.
            at = rng.choice((rng.randrange(512), rng.randrange(len(content))))
            content[at] = rng.choice((0, 48, 55, 128, 255, rng.randrange(256)))
        path.write_bytes(content)
        reader = Shards(broken)
        with suppress(InputError):
            list(reader.stream("train"))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda i: i.update(version=2), r"index.json: version 2, but this metris reads 1"),
        (lambda i: i.pop("shards"), r"index.json has no 'shards'"),
        (lambda i: i["shards"][0].update(name="../train-000000.tar"), r"shards\[0\] has name '../train"),
        (lambda i: i["shards"][0].update(name="pipe:x-000000.tar"), r"has name 'pipe:x-000000.tar'"),
        (
            lambda i: i["shards"][0].update(name="train-000099.tar"),
            r"train-000099.tar: no such file, but index",
        ),
        (lambda i: i["shards"][0].update(samples=0), r"shards\[0\] has 0 samples"),
        (lambda i: i["shards"][0].update(samples="3"), r"has 'samples' = '3', expected int"),
        (lambda i: i["shards"][0].update(samples=2), r"holds 3 samples, but index.json says 2"),
        (lambda i: i.update(categories={"x": "y"}), r"index.json has categories"),
    ],
)
def test_malformed_index_is_refused(change, says, broken):
    path = broken / "index.json"
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))
    with pytest.raises(InputError, match=says):
        list(Shards(broken).stream("train"))


def test_folder_without_an_index_says_what_to_do(broken):
    (broken / "index.json").unlink()
    with pytest.raises(
        InputError, match=r"index.json: no such file, but 'testA.*write shards with metris conv"
    ):
        Shards(broken)


# ---- training -----------------------------------------------------------------------------------


def collated(items):
    return items


def epoch(reader, *, workers=0, number=0, **options):
    dataset = ShardedDataset(reader, "train", 16, **options)
    dataset.epoch = number
    return [
        [item.record.sent_id for item in items]
        for items in DataLoader(dataset, batch_size=None, num_workers=workers)
    ]


@pytest.mark.parametrize("per_image", [1, 2, 100])
@pytest.mark.parametrize(("world", "workers"), [(1, 0), (1, 2), (2, 1), (4, 2)])
def test_every_sentence_comes_once_an_epoch_whoever_shares_the_work(per_image, world, workers, shards):
    # 6 shards for 8 processes at most: some cases share shards, the last one images.
    reader = Shards(shards)
    image_of = {record.sent_id: record.image_id for record in reader.stream("train")}
    found = []
    for rank in range(world):
        share = epoch(reader, per_image=per_image, rank=rank, world=world, workers=workers)
        assert share
        found += share
    assert sorted(chain.from_iterable(found)) == sorted(image_of)
    assert all(len({image_of[id] for id in group}) == 1 and len(group) <= per_image for group in found)
    if per_image == 100:
        assert len(found) == len(set(image_of.values()))


def test_order_follows_from_seed_epoch_and_workers(shards):
    reader = Shards(shards)
    first = epoch(reader, seed=1)
    assert first == epoch(Shards(shards), seed=1)
    assert epoch(reader, seed=1, workers=2) == epoch(reader, seed=1, workers=2)
    others = [epoch(reader, seed=2), epoch(reader, seed=1, number=1)]
    assert first != others[0] and first != others[1] and others[0] != others[1]
    for other in others:
        assert sorted(chain.from_iterable(other)) == sorted(chain.from_iterable(first))


def test_shards_come_in_another_order_each_epoch(shards):
    reader = Shards(shards)
    images = [record.image_id for record in reader.stream("train")]
    image_of = {record.sent_id: record.image_id for record in reader.stream("train")}
    orders = set()
    for number in range(4):
        found = epoch(reader, number=number, buffer=1)  # which shuffles nothing itself
        orders.add(tuple(dict.fromkeys(image_of[id] for id in chain.from_iterable(found))))
    assert len(orders) > 2 and all(set(order) == set(images) for order in orders)


def test_buffer_mixes_shards(shards):
    reader = Shards(shards)
    shard_of = {
        record.sent_id: shard.name
        for shard in reader.of_split("train")
        for records in reader.samples(shard)
        for record in records
    }
    changes = {}
    for buffer in (1, 512):
        names = [shard_of[id] for group in epoch(reader, buffer=buffer) for id in group]
        changes[buffer] = sum(a != b for a, b in pairwise(names))
    assert changes[1] == 5 < 15 < changes[512]  # without a buffer, shard after shard
    # It is full before the first leaves it: that one need not be of the first shard.
    firsts = [[shard_of[epoch(reader, number=k, buffer=b)[0][0]] for b in (1, 512)] for k in range(6)]
    assert any(unmixed != mixed for unmixed, mixed in firsts)


def test_image_is_decoded_once_for_its_sentences(shards, monkeypatch):
    import reference_model.data.dataset as dataset_module

    opened = []
    monkeypatch.setattr(
        dataset_module, "open_image", lambda image, **kw: opened.append(image) or open_image(image, **kw)
    )
    reader = Shards(shards)
    images = {record.image for record in reader.stream("train")}
    assert len(epoch(reader, per_image=100)) == len(opened) == len(images)


def test_items_are_those_of_the_records(shards):
    dataset = ShardedDataset(Shards(shards), "train", 16)
    for items in dataset:
        for item in items:
            expected = image_pixels(open_image(item.record.image), 16)
            torch.testing.assert_close(item.image, expected, rtol=0, atol=0)
            assert np.array_equal(item.mask.numpy().astype(bool), resize_mask(item.record.mask(), 16, 16))


@pytest.mark.parametrize(
    ("workers", "world", "batch_size"), [(0, 1, 4), (2, 1, 4), (0, 2, 3), (0, 1, 10_000)]
)
def test_epoch_has_as_many_batches_as_the_index_says(workers, world, batch_size, shards):
    reader = Shards(shards)
    count = reader.splits["train"]
    seen = Counter()
    for rank in range(world):
        dataset = ShardedDataset(reader, "train", 16, per_image=3, rank=rank, world=world)
        loader = ShardedLoader(dataset, batch_size, collated, workers=workers)
        size = min(batch_size, count // world)
        assert len(loader) == count // (size * world)
        batches = list(loader)
        assert [len(batch) for batch in batches] == [size] * len(loader)
        seen.update(item.record.sent_id for batch in batches for item in batch)
    assert len(seen) > 0.7 * count
    if world == 1:
        assert max(seen.values()) == 1 and sum(seen.values()) == len(loader) * size


def test_loader_begins_each_epoch_in_another_order(shards):
    loader = ShardedLoader(ShardedDataset(Shards(shards), "train", 16), 4, collated, workers=1)
    orders = []
    for loader.epoch in (0, 1, 0):
        orders.append([item.record.sent_id for batch in loader for item in batch])
    assert orders[0] == orders[2] != orders[1]


@pytest.mark.parametrize(("workers", "world", "accumulate"), [(0, 1, 1), (2, 1, 2), (1, 2, 2)])
def test_loader_goes_on_in_the_middle_of_an_epoch(workers, world, accumulate, shards):
    def ids(done):
        dataset = ShardedDataset(Shards(shards), "train", 16, rank=world - 1, world=world)
        loader = ShardedLoader(dataset, 2, collated, accumulate=accumulate, workers=workers)
        ends = [loader.advance() for _ in range(done)]
        assert not any(ends) and loader.steps * accumulate == len(loader)
        return [[item.record.sent_id for item in batch] for batch in loader]

    whole = ids(0)
    assert ids(3) == whole[3 * accumulate :]


def test_loader_knows_where_an_epoch_ends(shards):
    loader = ShardedLoader(ShardedDataset(Shards(shards), "train", 16), 4, collated, accumulate=2)
    ends = [loader.advance() for _ in range(2 * loader.steps)]
    assert [step for step, end in enumerate(ends, start=1) if end] == [loader.steps, 2 * loader.steps]
    assert (loader.epoch, loader.position) == (2, 0)


def test_rank_outside_of_the_world_is_refused(shards):
    with pytest.raises(ValueError, match=r"rank must be in \[0, world\), got rank=2, world=2"):
        ShardedDataset(Shards(shards), "train", 16, rank=2, world=2)


def test_broken_image_stops_training_or_is_left_out(broken):
    rewritten(broken, lambda members: [(members[0][0], b"\xff\xd8\xffno image"), *members[1:]])
    with pytest.raises(InputError, match=r"train-\d+.tar: sample .*: image \d+: .*(cannot|not an im)"):
        epoch(Shards(broken))
    left = Shards(broken, on_error="skip")
    with pytest.warns(UserWarning, match="left out"):
        found = list(chain.from_iterable(epoch(left)))
    assert 0 < len(found) < left.splits["train"]
    # An epoch stays as long as the index says; what is there is gone through again.
    loader = ShardedLoader(ShardedDataset(left, "train", 16), 4, collated)
    with pytest.warns(UserWarning, match="left out"):
        assert len(list(loader)) == left.splits["train"] // 4


def test_shards_without_a_readable_sample_end(broken):
    for name in [name for name in os.listdir(broken) if name.startswith("train")]:
        rewritten(
            broken, lambda members: [(m, c if m.name.endswith("json") else b"x") for m, c in members], name
        )
    left = Shards(broken, on_error="skip")
    with (
        pytest.warns(UserWarning, match="left out"),
        pytest.raises(InputError, match="no sample can be read; see metris data c"),
    ):
        list(ShardedLoader(ShardedDataset(left, "train", 16), 4, collated))


@pytest.mark.parametrize("workers", [0, 2])
def test_shards_train_and_score_like_the_data_set(workers, shards, scenes, another, tmp_path):
    config = another(data=DataConfig(shards, workers=workers), steps=None, epochs=1)
    run = train(config)
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert log[-1]["step"] == read(config.data).splits["train"] // config.batch_size
    assert (run / "generated.json").exists() == (shards / "generated.json").exists()
    scores = [
        evaluate(EvaluateConfig(DataConfig(root), run, splits="val,testA", out=tmp_path / f"{k}.json"))
        for k, root in enumerate((shards, scenes))
    ]
    for split in ("val", "testA"):
        ours, theirs = (next(iter(found[split].values())) for found in scores)
        assert ours["mIoU"] == pytest.approx(theirs["mIoU"]) and ours["count"] == theirs["count"]


def test_training_needs_a_val_split(scenes, another, tmp_path):
    out = convert(ConvertConfig(DataConfig(scenes), tmp_path / "out", splits="train"))
    with pytest.raises(InputError, match=r"no split 'val'"):
        train(another(data=DataConfig(out)))


def test_shards_are_not_cached(shards, another):
    with pytest.raises(InputError, match=r"cache: shards are streamed"):
        train(another(data=DataConfig(shards), cache=True))


# ---- what a few bytes could ask for -------------------------------------------------------------


def test_many_members_of_a_sample_are_refused_as_they_come(broken):
    """A tar of zeros compresses to nothing, and a sample is held whole: the third member is not read."""
    big = bytes(2**22)

    def change(members):
        extra = [(tarfile.TarInfo(f"000000000.{n}.jpg"), big) for n in range(50)]
        return [*members[:2], *extra, *members[2:]]

    rewritten(broken, change)
    tracemalloc.start()
    assert "has a third member '000000000.0.jpg', expected .json and one image" in refusal(broken)
    assert tracemalloc.get_traced_memory()[1] < 20 * 2**20
    tracemalloc.stop()


def test_sparse_members_are_refused(broken):
    """A member of old GNU's sparse kind states its size freely: here 64 MiB in 512 bytes."""
    path = broken / "train-000000.tar"
    content = bytearray(path.read_bytes())
    header = bytearray(tarfile.TarInfo("000000000.jpg").tobuf(tarfile.GNU_FORMAT))
    header[156:157] = tarfile.GNUTYPE_SPARSE
    header[483:495] = b"%011o\0" % 2**26
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    path.write_bytes(bytes(header) + content)
    described(broken, path.name)
    tracemalloc.start()
    assert "is sparse; write the shard anew" in refusal(broken)
    assert tracemalloc.get_traced_memory()[1] < 10 * 2**20
    tracemalloc.stop()


@pytest.mark.parametrize("change", [{"dataset": []}, {"split_by": 3}, {"generated": "no"}])
def test_origin_of_another_kind_is_refused(change, broken):
    index = json.loads((broken / "index.json").read_text())
    index["made_of"] |= change
    (broken / "index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match=rf"index.json has made_of .*{next(iter(change))}"):
        Shards(broken)


def test_addresses_and_answers_that_are_not_http_are_one_line():
    with pytest.raises(InputError, match=r"http:/+127.0.0.1/a b/index.json: cannot be read"):
        Shards("http://127.0.0.1/a b")


def test_both_forms_of_a_sentence_are_kept(scenes, tmp_path):
    """In shards, as data.text asks for when they are read."""
    records = list(read(DataConfig(scenes)).stream("val"))
    first = records[0]
    with ShardWriter(tmp_path / "out", 2**20) as writer:
        writer.write(first.image.read_bytes(), [replace(first, raw=f"{first.expression.upper()}!")])
        writer.finish({}, {})
    (sent,), (raw,) = (
        list(read(DataConfig(tmp_path / "out", text=text)).stream("val")) for text in ("sent", "raw")
    )
    assert (sent.expression, sent.raw) == (first.expression, f"{first.expression.upper()}!")
    assert (raw.expression, raw.raw) == (f"{first.expression.upper()}!", None)
