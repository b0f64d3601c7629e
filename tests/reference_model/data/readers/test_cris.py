"""Cris: what CRIS prepares is what comes out, and a defect names its file and entry."""

import json

import numpy as np
import pytest
from PIL import Image

from reference_model.data.config import DataConfig
from reference_model.data.datasets import read
from reference_model.data.readers.cris import Cris
from reference_model.data.splits import COCO
from reference_model.files import InputError
from reference_model.scoring.evaluator import truth_of
from reference_model.scoring.protocols import PROTOCOLS

NAME = "COCO_train2014_{:012}.jpg"


def ref(segment_id, image, sentences, cat=0):
    return {
        "bbox": [1, 1, 5, 5],
        "cat": cat,
        "segment_id": segment_id,
        "img_name": NAME.format(image),
        "sentences": [
            {"idx": k, "sent_id": segment_id * 10 + k, "sent": sent} for k, sent in enumerate(sentences)
        ],
        "sentences_num": len(sentences),
    }


def splits():
    return {
        "train": [ref(1, 100, ["left man", "the man"]), ref(2, 200, ["toothbrush"], cat=79)],
        "val": [ref(3, 100, ["cat"], cat=15)],
        "testA": [ref(4, 200, ["airplane"], cat=4)],
    }


def filled(segment_id):
    mask = np.zeros((12, 16), bool)
    mask[segment_id : segment_id + 4, 2:9] = True
    return mask


def written(root, files, name="refcoco"):
    """Write a CRIS folder; a file may be ready-made bytes."""
    for folder in (f"anns/{name}", f"masks/{name}", "images/train2014"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for split, refs in files.items():
        data = refs if isinstance(refs, bytes) else json.dumps(refs).encode()
        (root / f"anns/{name}/{split}.json").write_bytes(data)
    for id in (100, 200):
        Image.new("RGB", (16, 12)).save(root / "images/train2014" / NAME.format(id))
    for id in (1, 2, 3, 4):
        Image.fromarray(filled(id).astype(np.uint8) * 255).save(root / f"masks/{name}/{id}.png")
    return root


def refusal(root, **options):
    with pytest.raises(InputError) as caught:
        Cris(root, **options)
    message = str(caught.value)
    assert "\n" not in message and str(root) in message and len(message) < 1000
    return message


def test_png_of_counted_polygons_loses_overlaps_only_where_the_protocol_says(tmp_path):
    """CRIS and CGFormer write 255 times the count of polygons as a byte: 255, 254, 253."""
    root = written(tmp_path, splits())
    count = np.zeros((12, 16), np.int64)
    count[2:6, 2:8] += 1
    count[4:10, 6:12] += 1
    count[5, 7] += 1
    Image.fromarray((count * 255).astype(np.uint8)).save(root / "masks/refcoco/1.png")
    Image.fromarray((count > 0).astype(np.uint8) * 7).save(root / "masks/refcoco/2.png")
    one, _, other = Cris(root).records("train")
    np.testing.assert_array_equal(one.mask(), count > 0)
    np.testing.assert_array_equal(one.mask("exactly_one"), count == 1)
    assert truth_of(one, PROTOCOLS["cgformer"]).sum() == (count == 1).sum() < one.mask().sum()
    with pytest.warns(UserWarning, match="do not tell where polygons overlap"):
        np.testing.assert_array_equal(other.mask("exactly_one"), count > 0)


def test_records_follow_the_files_one_a_sentence(tmp_path):
    data = Cris(written(tmp_path, splits()))
    assert data.splits == {"testA": 1, "train": 3, "val": 1}
    one, two, three = data.records("train")
    assert (one.expression, one.sent_id, two.expression, two.sent_id) == ("left man", 10, "the man", 11)
    assert (one.ref_id, one.ann_id, one.image_id, one.height, one.width) == (1, 1, 100, 12, 16)
    assert one.image == tmp_path / "images/train2014" / NAME.format(100) and one.image.is_file()
    assert one.segmentation is two.segmentation  # so that the mask is decoded once
    assert three.image_id == 200 and not three.no_target
    for split in data.splits:
        for record in data.records(split):
            np.testing.assert_array_equal(record.mask(), filled(record.ref_id))


def test_categories_from_0_on_become_those_of_coco(tmp_path):
    data = Cris(written(tmp_path, splits()))
    names = {r.expression: data.categories[r.category_id] for s in data.splits for r in data.records(s)}
    assert names["left man"] == "person"
    assert {names[word] for word in ("toothbrush", "cat", "airplane")} == {"toothbrush", "cat", "airplane"}
    assert len(COCO) == 80 and (min(COCO), max(COCO)) == (1, 90)
    assert [r.expression for r in data.records("test_unseen")] == ["airplane"]
    assert [r.expression for r in data.records("val_unseen")] == ["cat"]


@pytest.mark.parametrize(("split_by", "name"), [("umd", "refcocog_u"), ("google", "refcocog_g")])
def test_layout_and_set_are_found_by_what_is_there(tmp_path, split_by, name):
    root = written(tmp_path, splits(), name)
    assert type(read(DataConfig(root, name))) is Cris
    assert read(DataConfig(root, "refcocog", split_by)).source == root / "anns" / name
    with pytest.raises(InputError, match=r"refcoco: no such folder; .* holds 'anns', 'images', 'masks'"):
        read(DataConfig(root))
    with pytest.raises(InputError, match=rf"anns/refcoco: no such folder; .* holds '{name}'"):
        Cris(root)


def put(value, *path):
    def edit(files):
        place = files
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value

    return edit


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (put(5, "train", 0), "train.json: refs[0] is 5, expected a dict"),
        (put("1", "train", 0, "segment_id"), "refs[0] has 'segment_id' = '1', expected int"),
        (put(7, "train", 0, "segment_id"), "(segment_id 7) has the mask"),
        (put(80, "train", 0, "cat"), "(segment_id 1) has 'cat' = 80, expected 0 to 79"),
        (put(-1, "train", 0, "cat"), "'cat' = -1"),
        (put("../x_1.jpg", "train", 0, "img_name"), "img_name '../x_1.jpg', not a name"),
        (put("picture.jpg", "train", 0, "img_name"), "img_name 'picture.jpg', not a name"),
        (put("other_000000000200.jpg", "val", 0, "img_name"), "numbered as"),
        (put({}, "train", 0, "sentences"), "'sentences' = {}, expected list"),
    ],
)
def test_each_defect_names_its_entry_or_is_left_out(tmp_path, edit, says):
    files = splits()
    edit(files)
    root = written(tmp_path, files)
    assert says in refusal(root)
    with pytest.warns(UserWarning, match="; 1 such left out"):
        data = Cris(root, on_error="skip")
    assert says in data.skipped[0] and sum(data.splits.values()) in (3, 4)


def test_sentence_without_words_is_left_out_with_a_warning(tmp_path):
    files = splits()
    files["train"][0]["sentences"][1]["sent"] = " "
    with pytest.warns(UserWarning, match=r"sentences\[1\] has no words; 1 such"):
        assert Cris(written(tmp_path, files)).splits["train"] == 2


@pytest.mark.parametrize("text", [b"", b"{}", b"[", b"[" * 200_000])
def test_file_that_is_no_list_of_refs_is_refused(tmp_path, text):
    root = written(tmp_path, splits() | {"val": text})
    for on_error in ("stop", "skip"):
        assert "anns/refcoco/val.json: " in refusal(root, on_error=on_error)


def test_broken_mask_and_missing_image_name_themselves(tmp_path):
    root = written(tmp_path, splits())
    (root / "masks/refcoco/3.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    assert "masks/refcoco/3.png: " in refusal(root)
    written(root, splits())
    (root / "images/train2014" / NAME.format(200)).unlink()
    data = Cris(root)
    assert len(data.records("val")) == 1
    with pytest.raises(
        InputError, match=r"train2014: lacks 'COCO_.*200.jpg', as 1 of the 2 images of split 't"
    ):
        data.records("train")
    with pytest.warns(
        UserWarning, match=r"refs\[0\] \(segment_id 4\) names .*200.jpg, which is missing; .*; 2 such"
    ):
        skipping = Cris(root, on_error="skip")
    assert skipping.splits == {"train": 2, "val": 1} and len(skipping.records("train")) == 2


def test_image_folder_may_be_a_link_but_no_single_image_out_of_it(tmp_path):
    root = written(tmp_path / "data", splits())
    (root / "images/train2014").rename(tmp_path / "coco")
    (root / "images/train2014").symlink_to(tmp_path / "coco")
    assert len(Cris(root).records("train")) == 3
    (tmp_path / "coco" / NAME.format(100)).rename(tmp_path / "secret.jpg")
    (tmp_path / "coco" / NAME.format(100)).symlink_to(tmp_path / "secret.jpg")
    with pytest.raises(InputError, match=r"100.jpg: is a link that leaves its folder, as 1 of the 2 images"):
        Cris(root).records("train")
    (root / "masks/refcoco/4.png").rename(tmp_path / "secret.png")
    (root / "masks/refcoco/4.png").symlink_to(tmp_path / "secret.png")
    assert "4.png, which is a link that leaves its folder" in refusal(root)
