"""Refer and Record: what REFER's files say is what comes out, and a defect is one line of InputError."""

import copyreg
import io
import json
import os
import pickle
import random
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as coco_mask

from reference_model.data.images import IMAGE_FOLDERS
from reference_model.data.readers.refer import Refer
from reference_model.data.records import segmentation_mask
from reference_model.files import InputError

SQUARE = [[2, 2, 8, 2, 8, 8, 2, 8]]


def refs_and_instances():
    """Two images of 12 x 16 pixels with three objects; ref 1 has two sentences."""
    refs = [
        ref(ref_id=1, ann_id=10, image_id=100, split="train", sentences=["left square", "the square"]),
        ref(ref_id=2, ann_id=11, image_id=100, split="testA", sentences=["top man"]),
        ref(ref_id=3, ann_id=12, image_id=200, split="testB", sentences=["red thing"]),
        ref(ref_id=4, ann_id=10, image_id=100, split="train", sentences=["white one"]),
    ]
    names = {100: "COCO_train2014_000000000100.jpg", 200: "COCO_train2014_000000000200.jpg"}
    instances = {
        "images": [{"id": id, "file_name": name, "height": 12, "width": 16} for id, name in names.items()],
        "annotations": [
            {"id": id, "image_id": image, "category_id": 1, "segmentation": SQUARE, "area": 36, "iscrowd": 0}
            for id, image in ((10, 100), (11, 100), (12, 200), (13, 200))
        ],
        "categories": [{"id": 1, "name": "person"}],
    }
    return refs, instances


def ref(ref_id, ann_id, image_id, split, sentences):
    return {
        "ref_id": ref_id,
        "ann_id": ann_id,
        "image_id": image_id,
        "split": split,
        "category_id": 1,
        "file_name": f"COCO_train2014_{image_id:012}_{ann_id}.jpg",
        "sent_ids": [ref_id * 10 + k for k in range(len(sentences))],
        "sentences": [
            {"sent": sent, "raw": sent.upper(), "tokens": sent.split(), "sent_id": ref_id * 10 + k}
            for k, sent in enumerate(sentences)
        ],
    }


def written(root, refs, instances, *, protocol=2, images="images/train2014"):
    """Write a REFER folder; ``refs`` may be ready-made bytes, ``instances`` ready-made text."""
    folder = root / "refcoco"
    folder.mkdir(parents=True, exist_ok=True)
    data = refs if isinstance(refs, bytes) else pickle.dumps(refs, protocol=protocol)
    (folder / "refs(unc).p").write_bytes(data)
    text = instances if isinstance(instances, str) else json.dumps(instances)
    (folder / "instances.json").write_text(text)
    if images:
        (root / images).mkdir(parents=True, exist_ok=True)
        for id in (100, 200):
            Image.new("RGB", (16, 12)).save(root / images / f"COCO_train2014_{id:012}.jpg")
    return root


def refusal(root):
    """Read, expect an InputError, and give its message, which must be one line that names the folder."""
    with pytest.raises(InputError) as caught:
        Refer(root)
    message = str(caught.value)
    assert "\n" not in message and str(root) in message and len(message) < 1000
    return message


# ---- what is read -------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", range(6))
def test_records_follow_the_file_one_a_sentence(tmp_path, protocol):
    refer = Refer(written(tmp_path, *refs_and_instances(), protocol=protocol))
    assert refer.splits == {"train": 3, "testA": 1, "testB": 1}
    train = refer.records("train")
    assert [(r.ref_id, r.sent_id, r.expression) for r in train] == [
        (1, 10, "left square"),
        (1, 11, "the square"),
        (4, 40, "white one"),
    ]
    first = train[0]
    assert (first.ann_id, first.image_id, first.category_id, first.height, first.width) == (
        10,
        100,
        1,
        12,
        16,
    )
    # The name comes from instances.json; the ref's own carries the annotation's id.
    assert first.image == tmp_path / "images/train2014/COCO_train2014_000000000100.jpg"
    assert first.image.is_file()


def test_split_matches_by_equality_only(tmp_path):
    refs, instances = refs_and_instances()
    refs[0]["split"] = "test"
    refer = Refer(written(tmp_path, refs, instances))
    assert {r.ref_id for r in refer.records("test")} == {1}
    assert {r.ref_id for r in refer.records("testA")} == {2}
    with pytest.raises(InputError, match=r"no split 'testa'; did you mean 'testA'\? there are 'test' \(2\)"):
        refer.records("testa")
    with pytest.raises(InputError, match=r"no split 'A'; "):
        refer.records("A")


@pytest.mark.parametrize("folder", IMAGE_FOLDERS)
def test_every_usual_image_folder_is_found(tmp_path, folder):
    refer = Refer(written(tmp_path, *refs_and_instances(), images=folder))
    assert all(r.image.is_file() for split in refer.splits for r in refer.records(split))


def test_image_folder_with_the_images_wins_over_an_empty_one(tmp_path):
    (tmp_path / IMAGE_FOLDERS[0]).mkdir(parents=True)
    refer = Refer(written(tmp_path, *refs_and_instances(), images="train2014"))
    assert refer.records("train")[0].image.parent == tmp_path / "train2014"


def test_other_dataset_and_split_by_are_read_from_their_own_files(tmp_path):
    refs, instances = refs_and_instances()
    written(tmp_path, refs, instances)
    (tmp_path / "refcoco").rename(tmp_path / "refcocog")
    (tmp_path / "refcocog/refs(google).p").write_bytes(pickle.dumps(refs[:1]))
    assert Refer(tmp_path, "refcocog", "google").splits == {"train": 2}
    assert Refer(tmp_path, "refcocog", "unc").splits == {"train": 3, "testA": 1, "testB": 1}


def test_sentence_falls_back_to_raw(tmp_path):
    refs, instances = refs_and_instances()
    del refs[0]["sentences"][0]["sent"]
    refs[0]["sentences"][1]["sent"] = " "
    refer = Refer(written(tmp_path, refs, instances))
    assert [r.expression for r in refer.records("train")] == ["LEFT SQUARE", "THE SQUARE", "white one"]


def test_sentence_without_words_is_left_out_with_a_warning(tmp_path):
    refs, instances = refs_and_instances()
    refs[0]["sentences"][1] |= {"sent": "", "raw": "  "}
    with pytest.warns(UserWarning, match=r"refs\[0\] \(ref_id 1\) sentences\[1\] has no words; 1 such"):
        refer = Refer(written(tmp_path, refs, instances))
    assert refer.splits["train"] == 2


def test_raw_sentences_are_read_where_asked_for_and_there(tmp_path):
    refs, instances = refs_and_instances()
    refs[0]["sentences"][0]["raw"] = "  "
    del refs[0]["sentences"][1]["raw"]
    refer = Refer(written(tmp_path, refs, instances), text="raw")
    assert [r.expression for r in refer.records("train")] == ["left square", "the square", "WHITE ONE"]


def test_categories_are_named_as_far_as_the_file_names_them(tmp_path):
    refs, instances = refs_and_instances()
    assert Refer(written(tmp_path, refs, instances)).categories == {1: "person"}
    for found in (None, 5, {}, [5, {"id": "1", "name": "a"}, {"id": 2}, {"id": 3, "name": 4}]):
        instances["categories"] = found
        assert Refer(written(tmp_path, refs, instances)).categories == {}
    del instances["categories"]
    assert Refer(written(tmp_path, refs, instances)).categories == {}


def test_annotations_lists_all_of_one_image(tmp_path):
    refer = Refer(written(tmp_path, *refs_and_instances()))
    assert [a["id"] for a in refer.annotations(200)] == [12, 13]
    assert refer.annotations(999) == []


def python2_pickle(value, protocol):
    """Write as Python 2 did: str is a byte string (STRING, SHORT_BINSTRING), keys included."""
    if protocol == 0:
        text = lambda data: b"S" + repr(data)[1:].encode() + b"\n"
        number = lambda n: b"I%d\n" % n
        array = lambda parts: b"(l" + b"".join(part + b"a" for part in parts)
        table = lambda pairs: b"(d" + b"".join(k + v + b"s" for k, v in pairs)
    else:
        text = lambda data: b"U" + bytes([len(data)]) + data
        number = lambda n: b"J" + n.to_bytes(4, "little")
        array = lambda parts: b"](" + b"".join(parts) + b"e"
        table = lambda pairs: b"}(" + b"".join(k + v for k, v in pairs) + b"u"

    def write(value):
        if isinstance(value, bytes):
            return text(value)
        if isinstance(value, str):
            return text(value.encode())
        if isinstance(value, int):
            return number(value)
        if isinstance(value, list):
            return array([write(part) for part in value])
        return table([(write(k), write(v)) for k, v in value.items()])

    return (b"\x80\x02" if protocol == 2 else b"") + write(value) + b"."


@pytest.mark.parametrize("protocol", [0, 1, 2])
@pytest.mark.parametrize("encoding", ["utf-8", "latin-1"])
def test_python2_byte_strings_are_read(tmp_path, protocol, encoding):
    refs, instances = refs_and_instances()
    refs[0]["sentences"][0]["sent"] = "café à gauche".encode(encoding)
    refer = Refer(written(tmp_path, python2_pickle(refs, protocol), instances))
    assert refer.records("train")[0].expression == "café à gauche"
    assert refer.records("testA")[0].expression == "top man"


# ---- masks --------------------------------------------------------------------------------------


def test_union_of_polygons_keeps_their_overlap():
    two = [[0, 0, 10, 0, 10, 10, 0, 10], [5, 5, 15, 5, 15, 15, 5, 15]]
    mask = segmentation_mask(two, 20, 20, owner="here")
    expected = np.zeros((20, 20), bool)
    expected[0:10, 0:10] = expected[5:15, 5:15] = True
    np.testing.assert_array_equal(mask, expected)


def test_polygon_is_x_then_y():
    mask = segmentation_mask([[10, 1, 14, 1, 14, 3, 10, 3]], 8, 20, owner="here")
    assert mask[1:3, 10:14].all() and mask.sum() == 8


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**32 - 1), st.floats(0, 1))
@settings(deadline=None)
def test_run_lengths_of_both_kinds_are_the_mask_they_encode(height, width, seed, share):
    mask = np.random.default_rng(seed).random((height, width)) < share
    compressed = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    as_text = {"size": [height, width], "counts": compressed["counts"].decode()}
    flat = mask.T.reshape(-1)
    edges = [0, *(np.flatnonzero(np.diff(flat)) + 1), flat.size]
    counts = [int(n) for n in np.diff(edges)]
    as_list = {"size": [height, width], "counts": ([0] if flat[0] else []) + counts}
    for runs in (compressed, as_text, as_list):
        np.testing.assert_array_equal(segmentation_mask(runs, height, width, owner="here"), mask)


def test_long_runs_are_the_mask_they_encode():
    mask = np.zeros((700, 900), bool)
    mask[:, 300:650] = True
    mask[13:500:7, 20:880:3] ^= True
    runs = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    np.testing.assert_array_equal(segmentation_mask(runs, 700, 900, owner="here"), mask)


def test_record_mask_has_the_size_of_the_image(tmp_path):
    record = Refer(written(tmp_path, *refs_and_instances())).records("train")[0]
    expected = np.zeros((12, 16), bool)
    expected[2:8, 2:8] = True
    np.testing.assert_array_equal(record.mask(), expected)


NAN = float("nan")


@pytest.mark.parametrize(
    ("segmentation", "says"),
    [
        (None, "segmentation is None"),
        ("1,2,3", "segmentation is '1,2,3'"),
        ([], "no polygon"),
        ([5, 5, 9, 5, 9, 9], "polygon 0 is 5"),
        ([[1, 1, 5, 5]], "polygon 0 has 4 numbers"),
        ([*SQUARE, [1, 1, 5, 1, 5, 5, 2]], "polygon 1 has 7 numbers"),
        ([[1, 1, 5, 1, 5, "5"]], "polygon 0 is"),
        ([[1, 1, 5, 1, 5, True]], "polygon 0 is"),
        ([[1, 1, 5, 1, 5, NAN]], "polygon 0 leaves"),
        ([[1, 1, 5, 1, 5, 1e9]], "polygon 0 leaves its 12 x 16 image"),
        ([[1, 1, 5, 1, 5, 10**400]], "polygon 0 leaves"),
        ({}, "size None"),
        ({"size": [16, 12], "counts": [192]}, r"size [16, 12], but the image has [12, 16]"),
        ({"size": [12, 16], "counts": [100]}, "covers 100 pixels, but the image has 12 x 16 = 192"),
        ({"size": [12, 16], "counts": [-8, 200]}, "whole numbers"),
        ({"size": [12, 16], "counts": [1.0, 191]}, "whole numbers"),
        ({"size": [12, 16], "counts": ""}, "covers 0 pixels"),
        ({"size": [12, 16], "counts": "04"}, "covers 4 pixels"),
        ({"size": [12, 16], "counts": "zzzzzzzzzzzzzzzzzz"}, "not COCO's compressed text"),
        ({"size": [12, 16], "counts": "é"}, "not COCO's compressed text"),
        ({"size": [12, 16], "counts": "T"}, "not COCO's compressed text"),
        ({"size": [12, 16], "counts": 192}, "counts 192"),
    ],
)
def test_malformed_segmentation_names_its_annotation(tmp_path, segmentation, says):
    refs, instances = refs_and_instances()
    if segmentation != [[1, 1, 5, 1, 5, 10**400]]:
        instances["annotations"][0]["segmentation"] = segmentation
        message = refusal(written(tmp_path, refs, instances))
        assert "instances.json: annotation 10: " in message and says in message
    with pytest.raises(InputError) as caught:
        segmentation_mask(segmentation, 12, 16, owner="annotation 10")
    assert str(caught.value).startswith("annotation 10: ") and says in str(caught.value)


# ---- refusals -----------------------------------------------------------------------------------


def test_missing_dataset_names_what_is_there(tmp_path):
    (tmp_path / "refcoco+").mkdir()
    assert "refcoco: no such folder" in refusal(tmp_path) and "'refcoco+'" in refusal(tmp_path)


def test_missing_refs_file_names_the_split_by_that_exist(tmp_path):
    written(tmp_path, *refs_and_instances())
    (tmp_path / "refcoco/refs(unc).p").rename(tmp_path / "refcoco/refs(google).p")
    assert "refs(unc).p: no such file; use split_by google" in refusal(tmp_path)
    (tmp_path / "refcoco/refs(google).p").unlink()
    assert "holds 'instances.json'" in refusal(tmp_path)


def test_missing_instances_names_what_is_there(tmp_path):
    written(tmp_path, *refs_and_instances())
    (tmp_path / "refcoco/instances.json").unlink()
    message = refusal(tmp_path)
    assert "instances.json: no such file" in message and "holds 'refs(unc).p'" in message


def test_missing_image_folder_names_the_places(tmp_path):
    message = refusal(written(tmp_path, *refs_and_instances(), images=None))
    assert "holds no image folder" in message and all(folder in message for folder in IMAGE_FOLDERS)


def test_missing_images_are_counted_before_training_begins(tmp_path):
    refer = Refer(written(tmp_path, *refs_and_instances()))
    (tmp_path / "images/train2014/COCO_train2014_000000000200.jpg").unlink()
    assert len(refer.records("train")) == 3
    with pytest.raises(
        InputError, match=r"train2014: lacks 'COCO_t.*0200.jpg', as 1 of the 1 images of .*'testB'"
    ):
        refer.records("testB")


def drop(*path):
    def edit(refs, instances):
        *parents, last = path
        place = {"refs": refs, "instances": instances}
        for key in parents:
            place = place[key]
        del place[last]

    return edit


def put(value, *path):
    def edit(refs, instances):
        *parents, last = path
        place = {"refs": refs, "instances": instances}
        for key in parents:
            place = place[key]
        place[last] = value

    return edit


@pytest.mark.parametrize(
    ("edit", *("file", "says")),
    [
        (put(77, "refs", 1, "ann_id"), "refs(unc).p", "refs[1] (ref_id 2) names annotation 77"),
        (put(77, "refs", 1, "image_id"), "refs(unc).p", "refs[1] (ref_id 2) names image 77"),
        (
            put(200, "refs", 1, "image_id"),
            "refs(unc).p",
            "names image 200, but its annotation 11 lies on image 100",
        ),
        (
            put([10, 11], "refs", 1, "ann_id"),
            "refs(unc).p",
            "refs[1] (ref_id 2) has 'ann_id' = [10, 11], expected int",
        ),
        (put(True, "refs", 1, "ann_id"), "refs(unc).p", "'ann_id' = True, expected int"),
        (put(2**20000, "refs", 1, "ref_id"), "refs(unc).p", "refs[1] has 'ref_id' = a huge int"),
        (put("x\n" * 500, "refs", 1, "ref_id"), "refs(unc).p", "refs[1] has 'ref_id' = 'x\\nx\\n"),
        (drop("refs", 1, "split"), "refs(unc).p", "refs[1] (ref_id 2) has no 'split', only ['ref_id'"),
        (drop("refs", 1, "sentences"), "refs(unc).p", "refs[1] (ref_id 2) has no 'sentences'"),
        (put("a man", "refs", 1, "sentences"), "refs(unc).p", "'sentences' = 'a man', expected list"),
        (put(["a man"], "refs", 1, "sentences"), "refs(unc).p", "sentences[0] is 'a man', expected a dict"),
        (
            put([{"sent_id": 5}], "refs", 1, "sentences"),
            "refs(unc).p",
            "sentences[0] has neither 'sent' nor 'raw'",
        ),
        (put(None, "refs", 1, "sentences", 0, "sent"), "refs(unc).p", "'sent' = None, expected str"),
        (put(["ref"], "refs", 1), "refs(unc).p", "refs[1] is ['ref'], expected a dict"),
        (drop("instances", "images"), "instances.json", "the top level has no 'images'"),
        (drop("instances", "annotations"), "instances.json", "the top level has no 'annotations'"),
        (put({}, "instances", "annotations"), "instances.json", "'annotations' = {}, expected list"),
        (put(5, "instances", "annotations", 2), "instances.json", "annotations[2] is 5, expected a dict"),
        (drop("instances", "annotations", 2, "id"), "instances.json", "annotations[2] has no 'id'"),
        (
            put(10, "instances", "annotations", 2, "id"),
            "instances.json",
            "annotations[2] has id 10 a second time",
        ),
        (
            drop("instances", "annotations", 2, "image_id"),
            "instances.json",
            "annotation 12 has no 'image_id'",
        ),
        (drop("instances", "annotations", 2, "segmentation"), "instances.json", "12 has no 'segmentation'"),
        (drop("instances", "images", 0, "height"), "instances.json", "image 100 has no 'height'"),
        (put("12", "instances", "images", 0, "height"), "instances.json", "'height' = '12', expected int"),
        (put(0, "instances", "images", 0, "width"), "instances.json", "height 12 and width 0"),
        (put(10**9, "instances", "images", 0, "width"), "instances.json", "and width 1000000000"),
    ],
)
def test_each_defect_names_its_file_and_record(tmp_path, edit, file, says):
    refs, instances = refs_and_instances()
    edit(refs, instances)
    message = refusal(written(tmp_path, refs, instances))
    assert message.startswith(f"{tmp_path / 'refcoco' / file}: ") and says in message


@pytest.mark.parametrize(
    "name",
    [
        "../../secret.jpg",
        "/etc/passwd",
        "a/../../b.jpg",
        "..\\b.jpg",
        "C:b.jpg",
        "",
        ".",
        "a\0.jpg",
        "a\nb.jpg",
        "x" * 2000,
    ],
)
def test_image_name_cannot_leave_the_folder(tmp_path, name):
    refs, instances = refs_and_instances()
    instances["images"][1]["file_name"] = name
    assert "instances.json: image 200 has file_name " in refusal(written(tmp_path, refs, instances))


def test_image_name_may_hold_a_folder(tmp_path):
    refs, instances = refs_and_instances()
    for image in instances["images"]:
        image["file_name"] = "part/" + image["file_name"]
    refer = Refer(written(tmp_path, refs, instances, images="images/train2014/part"))
    assert refer.records("train")[0].image.is_file()


@pytest.mark.parametrize("value", [{}, {"refs": []}, [], "refs", 5, None])
def test_refs_of_another_type_are_refused(tmp_path, value):
    message = refusal(written(tmp_path, value, refs_and_instances()[1]))
    assert "refs(unc).p: holds" in message and "expected a list of refs" in message


@pytest.mark.parametrize(
    "text", ["", "{", '{"images": [}', "[" * 200_000, '"\\ud8', "9" * 5000, "\ufeff\ufeff{}"]
)
def test_malformed_json_is_refused(tmp_path, text):
    message = refusal(written(tmp_path, refs_and_instances()[0], text))
    assert message.startswith(str(tmp_path / "refcoco/instances.json") + ": ")


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_truncated_pickle_is_refused(tmp_path, share):
    refs, instances = refs_and_instances()
    for protocol in range(6):
        data = pickle.dumps(refs, protocol=protocol)
        message = refusal(written(tmp_path, data[: int(len(data) * share)], instances))
        assert "refs(unc).p: not a whole pickle" in message


@pytest.mark.parametrize(
    ("edit", "left", "count"),
    [
        (put(77, "refs", 0, "ann_id"), {"train": 1, "testA": 1, "testB": 1}, 1),
        (put("x", "refs", 3), {"train": 2, "testA": 1, "testB": 1}, 1),
        (put({}, "refs", 0, "sentences", 0), {"train": 2, "testA": 1, "testB": 1}, 1),
        (put("\ud800", "refs", 0, "sentences", 0, "sent"), {"train": 2, "testA": 1, "testB": 1}, 1),
        (put("x" * 10_001, "refs", 0, "sentences", 0, "sent"), {"train": 2, "testA": 1, "testB": 1}, 1),
        (put([], "instances", "annotations", 0, "segmentation"), {"testA": 1, "testB": 1}, 2),
        (drop("instances", "annotations", 1, "image_id"), {"train": 3, "testB": 1}, 2),
        (put("../x.jpg", "instances", "images", 1, "file_name"), {"train": 3, "testA": 1}, 2),
        (put("gone.jpg", "instances", "images", 1, "file_name"), {"train": 3, "testA": 1}, 1),
        (put(100, "instances", "images", 1, "id"), {"train": 3, "testA": 1}, 2),
    ],
)
def test_skip_leaves_out_what_is_malformed_and_counts_it(tmp_path, edit, left, count):
    refs, instances = refs_and_instances()
    edit(refs, instances)
    root = written(tmp_path, refs, instances)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        refer = Refer(root, on_error="skip")
    assert refer.splits == left and len(refer.skipped) == count
    assert {split: len(refer.records(split)) for split in left} == left
    assert all(str(root) in reason and "\n" not in reason for reason in refer.skipped)
    said = [str(warning.message) for warning in caught if warning.category is UserWarning]
    assert said == [f"{refer.skipped[0]}; {count} such left out"]
    assert all(record.image.is_file() for split in left for record in refer.records(split))


def test_skip_does_not_hide_a_broken_file_or_that_nothing_is_left(tmp_path):
    refs, instances = refs_and_instances()
    for content in (b"", b"garbage", pickle.dumps({})):
        with pytest.raises(InputError, match=r"refs\(unc\).p: "):
            Refer(written(tmp_path, content, instances), on_error="skip")
    for one in refs:
        one["ann_id"] = 77
    with pytest.raises(InputError, match=r"refs\[0\] .* names annotation 77.*; so are all 4 entries"):
        Refer(written(tmp_path, refs, instances), on_error="skip")


def test_image_folder_may_be_a_link_but_no_single_image_out_of_it(tmp_path):
    root = written(tmp_path / "data", *refs_and_instances())
    (root / "images/train2014").rename(tmp_path / "coco")
    (root / "images/train2014").symlink_to(tmp_path / "coco")
    assert len(Refer(root).records("testB")) == 1
    name = "COCO_train2014_000000000200.jpg"
    (tmp_path / "coco" / name).rename(tmp_path / "secret.jpg")
    (tmp_path / "coco" / name).symlink_to("../secret.jpg")
    assert len(Refer(root).records("train")) == 3
    with pytest.raises(InputError, match=rf"{name}: is a link that leaves its folder, as 1 of the 1 images"):
        Refer(root).records("testB")
    with pytest.warns(UserWarning, match="which is a link that leaves its folder"):
        assert "testB" not in Refer(root, on_error="skip").splits
    (tmp_path / "coco" / name).unlink()
    (tmp_path / "coco" / name).symlink_to("COCO_train2014_000000000100.jpg")  # stays inside
    assert len(Refer(root).records("testB")) == 1
    (tmp_path / "coco" / name).unlink()
    os.mkfifo(tmp_path / "coco" / name)
    with pytest.raises(InputError, match=rf"{name}: is not a file"):
        Refer(root).records("testB")


def test_pipe_in_place_of_a_file_is_refused_at_once(tmp_path):
    root = written(tmp_path, *refs_and_instances())
    for name in ("instances.json", "refs(unc).p"):
        (root / "refcoco" / name).unlink()
        os.mkfifo(root / "refcoco" / name)
        assert f"{name}: " in refusal(root)


def test_file_beyond_all_sizes_is_refused_unread(tmp_path):
    root = written(tmp_path, *refs_and_instances())
    os.truncate(root / "refcoco/instances.json", 3 * 2**30)  # sparse: takes no room
    assert "instances.json: has 3221225472 bytes, more than" in refusal(root)


# ---- hostile pickles ----------------------------------------------------------------------------


class Persistent(pickle.Pickler):
    def persistent_id(self, value):
        return "owned" if value == "top man" else None


def persistent(refs, protocol):
    stream = io.BytesIO()
    Persistent(stream, protocol).dump(refs)
    return stream.getvalue()


class Shell:
    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def test_hostile_pickles_are_refused_by_name_and_run_nothing(tmp_path):
    proof = tmp_path / "owned"
    command = f"touch '{proof}'"
    refs, instances = refs_and_instances()
    text = b"X" + len(command).to_bytes(4, "little") + command.encode()
    hostile = {
        b"cos\nsystem\n(S" + repr(command).encode() + b"\ntR.": "the global 'os.system'",
        b"(S" + repr(command).encode() + b"\nios\nsystem\n.": "the global 'os.system'",
        b"(cos\nsystem\n" + text + b"o.": "the global 'os.system'",
        b"\x80\x04\x8c\x02os\x8c\x06system\x93" + text + b"\x85R.": "the global 'os.system'",
        b"\x80\x04\x8c\x02o\n\x8c\x06system\x93" + text + b"\x85R.": r"the global 'o\nsystem'"[:14],
        b"cbuiltins\nlist\n.": "the global 'builtins.list'",
        b"Powned\n.": "the persistent id 'owned'",
        persistent(refs, 2): "the persistent id 'owned'",
        persistent(refs, 0): "the persistent id 'owned'",
    }
    hostile |= {pickle.dumps([*refs, Shell(command)], protocol=protocol): "system'" for protocol in range(6)}
    for data, named in hostile.items():
        message = refusal(written(tmp_path, data, instances))
        assert "refs(unc).p: asks for" in message and named in message
    assert not proof.exists()
    # The same bytes do run where nothing guards them, so the test is not an empty one.
    pickle.loads(next(iter(hostile)))
    assert proof.exists()


def test_extension_code_is_refused_even_where_another_reader_cached_it(tmp_path):
    copyreg.add_extension("os", "system", 201)
    try:
        for code in (b"\x82\xc9", b"\x83\xc9\x00", b"\x84\xc9\x00\x00\x00"):
            data = b"\x80\x02" + code + b"."
            assert pickle.loads(data) is os.system
            message = refusal(written(tmp_path, data, refs_and_instances()[1]))
            assert "the extension code 201" in message
    finally:
        copyreg.remove_extension("os", "system", 201)
        copyreg.clear_extension_cache()


def cyclic_list():
    value = []
    value.append(value)
    return value


def cyclic_ref():
    refs, _ = refs_and_instances()
    refs[0]["sentences"][0]["tokens"] = refs
    return refs


def sharing(depth):
    """A list of ten times the same list of ten times the same list ..."""
    value = ["x"] * 10
    for _ in range(depth):
        value = [value] * 10
    return value


def shared_sentences():
    refs, _ = refs_and_instances()
    refs[0]["sentences"] *= 3000
    return [refs[0]] * 3000  # 18 million records in a file of a few thousand bytes


@pytest.mark.parametrize("make", [cyclic_list, cyclic_ref, lambda: sharing(12), shared_sentences])
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_lists_that_hold_themselves_or_repeat_without_end_are_refused(tmp_path, make, protocol):
    started = time.process_time()
    message = refusal(written(tmp_path, make(), refs_and_instances()[1], protocol=protocol))
    assert "refs(unc).p: holds lists inside of themselves, or many times over" in message
    assert time.process_time() - started < 5


def test_numbers_that_would_fill_a_table_for_hours_are_refused(tmp_path):
    same = 2**61 - 1  # multiples of it have the same hash
    for value in ({same * k: 0 for k in range(1, 40)}, {1: 2}, {(1,): 2}, {None: 1}):
        for protocol in (0, 1, 2, 4):
            message = refusal(written(tmp_path, [value], refs_and_instances()[1], protocol=protocol))
            assert "asks for a dict with the key " in message
    puts = b"".join(b"p%d\n" % (same * k) for k in range(1, 40))
    assert "memo index" in refusal(written(tmp_path, b"(l" + puts + b".", refs_and_instances()[1]))
    assert "not a whole pickle" in refusal(
        written(tmp_path, pickle.dumps({same}, protocol=4), refs_and_instances()[1])
    )


@pytest.mark.parametrize(
    "data",
    [
        b"\x80\x02]r\xff\xff\xff\x7f.",  # memo index of 2^31 - 1: the C unpickler would reserve 32 GiB
        b"(lp9999999999\n.",
        b"\x80\x05\x96" + (2**36).to_bytes(8, "little") + b".",
        b"\x80\x04\x8e" + (2**36).to_bytes(8, "little") + b".",
        b"\x80\x02\x8b\xff\xff\xff\x7f.",
    ],
)
def test_stated_size_reserves_no_memory(tmp_path, data):
    import resource

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refusal(written(tmp_path, data, refs_and_instances()[1]))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB


# ---- fuzz ---------------------------------------------------------------------------------------


def read_everything(root):
    refer = Refer(root)
    for split in refer.splits:
        for record in refer.records(split):
            assert record.mask().shape == (record.height, record.width)
            assert record.image.parts[: len(root.parts)] == root.parts and ".." not in record.image.parts


def mutated(data, rng):
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        at = rng.randrange(len(data))
        match rng.randrange(4):
            case 0:
                data[at] = rng.randrange(256)
            case 1:
                del data[at : at + rng.randrange(1, 20)]
            case 2:
                data[at:at] = data[rng.randrange(len(data)) :][: rng.randrange(1, 20)]
            case _:
                data[at:at] = bytes(rng.randrange(256) for _ in range(rng.randrange(1, 5)))
        data = data or bytearray(b".")
    return bytes(data)


@pytest.mark.filterwarnings("ignore:.*has no words")
def test_mutated_files_give_records_or_an_input_error(tmp_path):
    refs, instances = refs_and_instances()
    rng = random.Random(7)
    pickles = [pickle.dumps(refs, protocol=protocol) for protocol in range(6)]
    pickles += [python2_pickle(refs, protocol) for protocol in (0, 2)]
    text = json.dumps(instances)
    read, refused = 0, []
    for case in range(700):
        if case % 2:
            written(
                tmp_path, mutated(rng.choice(pickles), rng), text, images=None if case > 1 else "train2014"
            )
        else:
            written(tmp_path, pickles[0], text, images=None)
            (tmp_path / "refcoco/instances.json").write_bytes(mutated(text.encode(), rng))
        try:
            (tmp_path / "train2014").mkdir(exist_ok=True)
            read_everything(tmp_path)
            read += 1
        except InputError as error:
            refused.append(str(error))
    assert not any("\n" in message for message in refused)
    assert min(read, len(refused)) > 20  # the mutations reach both ends


scalars = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just([]) | st.just({})
)
paths = st.sampled_from(
    [
        ("refs", 0, "ann_id"),
        ("refs", 0, "image_id"),
        ("refs", 0, "ref_id"),
        ("refs", 0, "split"),
        ("refs", 0, "sentences"),
        ("refs", 0, "sentences", 0),
        ("refs", 0, "sentences", 0, "sent"),
        ("refs", 0, "sentences", 0, "sent_id"),
        ("instances", "images"),
        ("instances", "images", 0),
        ("instances", "images", 0, "id"),
        ("instances", "images", 0, "file_name"),
        ("instances", "images", 0, "height"),
        ("instances", "annotations", 0),
        ("instances", "annotations", 0, "id"),
        ("instances", "annotations", 0, "image_id"),
        ("instances", "annotations", 0, "segmentation"),
        ("instances", "annotations", 0, "segmentation", 0),
        ("instances", "annotations", 0, "segmentation", 0, 3),
    ]
)


@pytest.mark.filterwarnings("ignore:.*has no words")
@given(paths, scalars)
@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_value_in_any_place_gives_records_or_an_input_error(tmp_path, path, value):
    refs, instances = json.loads(json.dumps(refs_and_instances()))
    put(value, *path)(refs, instances)
    root = Path(tmp_path)
    (root / "train2014").mkdir(exist_ok=True)
    message = ""
    try:
        read_everything(written(root, refs, instances, images=None))
    except InputError as error:
        message = str(error)
    assert "\n" not in message
