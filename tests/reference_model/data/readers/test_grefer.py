"""GRefer: what gRefCOCO's files say is what comes out, and a defect is one line of InputError."""

import json
import pickle
import random
import re
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as coco_mask

from reference_model.data.config import DataConfig
from reference_model.data.dataset import ReferringDataset
from reference_model.data.datasets import read
from reference_model.data.readers.grefer import GRefer, RefZom
from reference_model.data.readers.refer import Refer
from reference_model.files import InputError
from tests.reference_model.data.readers.test_refer import mutated, put, scalars

LEFT, RIGHT = [[1, 1, 5, 1, 5, 5, 1, 5]], [[9, 2, 14, 2, 14, 8, 9, 8]]
CORNER = np.zeros((12, 16), bool)
CORNER[8:, 12:] = True


def runs_of(mask, *, text):
    """RLE of a mask as gRefCOCO may have it: COCO's text, or whole numbers."""
    if text:
        found = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
        return {"size": list(mask.shape), "counts": found["counts"].decode()}
    flat = mask.T.reshape(-1)
    edges = [0, *(np.flatnonzero(np.diff(flat)) + 1), flat.size]
    counts = [int(n) for n in np.diff(edges)]
    return {"size": list(mask.shape), "counts": ([0] if flat[0] else []) + counts}


def filled(*boxes):
    mask = np.zeros((12, 16), bool)
    for left, top, right, bottom in boxes:
        mask[top:bottom, left:right] = True
    return mask


def ref(ref_id, ann_id, sentences, *, image_id=100, split="train", **more):
    return {
        "ref_id": ref_id,
        "ann_id": ann_id,
        "category_id": [-1] if ann_id == [-1] else [1] * len(ann_id),
        "image_id": image_id,
        "split": split,
        "file_name": f"COCO_train2014_{image_id:012}.jpg",
        "sent_ids": [ref_id * 10 + k for k in range(len(sentences))],
        "sentences": [
            {"sent": sent, "raw": sent.upper(), "tokens": sent.split(), "sent_id": ref_id * 10 + k}
            for k, sent in enumerate(sentences)
        ],
        "no_target": ann_id == [-1],
    } | more


def refs_and_instances():
    """Two images of 12 x 16 pixels; annotation 12 is RLE, image 200 has none."""
    refs = [
        ref(1, [10], ["left square"]),
        ref(2, [10, 11], ["both squares", "all squares"]),
        ref(3, [-1], ["the dog", "a cat"]),
        ref(4, [11, 12, 10], ["everything"], split="val"),
        ref(5, [-1], ["the man"], image_id=200, split="val"),
    ]
    instances = {
        "images": [
            {"id": id, "file_name": f"COCO_train2014_{id:012}.jpg", "height": 12, "width": 16}
            for id in (100, 200)
        ],
        "annotations": [
            {"id": id, "image_id": 100, "category_id": 1, "iscrowd": 0, "segmentation": segmentation}
            for id, segmentation in ((10, LEFT), (11, RIGHT), (12, runs_of(CORNER, text=True)))
        ],
    }
    return refs, instances


def written(root, refs, instances):
    """Write a gRefCOCO folder; both may be ready-made bytes."""
    folder = root / "grefcoco"
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in (("grefs(unc).json", refs), ("instances.json", instances)):
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        (folder / name).write_bytes(data)
    (root / "train2014").mkdir(exist_ok=True)
    for id in (100, 200):
        if not (path := root / "train2014" / f"COCO_train2014_{id:012}.jpg").exists():
            Image.new("RGB", (16, 12)).save(path)
    return root


def refusal(root, **options):
    with pytest.raises(InputError) as caught:
        GRefer(root, "grefcoco", **options)
    message = str(caught.value)
    assert "\n" not in message and str(root) in message and len(message) < 1000
    return message


# ---- what is read -------------------------------------------------------------------------------


def test_records_follow_the_file_one_a_sentence(tmp_path):
    data = GRefer(written(tmp_path, *refs_and_instances()), "grefcoco")
    assert data.splits == {"train": 5, "val": 2}
    assert [
        (r.sent_id, r.expression, r.ann_id, r.category_id, r.no_target) for r in data.records("train")
    ] == [
        (10, "left square", (10,), (1,), False),
        (20, "both squares", (10, 11), (1, 1), False),
        (21, "all squares", (10, 11), (1, 1), False),
        (30, "the dog", (), (), True),
        (31, "a cat", (), (), True),
    ]
    assert all(r.image.is_file() for split in data.splits for r in data.records(split))
    assert [a["id"] for a in data.annotations(100)] == [10, 11, 12]


def test_mask_is_the_union_of_the_annotations_and_empty_without_target(tmp_path):
    data = GRefer(written(tmp_path, *refs_and_instances()), "grefcoco")
    one, two, _, none, _ = data.records("train")
    np.testing.assert_array_equal(one.mask(), filled((1, 1, 5, 5)))
    np.testing.assert_array_equal(two.mask(), filled((1, 1, 5, 5), (9, 2, 14, 8)))
    mixed, elsewhere = data.records("val")
    np.testing.assert_array_equal(mixed.mask(), filled((1, 1, 5, 5), (9, 2, 14, 8)) | CORNER)
    for record in (none, elsewhere):
        np.testing.assert_array_equal(record.mask(), filled())


boxes = st.tuples(st.integers(0, 15), st.integers(0, 11), st.integers(0, 15), st.integers(0, 11)).map(
    lambda box: (min(box[::2]), min(box[1::2]), max(box[::2]) + 1, max(box[1::2]) + 1)
)


@given(st.lists(st.tuples(boxes, st.sampled_from(["polygon", "text", "numbers"])), min_size=1, max_size=4))
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_union_of_any_boxes_in_any_form(tmp_path, drawn):
    refs, instances = refs_and_instances()
    segmentations = []
    for box, form in drawn:
        x0, y0, x1, y1 = box
        polygon = [[x0, y0, x1, y0, x1, y1, x0, y1]]
        segmentations.append(polygon if form == "polygon" else runs_of(filled(box), text=form == "text"))
    instances["annotations"] = [
        {"id": id, "image_id": 100, "segmentation": segmentation}
        for id, segmentation in enumerate(segmentations)
    ]
    refs = [ref(1, list(range(len(drawn))), ["these"])]
    (record,) = GRefer(written(Path(tmp_path), refs, instances), "grefcoco").records("train")
    np.testing.assert_array_equal(record.mask(), filled(*(box for box, _ in drawn)))


def test_flag_may_be_absent(tmp_path):
    refs, instances = refs_and_instances()
    for entry in refs:
        del entry["no_target"]
    data = GRefer(written(tmp_path, refs, instances), "grefcoco")
    assert [r.no_target for r in data.records("train")] == [False, False, False, True, True]


def test_name_of_the_data_set_chooses_the_reader(tmp_path):
    root = written(tmp_path, *refs_and_instances())
    assert type(read(DataConfig(root, "grefcoco"))) is GRefer
    with pytest.raises(InputError, match=r"refcoco: no such folder; .* holds 'grefcoco'"):
        read(DataConfig(root))
    (root / "grefcoco/grefs(unc).json").rename(root / "grefcoco/grefs(umd).json")
    assert "grefs(unc).json: no such file; use split_by umd" in refusal(root)
    with pytest.raises(InputError, match=r"refs\(unc\).p: no such file"):
        Refer(root, "grefcoco")


def test_pickle_is_read_where_there_is_no_json(tmp_path):
    refs, instances = refs_and_instances()
    root = written(tmp_path, refs, instances)
    (root / "grefcoco/grefs(unc).p").write_bytes(pickle.dumps(refs[:1], protocol=2))
    assert GRefer(root, "grefcoco").splits == {"train": 5, "val": 2}
    (root / "grefcoco/grefs(unc).json").unlink()
    data = read(DataConfig(root, "grefcoco"))
    assert type(data) is GRefer and data.splits == {"train": 1}
    assert "grefs(umd).json: no such file; use split_by unc" in refusal(root, split_by="umd")


def test_absurdly_many_annotations_take_neither_time_nor_memory(tmp_path):
    """Each of a thousand run lengths would be a mask of 80 million pixels."""
    refs, instances = refs_and_instances()
    instances["images"][0] |= {"height": 8000, "width": 10_000}
    whole = {"size": [8000, 10_000], "counts": [5, 80_000_000 - 5]}
    instances["annotations"] = [{"id": id, "image_id": 100, "segmentation": whole} for id in range(10, 1010)]
    refs = [ref(1, [*range(10, 1010), *([10] * 5000)], ["everything"])]
    started = time.process_time()
    (record,) = GRefer(written(tmp_path, refs, instances), "grefcoco").records("train")
    assert time.process_time() - started < 10
    assert record.segmentation["size"] == [8000, 10_000]


# ---- Ref-ZOM ------------------------------------------------------------------------------------


def zom_written(root, refs, instances, *, folder="ref-zom", name="refs(final).p", images=None):
    (root / folder).mkdir(parents=True)
    (root / folder / name).write_bytes(pickle.dumps(refs, protocol=2))
    (root / folder / "instances.json").write_text(json.dumps(instances))
    for image in instances["images"]:
        place = root / (images or ("train2014" if "train2014" in image["file_name"] else "val2014"))
        place.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 12)).save(place / image["file_name"])
    return root


def zom():
    refs, instances = refs_and_instances()
    instances["images"][1]["file_name"] = "COCO_val2014_000000000200.jpg"
    for one in refs:
        del one["no_target"]
    refs[0] |= {"ann_id": 10, "category_id": 1, "source": "one"}
    refs[1] |= {"source": "many"}
    refs[2] |= {"ann_id": 12, "source": "zero"}  # what it names is not meant
    refs[3] |= {"source": "many"}
    refs[4] |= {"ann_id": [], "category_id": [], "source": "zero"}
    return refs, instances


@pytest.mark.parametrize("folder", ["ref-zom", "refzom"])
@pytest.mark.parametrize("name", ["refs(final).p", "Ref-ZOM(final).p"])
@pytest.mark.parametrize("images", [None, "trainval2014", "images/trainval2014"])
def test_ref_zom_has_one_many_or_no_target(tmp_path, folder, name, images):
    root = zom_written(tmp_path, *zom(), folder=folder, name=name, images=images)
    data = read(DataConfig(root, "ref-zom", "final"))
    assert type(data) is RefZom and data.splits == {"train": 5, "val": 2}
    found = [(r.ann_id, r.category_id, r.no_target) for r in data.records("train")]
    both = ((10, 11), (1, 1), False)
    assert found == [((10,), (1,), False), both, both, ((), (), True), ((), (), True)]
    np.testing.assert_array_equal(data.records("train")[0].mask(), filled((1, 1, 5, 5)))
    assert not data.records("train")[3].mask().any()
    last = data.records("val")[-1]
    assert last.no_target and last.image.name == "COCO_val2014_000000000200.jpg" and last.image.is_file()


def test_ref_zom_names_what_contradicts_itself(tmp_path):
    refs, instances = zom()
    refs[1] |= {"ann_id": [-1]}
    root = zom_written(tmp_path, refs, instances)
    with pytest.raises(InputError, match=r"\(ref_id 2\) has 'source' = 'many', but 'ann_id' names nothing"):
        RefZom(root, "ref-zom", "final")
    del refs[1]["source"]
    (root / "ref-zom/refs(final).p").write_bytes(pickle.dumps(refs))
    assert RefZom(root, "ref-zom", "final").records("train")[1].no_target
    (root / "val2014/COCO_val2014_000000000200.jpg").unlink()
    with pytest.raises(InputError, match=r"lacks 'COCO_val2014.*; unpack COCO val2014 there"):
        RefZom(root, "ref-zom", "final").records("val")


def test_samples_without_target_have_an_empty_mask_and_keep_their_image(tmp_path):
    records = GRefer(written(tmp_path, *refs_and_instances()), "grefcoco").records("train")
    for cache in (False, True):
        samples = ReferringDataset(records, 32, cache=cache)
        assert [bool(item.mask.any()) for item in samples.__getitems__(range(5))] == [True] * 3 + [False] * 2
        assert samples[3].image.shape == (3, 32, 32)


# ---- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("edit", *("file", "says")),
    [
        (
            put(10, "refs", 0, "ann_id"),
            "grefs(unc).json",
            "refs[0] (ref_id 1) has 'ann_id' = 10, expected list",
        ),
        (put(["10"], "refs", 0, "ann_id"), "grefs(unc).json", "'ann_id' = ['10'], expected a list of int"),
        (put([True], "refs", 0, "ann_id"), "grefs(unc).json", "'ann_id' = [True], expected a list of int"),
        (put([10**30], "refs", 0, "ann_id"), "grefs(unc).json", "expected a list of int"),
        (put([10, 77], "refs", 0, "ann_id"), "grefs(unc).json", "(ref_id 1) names annotation 77"),
        (put([10, -1], "refs", 0, "ann_id"), "grefs(unc).json", "(ref_id 1) names annotation -1"),
        (
            put([-1], "refs", 0, "ann_id"),
            "grefs(unc).json",
            "'no_target' = False, but 'ann_id' names nothing",
        ),
        (put([], "refs", 0, "ann_id"), "grefs(unc).json", "'no_target' = False, but 'ann_id' names nothing"),
        (put(True, "refs", 1, "no_target"), "grefs(unc).json", "= True, but 'ann_id' names 2 annotations"),
        (put(1, "refs", 2, "no_target"), "grefs(unc).json", "(ref_id 3) has 'no_target' = 1, expected bool"),
        (put(1, "refs", 2, "category_id"), "grefs(unc).json", "'category_id' = 1, expected list"),
        (put(77, "refs", 2, "image_id"), "grefs(unc).json", "refs[2] (ref_id 3) names image 77"),
        (put(200, "refs", 0, "image_id"), "grefs(unc).json", "its annotation 10 lies on image 100"),
        (
            put({}, "refs", 3, "sentences", 0),
            "grefs(unc).json",
            "refs[3] (ref_id 4) sentences[0] has no 'sent_id'",
        ),
        (put([], "instances", "annotations", 1, "segmentation"), "instances.json", "annotation 11: "),
        (
            put(10**9, "instances", "images", 1, "width"),
            "instances.json",
            "image 200: the image has height 12",
        ),
        (put(-5, "instances", "images", 1, "height"), "instances.json", "image 200: the image has height -5"),
        (put("../../x.jpg", "instances", "images", 1, "file_name"), "instances.json", "not a plain path"),
    ],
)
def test_each_defect_names_its_file_and_record(tmp_path, edit, file, says):
    refs, instances = refs_and_instances()
    edit(refs, instances)
    message = refusal(written(tmp_path, refs, instances))
    assert message.startswith(f"{tmp_path / 'grefcoco' / file}: ") and says in message


@pytest.mark.parametrize("value", [{}, [], "refs", 5, None])
def test_refs_of_another_type_are_refused(tmp_path, value):
    assert "expected a list of refs" in refusal(written(tmp_path, value, refs_and_instances()[1]))


@pytest.mark.parametrize("text", [b"", b"[", b"[" * 200_000, b'"\\ud8', b"9" * 5000, b"\x80\x02]."])
def test_what_is_no_json_is_refused(tmp_path, text):
    message = refusal(written(tmp_path, text, refs_and_instances()[1]))
    assert message.startswith(str(tmp_path / "grefcoco/grefs(unc).json") + ": ")


def read_everything(root):
    data = GRefer(root, "grefcoco")
    for split in data.splits:
        for record in data.records(split):
            assert record.mask().shape == (record.height, record.width)
            assert not (record.no_target and record.mask().any())
            assert record.image.parts[: len(root.parts)] == root.parts and ".." not in record.image.parts


def edited(data, rng):
    """Replace, drop or repeat tokens of a JSON text, so that most of it stays JSON."""
    tokens = re.findall(rb'"[^"]*"|-?[0-9]+|[a-z]+|.', data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        worded = [k for k, token in enumerate(tokens) if len(token) > 1 or token.isdigit()]
        at = rng.choice(worded)
        tokens[at] = rng.choice(
            (tokens[rng.choice(worded)], b"-1", b"0", b"null", b"true", b"[]", b'""', b"1e9")
        )
    return b"".join(tokens)


@pytest.mark.filterwarnings("ignore:.*has no words")
def test_mutated_files_give_records_or_an_input_error(tmp_path):
    whole = [json.dumps(content).encode() for content in refs_and_instances()]
    rng = random.Random(11)
    read_whole, refused = 0, []
    for case in range(600):
        files = list(whole)
        files[case % 2] = (edited if case % 3 else mutated)(files[case % 2], rng)
        try:
            read_everything(written(tmp_path, *files))
            read_whole += 1
        except InputError as error:
            refused.append(str(error))
    assert not any("\n" in message or len(message) > 1000 for message in refused)
    ill_formed = sum("not a whole JSON file" in message for message in refused)
    assert min(read_whole, ill_formed, len(refused) - ill_formed) > 50  # the mutations reach every end


places = st.sampled_from(
    [
        *[("refs", k, name) for k in (1, 2) for name in ("ann_id", "no_target", "category_id", "image_id")],
        *[("refs", 1, "ann_id", 1), ("refs", 2, "ann_id", 0), ("refs", 1, "category_id", 0)],
        *[("refs", 2), ("refs", 2, "sentences"), ("refs", 2, "sentences", 0, "sent"), ("refs", 2, "split")],
        *[("instances", "images", 1, side) for side in ("height", "width", "file_name", "id")],
        *[("instances", "annotations", 2, name) for name in ("id", "image_id", "segmentation")],
        ("instances", "annotations", 2, "segmentation", "counts"),
    ]
)


@pytest.mark.filterwarnings("ignore:.*has no words")
@given(places, scalars | st.lists(scalars, max_size=3))
@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_value_in_any_place_gives_records_or_an_input_error(tmp_path, place, value):
    refs, instances = json.loads(json.dumps(refs_and_instances()))
    put(value, *place)(refs, instances)
    message = ""
    try:
        read_everything(written(Path(tmp_path), refs, instances))
    except InputError as error:
        message = str(error)
    assert "\n" not in message and len(message) < 1000
