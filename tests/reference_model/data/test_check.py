"""The check of a data set: every fault is found, named and counted, and a sound set passes."""

import json
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

import reference_model.data.check as check_module
from reference_model.cli import main
from reference_model.data.check import EXAMPLES, PUBLISHED, Published, check, inspect, shown_report
from reference_model.data.config import CheckConfig, ConvertConfig, DataConfig
from reference_model.data.convert import convert, made_of
from reference_model.data.datasets import read
from reference_model.data.readers.reader import Reader
from reference_model.data.records import Record
from reference_model.files import InputError

SQUARE = [[1, 1, 6, 1, 6, 6, 1, 6]]
UNKNOWN = {"dataset": None, "split_by": None, "generated": False}


class Fake(Reader):
    """Records as they are given."""

    def __init__(self, records, skipped=()):
        super().__init__(Path("fake/list"), on_error="skip")
        self.made = records
        self.skipped = list(skipped)
        self.splits = {}
        for record in records:
            self.splits[record.split] = self.splits.get(record.split, 0) + 1

    def _stream(self, split):
        return (record for record in self.made if record.split == split)


@pytest.fixture
def sound(tmp_path):
    """Five records about four images, one of them in val, nothing wrong with them."""
    for n in range(4):
        Image.new("RGB", (8, 6), (9 * n, 0, 0)).save(tmp_path / f"{n}.png")
    rows = [(0, 0, "left one"), (1, 0, "right one"), (2, 1, "a cat"), (3, 2, "a dog"), (4, 3, "a cat")]
    return [
        Record(
            image=tmp_path / f"{image}.png",
            height=6,
            width=8,
            expression=expression,
            segmentation=[[value + (n == 1) for value in SQUARE[0]]],
            split="val" if image == 3 else "train",
            ref_id=n,
            ann_id=n,
            image_id=image,
            sent_id=n,
            category_id=1,
        )
        for n, image, expression in rows
    ]


def changed(records, at, **changes):
    return [replace(record, **changes) if n == at else record for n, record in enumerate(records)]


def found(records, *, skipped=(), origin=UNKNOWN, **options):
    report = inspect(Fake(records, skipped), origin, **options)
    assert report.sound == (not report.errors)
    shown_report(report)
    return report


def test_sound_records_pass(sound):
    report = found(sound, decode=True)
    assert report.sound and not report.notes
    assert report.splits == {
        "train": {"refs": 4, "sentences": 4, "images": 3, "no_target": 0},
        "val": {"refs": 1, "sentences": 1, "images": 1, "no_target": 0},
    }


def test_several_sentences_of_a_ref_are_one_ref(sound):
    report = found([*sound[:4], replace(sound[3], expression="the dog", sent_id=99), sound[4]])
    assert report.sound and report.splits["train"] == {"refs": 4, "sentences": 5, "images": 3, "no_target": 0}


def test_sentence_without_a_target_is_no_fault(sound):
    nothing = {"size": [6, 8], "counts": [48]}
    report = found(changed(sound, 2, ann_id=(), category_id=(), segmentation=nothing))
    assert report.sound and report.splits["train"]["no_target"] == 1


BREAKS = {
    "missing images": (3, dict(image=Path("/nowhere/x.png"), image_id=9), "x.png (ref 3): is missing"),
    "images of another size": (3, dict(height=7), "2.png: has height 6 and width 8, but its masks"),
    "empty masks": (3, dict(segmentation=[[0, 0, 0, 0, 0, 0]]), "2.png (ref 3): annotation 3"),
    "masks that cannot be read": (3, dict(segmentation=[[1, 2]]), "polygon 0 has 2 numbers"),
    "sent_ids given twice": (3, dict(sent_id=0), "2.png (ref 3), sentence 0"),
    "ref_ids of several objects": (3, dict(ref_id=0), "2.png (ref 0)"),
    "ann_ids of several objects": (3, dict(ann_id=0), "2.png (ref 3): annotation 0"),
    "image_ids of several images": (3, dict(image_id=0), "2.png (ref 3): image_id 0"),
}


@pytest.mark.parametrize("kind", BREAKS)
def test_broken_record_is_an_error_of_its_kind(kind, sound):
    at, changes, says = BREAKS[kind]
    report = found(changed(sound, at, **changes))
    assert list(report.errors) == [kind] and not report.notes
    assert report.errors[kind].count == 1 and says in report.errors[kind].first[0]
    text = shown_report(report)
    assert f"error: 1 {kind}; " in text and says in text and text.endswith(f"not sound: {kind}")


def test_ref_ids_of_two_objects_of_one_image_are_told(sound):
    assert list(found(changed(sound, 1, ref_id=0)).errors) == ["ref_ids of several objects"]
    assert list(found(changed(sound, 1, ann_id=0)).errors) == ["ann_ids of several objects"]


def test_two_refs_may_mean_one_object(sound):
    again = replace(sound[3], ref_id=99, sent_id=99, expression="the dog")
    assert found([*sound, again]).sound


def test_image_that_cannot_be_decoded_is_told_where_images_are_decoded(sound):
    path = sound[3].image
    path.write_bytes(path.read_bytes()[:45])  # the header is whole
    assert found(sound).sound
    report = found(sound, decode=True)
    assert list(report.errors) == ["unreadable images"]
    path.write_bytes(b"no image")
    report = found(sound)
    assert (
        list(report.errors) == ["unreadable images"]
        and str(path) in report.errors["unreadable images"].first[0]
    )


def test_images_in_records_are_looked_at_too(sound):
    held = [replace(record, image=record.image.read_bytes()) for record in sound]
    assert found(held, decode=True).sound
    report = found(changed(held, 3, image=b"no image"))
    assert report.errors["unreadable images"].first == [
        "image 2: not an image of a known kind; use JPEG or PNG"
    ]
    report = found(changed(held, 4, image=held[0].image))
    assert report.errors["images in two splits"].count == 1


def test_image_of_train_in_val_is_an_error_but_for_google(sound):
    both = changed(sound, 4, image=sound[0].image, image_id=0)
    report = found(both)
    assert list(report.errors) == ["images in two splits"]
    assert report.errors["images in two splits"].first == [f"{sound[0].image}: in train and val"]


def test_google_shares_images_and_that_is_a_note(sound, monkeypatch):
    both = changed(sound, 4, image=sound[0].image, image_id=0)
    # Known by its name, not by its sizes.
    monkeypatch.setitem(PUBLISHED, ("refcocog", "google"), Published({"train": 4, "val": 1}))
    for name in ("refcocog", "refcocog_g"):
        report = found(both, origin={"dataset": name, "split_by": "google", "generated": False})
        assert report.sound and report.notes["images in two splits, as published"].count == 1
    report = found(both, origin={"dataset": "refcocog", "split_by": "google", "generated": True})
    assert not report.sound


def test_sentence_of_two_objects_is_a_note(sound):
    report = found(changed(sound, 1, expression="LEFT one"))
    assert report.sound
    assert report.notes["sentences that mean several objects of an image"].count == 1
    assert "note: 1 sentences that mean several objects" in shown_report(report)


def test_what_readers_left_out_is_sorted_by_its_kind(sound):
    skipped = [
        "refs[0] sentences[1] has no words",
        "refs[1] (ref_id 4) names /x.jpg, which is missing; put the image there",
        "line 3 names m.png, which is missing; put the mask itself there",
        "instances.json: annotations[4] has id 5 a second time; mend that entry",
        "refs[7] has no 'image_id', only ['x']; mend that entry",
    ]
    report = found(sound, skipped=skipped)
    assert {kind: finding.first for kind, finding in report.errors.items()} == {
        "missing images": [skipped[1]],
        "masks that cannot be read": [skipped[2]],
        "entries left out for an id given twice": [skipped[3]],
        "records left out": [skipped[4]],
    }
    assert report.notes["sentences without words"].first == [skipped[0]]


def test_many_cases_are_counted_and_few_shown(sound):
    records = [replace(sound[0], sent_id=0) for _ in range(20)]
    report = found(records)
    finding = report.errors["sent_ids given twice"]
    assert finding.count == 19 and len(finding.first) == EXAMPLES
    assert f"and {19 - EXAMPLES} more" in shown_report(report)


def test_split_that_ends_early_is_told_and_the_others_go_on(sound):
    class Ending(Fake):
        def _stream(self, split):
            yield from super()._stream(split)
            if split == "train":
                raise InputError("the disk is gone")

    report = inspect(Ending(sound), UNKNOWN)
    assert report.errors["splits that end early"].first == ["train: the disk is gone"]
    assert report.splits["val"]["sentences"] == 1


# ---- published sizes ----------------------------------------------------------------------------

NAMED = {"dataset": "refcoco", "split_by": "unc", "generated": False}


def test_counts_of_a_published_set_must_be_the_published_ones(sound, monkeypatch):
    known = Published({"train": 4, "val": 1}, {"train": 4, "val": 1}, {"train_seen": 4, "val_unseen": 1})
    monkeypatch.setitem(PUBLISHED, ("refcoco", "unc"), known)
    records = changed(sound, 4, category_id=17)  # a cat is unseen
    report = found(records, origin=NAMED)
    assert report.sound and not report.notes and report.parts == {"train_seen": 4, "val_unseen": 1}
    text = shown_report(report).splitlines()
    assert text[2].split() == ["train", "4", "4", "4", "4", "3", "0"]
    assert text[4].split() == ["train_seen", "4", "4"]

    report = found(records[1:], origin=NAMED)
    assert report.errors["counts unlike the published"].first == [
        "train: 3 refs, published 4",
        "train: 3 sentences, published 4",
    ]
    assert report.notes["seen and unseen counts unlike the published"].first == [
        "train_seen: 3 refs, published 4"
    ]
    for origin in (UNKNOWN, NAMED | {"generated": True}, NAMED | {"split_by": "google"}):
        assert found(records[1:], origin=origin).sound


def test_split_that_is_missing_counts_as_none(sound, monkeypatch):
    monkeypatch.setitem(PUBLISHED, ("refcoco", "unc"), Published({"train": 4, "val": 1, "testA": 2}))
    report = found(sound, origin=NAMED)
    assert report.errors["counts unlike the published"].first == ["testA: 0 refs, published 2"]


def test_blank_sentences_of_a_published_set_do_not_spoil_its_counts(sound, monkeypatch):
    monkeypatch.setitem(PUBLISHED, ("refcoco", "unc"), Published({"train": 4}, {"train": 5, "all": 6}))
    assert found(sound, origin=NAMED, skipped=["refs[0] sentences[1] has no words"]).sound
    assert not found(sound, origin=NAMED).sound


def test_published_sizes_are_those_of_the_tables():
    refs = {name: sum(known.refs.values()) for name, known in PUBLISHED.items()}
    assert refs == {
        ("refcoco", "unc"): 50_000,
        ("refcoco+", "unc"): 49_856,
        ("refcocog", "umd"): 49_822,
        ("refcocog", "google"): 49_822,
    }
    assert sum(PUBLISHED["refcoco", "unc"].sentences.values()) == 142_210
    assert sum(PUBLISHED["refcoco+", "unc"].sentences.values()) == 141_564
    for known in PUBLISHED.values():  # seen and unseen leave 15 classes out
        assert known.parts["val_seen"] + known.parts["val_unseen"] < known.refs["val"]
        assert known.parts["train_seen"] < known.refs["train"]


# ---- files --------------------------------------------------------------------------------------


@pytest.fixture
def copied(scenes, tmp_path):
    root = tmp_path / "copy"
    shutil.copytree(scenes, root)
    return root


def edited(root, change):
    path = root / "refcoco" / "refs(unc).p"
    refs = pickle.loads(path.read_bytes())
    change(refs)
    path.write_bytes(pickle.dumps(refs, protocol=2))


def test_generated_set_is_sound_in_every_layout(scenes, copied, tmp_path, capsys):
    lines = convert(ConvertConfig(DataConfig(copied), copied / "all.jsonl"))
    shards = convert(ConvertConfig(DataConfig(copied), tmp_path / "shards"))
    tables = []
    capsys.readouterr()
    for root in (scenes, lines, shards):
        assert check(CheckConfig(DataConfig(root), images=True))
        source, *table = capsys.readouterr().out.splitlines()
        assert source == str(read(DataConfig(root)).source) and table[-1] == "sound"
        tables.append(table)
    assert tables[0] == tables[1] == tables[2]


def test_report_is_json_on_request_and_the_exit_code_tells(copied, capsys):
    assert main(["data", "check", str(copied), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["sound"] and report["errors"] == report["notes"] == report["published"] == {}
    victim = next(iter(read(DataConfig(copied)).stream("train"))).image
    victim.unlink()
    assert main(["data", "check", str(copied), "--json"]) == 1
    told = capsys.readouterr()
    report = json.loads(told.out)
    assert not report["sound"] and str(victim) in report["errors"]["missing images"]["first"][0]
    assert "warning" not in told.err  # the report says it
    assert main(["data", "check", str(copied / "nowhere")]) == 2


def test_broken_files_give_a_whole_report(copied, capsys):
    images = copied / "images" / "train2014"
    victim = next(iter(read(DataConfig(copied)).stream("val"))).image
    victim.write_bytes(b"no image")

    def change(refs):
        refs[0]["sentences"][0].update(sent=" ", raw="")
        refs[1]["ann_id"] = 10**6
        refs[2]["sentences"][0]["sent_id"] = refs[3]["sentences"][0]["sent_id"]
        refs[4]["split"] = "val"

    edited(copied, change)
    assert not check(CheckConfig(DataConfig(copied)))
    out = capsys.readouterr().out
    assert "error: 1 unreadable images" in out and str(victim) in out
    assert "error: 1 records left out" in out and "names annotation 1000000" in out
    assert "error: 1 sent_ids given twice" in out
    assert "error: 1 images in two splits" in out and str(images) in out
    assert "note: 1 sentences without words" in out
    assert out.splitlines()[-1].startswith("not sound: ") and out.splitlines()[-1].count(",") == 3


def test_data_set_is_known_by_its_files_not_by_the_default_of_a_config(scenes, copied, tmp_path):
    refer = DataConfig(copied)
    assert made_of(read(refer), refer) == {"dataset": "refcoco", "split_by": "unc", "generated": True}
    (copied / "generated.json").unlink()
    assert made_of(read(refer), refer)["generated"] is False
    lines = DataConfig(convert(ConvertConfig(refer, copied / "all.jsonl")))
    assert lines.dataset == "refcoco" and made_of(read(lines), lines)["dataset"] is None
    shards = DataConfig(convert(ConvertConfig(refer, tmp_path / "shards")))
    assert made_of(read(shards), shards) == {"dataset": "refcoco", "split_by": "unc", "generated": False}


def test_real_name_with_made_up_counts_fails(copied, monkeypatch, capsys):
    (copied / "generated.json").unlink()
    assert not check(CheckConfig(DataConfig(copied)))
    out = capsys.readouterr().out
    assert "counts unlike the published" in out and "published 42,404" in out
    assert check_module.PUBLISHED is PUBLISHED
