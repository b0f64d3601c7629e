"""Hub: what the parquet files of jxu124/refcoco say is what comes out, under REFER's names of the splits."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

import reference_model.data.readers.parquet as hub_module
from reference_model.data.config import DataConfig
from reference_model.data.datasets import read
from reference_model.data.readers.parquet import Hub
from reference_model.files import InputError

SQUARE = [[2, 2, 8, 2, 8, 8, 2, 8]]
NAME = "COCO_train2014_{:012}.jpg"
COLUMNS = pa.schema(
    [
        ("sent_ids", pa.list_(pa.int64())),
        ("file_name", pa.string()),
        *[(name, pa.int64()) for name in ("ann_id", "ref_id", "image_id")],
        ("split", pa.string()),
        (
            "sentences",
            pa.list_(
                pa.struct(
                    [
                        ("raw", pa.string()),
                        ("sent", pa.string()),
                        ("sent_id", pa.int64()),
                        ("tokens", pa.list_(pa.string())),
                    ]
                )
            ),
        ),
        ("category_id", pa.int64()),
        *[(name, pa.string()) for name in ("raw_anns", "raw_image_info", "raw_sentences", "image_path")],
        ("bbox", pa.list_(pa.float64())),
        ("captions", pa.list_(pa.string())),
    ]
)


def row(ref_id, image_id, sentences, split="train", category_id=1):
    ann = {"id": ref_id + 100, "image_id": image_id, "category_id": category_id, "segmentation": SQUARE}
    info = {"id": image_id, "file_name": NAME.format(image_id), "height": 12, "width": 16}
    said = [
        {"raw": sent.upper(), "sent": sent, "sent_id": ref_id * 10 + k, "tokens": sent.split()}
        for k, sent in enumerate(sentences)
    ]
    return {
        "sent_ids": [one["sent_id"] for one in said],
        "file_name": f"COCO_train2014_{image_id:012}_{ref_id}.jpg",
        "ann_id": ref_id + 100,
        "ref_id": ref_id,
        "image_id": image_id,
        "split": split,
        "sentences": said,
        "category_id": category_id,
        "raw_anns": json.dumps(ann),
        "raw_image_info": json.dumps(info),
        "raw_sentences": json.dumps(said),
        "image_path": "coco/train2014/" + NAME.format(image_id),
        "bbox": [2.0, 2.0, 8.0, 8.0],
        "captions": list(sentences),
    }


def rows():
    return {
        "train": [row(1, 100, ["left man", "the man"]), row(2, 200, ["plane"], category_id=5)],
        "validation": [row(3, 100, ["cat"])],
        "test": [row(4, 200, ["dog"])],
        "testB": [row(5, 200, ["tree"])],
    }


def written(root, files, folder="data", images="coco/train2014", columns=COLUMNS):
    (root / folder).mkdir(parents=True, exist_ok=True)
    for split, found in files.items():
        table = pa.Table.from_pylist(found, schema=columns)
        parquet.write_table(table, root / folder / f"{split}-00000-of-00001-0abc.parquet", row_group_size=1)
    (root / images).mkdir(parents=True, exist_ok=True)
    for id in (100, 200):
        Image.new("RGB", (16, 12)).save(root / images / NAME.format(id))
    return root


def refusal(root, **options):
    with pytest.raises(InputError) as caught:
        Hub(root, **options)
    message = str(caught.value)
    assert "\n" not in message and str(root) in message and len(message) < 1000
    return message


# ---- what is read -------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", [".", "data"])
@pytest.mark.parametrize("images", ["coco/train2014", "images/train2014", "train2014"])
def test_records_follow_the_files_one_a_sentence(tmp_path, folder, images):
    data = read(DataConfig(written(tmp_path, rows(), folder, images)))
    assert type(data) is Hub
    assert data.splits == {"train": 3, "val": 1, "testA": 1, "testB": 1}
    one, two, three = data.records("train")
    assert (one.expression, one.sent_id, two.expression, two.sent_id) == ("left man", 10, "the man", 11)
    assert (one.ref_id, one.ann_id, one.image_id, one.category_id) == (1, 101, 100, 1)
    assert one.image == tmp_path / images / NAME.format(100) and one.image.is_file()
    assert one.segmentation is two.segmentation and three.image_id == 200
    expected = np.zeros((12, 16), bool)
    expected[2:8, 2:8] = True
    np.testing.assert_array_equal(one.mask(), expected)
    assert [r.expression for r in data.records("train_unseen")] == ["plane"]


def test_test_stays_test_where_there_is_no_other(tmp_path):
    files = rows()
    del files["testB"]
    assert Hub(written(tmp_path, files)).splits == {"train": 3, "val": 1, "test": 1}


def test_raw_sentences_are_read_where_asked_for(tmp_path):
    data = Hub(written(tmp_path, rows()), text="raw")
    assert [r.expression for r in data.records("train")] == ["LEFT MAN", "THE MAN", "PLANE"]


def test_captions_stand_in_for_sentences(tmp_path):
    schema = pa.schema([field for field in COLUMNS if field.name != "sentences"])
    data = Hub(written(tmp_path, rows(), columns=schema))
    assert [(r.expression, r.sent_id) for r in data.records("train")] == [
        ("left man", 10), ("the man", 11), ("plane", 20)
    ]  # fmt: skip


def test_files_of_a_split_are_read_in_their_order(tmp_path):
    root = written(tmp_path, {"val": [row(9, 100, ["it"])]})
    for part in (2, 0, 1):
        table = pa.Table.from_pylist([row(part + 1, 100, [f"part {part}"])], schema=COLUMNS)
        parquet.write_table(table, root / f"data/train-{part:05}-of-00003.parquet")
    assert [r.expression for r in Hub(root).records("train")] == ["part 0", "part 1", "part 2"]
    (root / "data/train-00001-of-00003.parquet").unlink()
    assert "lacks train-00001-of-00003.parquet" in refusal(root)


def test_a_few_rows_at_a_time_lie_in_memory(tmp_path):
    import tracemalloc

    polygon = [[k % 11 + 0.25 for k in range(2000)]]
    many = [row(k, 100, [f"number {k}"]) for k in range(120)]
    for one in many:
        ann = json.loads(one["raw_anns"])
        one["raw_anns"] = json.dumps(ann | {"segmentation": polygon})
    root = written(tmp_path, {"train": many})
    tracemalloc.start()
    data = Hub(root)
    assert sum(1 for _ in data.stream("train")) == 120
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert kept < 500_000 and peak < 4_000_000  # all of them take 120 · 2000 · 32 bytes


# ---- refusals -----------------------------------------------------------------------------------


def changed(key, value, within=None):
    def edit(files):
        one = files["train"][1]
        if within is None:
            one[key] = value
            return
        inner = json.loads(one[within])
        if value is ...:
            del inner[key]
        else:
            inner[key] = value
        one[within] = json.dumps(inner)

    return edit


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (changed("ref_id", None), "row 1 has 'ref_id' = None, expected int"),
        (changed("image_id", 100), "(ref_id 2) has image_id 100 for 'COCO"),
        (changed("ann_id", 7), "(ref_id 2) raw_anns has 'id' = 102, but the row has 7"),
        (changed("raw_anns", None), "(ref_id 2) has 'raw_anns' = None, expected str"),
        (changed("raw_anns", "{"), "(ref_id 2) raw_anns: not a whole JSON cell"),
        (changed("raw_anns", "[" * 100_000), "raw_anns: nested too deep"),
        (changed("raw_anns", "[]"), "raw_anns is [], expected a dict"),
        (changed("segmentation", ..., "raw_anns"), "raw_anns has no 'segmentation'"),
        (changed("segmentation", [], "raw_anns"), "raw_anns: segmentation has no polygon"),
        (changed("segmentation", [[1, 1, 9, 9, 1e9, 1]], "raw_anns"), "polygon 0 leaves its 12 x 16 image"),
        (changed("image_id", 7, "raw_anns"), "raw_anns has 'image_id' = 7, but the row has 200"),
        (changed("file_name", "../x.jpg", "raw_image_info"), "has file_name '../x.jpg', not a plain path"),
        (changed("height", ..., "raw_image_info"), "raw_image_info has no 'height'"),
        (changed("height", 10**6, "raw_image_info"), "the image has height 1000000"),
    ],
)
def test_each_defect_names_its_row_or_is_left_out(tmp_path, edit, says):
    files = rows()
    edit(files)
    root = written(tmp_path, files)
    assert says in refusal(root)
    with pytest.warns(UserWarning, match="; 1 such left out"):
        data = Hub(root, on_error="skip")
    assert [r.expression for r in data.records("train")] == ["left man", "the man"]
    assert says in data.skipped[0] and len(data.skipped) == 1


def test_malformed_row_does_not_claim_the_image_of_others(tmp_path):
    files = rows()
    changed("file_name", "other.jpg", "raw_image_info")(files)
    changed("segmentation", [], "raw_anns")(files)
    files["train"].append(row(7, 200, ["sound"]))
    with pytest.warns(UserWarning, match="; 1 such left out"):
        data = Hub(written(tmp_path, files), on_error="skip")
    assert [r.expression for r in data.records("train")] == ["left man", "the man", "sound"]


def test_sentence_without_words_is_left_out_once_with_a_warning(tmp_path):
    files = rows()
    files["train"][0]["sentences"][1] |= {"sent": "", "raw": None}
    with pytest.warns(UserWarning, match=r"sentences\[1\] has no words; 1 such"):
        data = Hub(written(tmp_path, files))
    assert data.splits["train"] == 2 == len(data.records("train")) == len(data.records("train"))
    assert len(data.skipped) == 1


def test_absent_form_of_a_sentence_falls_back_to_the_other(tmp_path):
    files = rows()
    files["train"][0]["sentences"][0]["sent"] = None
    files["train"][0]["sentences"][1] |= {"raw": None, "sent_id": None}
    with pytest.raises(InputError, match=r"sentences\[1\] has no 'sent_id'"):
        Hub(written(tmp_path, files))
    files["train"][0]["sentences"][1]["sent_id"] = 11
    assert [r.expression for r in Hub(written(tmp_path, files)).records("train")][:2] == [
        "LEFT MAN",
        "the man",
    ]


def test_missing_images_are_counted_for_the_split_that_lacks_them(tmp_path):
    root = written(tmp_path, rows())
    (root / "coco/train2014" / NAME.format(200)).unlink()
    data = Hub(root)
    assert len(data.records("val")) == 1
    with pytest.raises(InputError, match=r"lacks 'COCO_.*200.jpg', as 1 of the 2 images of split 'train'"):
        data.records("train")
    with pytest.warns(UserWarning, match="3 such left out"):
        assert Hub(root, on_error="skip").splits == {"train": 2, "val": 1}


@pytest.mark.parametrize("share", [0, 0.3, 0.9, 0.999])
def test_truncated_file_is_refused(tmp_path, share):
    root = written(tmp_path, rows())
    path = root / "data/test-00000-of-00001-0abc.parquet"
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    for on_error in ("stop", "skip"):
        assert "test-00000-of-00001-0abc.parquet: not a whole parquet file" in refusal(
            root, on_error=on_error
        )


def test_files_of_something_else_are_refused(tmp_path):
    root = written(tmp_path, rows())
    parquet.write_table(pa.table({"question": ["where?"]}), root / "data/val-00000-of-00001.parquet")
    assert "has no column 'ref_id', only ['question']; use the files of jxu124" in refusal(root)
    schema = pa.schema([field for field in COLUMNS if field.name not in ("sentences", "captions")])
    written(root, {"val": rows()["validation"]}, columns=schema)
    (root / "data/val-00000-of-00001.parquet").unlink()
    assert "val-00000-of-00001-0abc.parquet: " in refusal(root)


def test_two_versions_of_a_file_are_refused(tmp_path):
    root = written(tmp_path, rows())
    path = root / "data/test-00000-of-00001-0abc.parquet"
    (root / "data/test-00000-of-00001-82af.parquet").write_bytes(path.read_bytes())
    assert "is of another version than test-00000-of-00001-0abc.parquet" in refusal(root)


def test_file_that_states_more_than_it_has_is_refused(tmp_path, monkeypatch):
    root = written(tmp_path, rows())
    monkeypatch.setattr(hub_module, "LARGEST_GROUP", 100)
    assert "bytes, more than the 100 that are read" in refusal(root)
    column = pa.array([None] * 100_000, pa.string())
    bomb = pa.table({name: column for name in COLUMNS.names})
    parquet.write_table(bomb, root / "data/train-00000-of-00001-0abc.parquet")
    assert "states 100000 rows in" in refusal(root)


def test_without_pyarrow_the_message_says_what_to_install(tmp_path, monkeypatch):
    root = written(tmp_path, rows())
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(InputError, match=r"need pyarrow; pip install 'metris-blocks\[data\]'"):
        Hub(root)


BOMB = """
import sys
from reference_model.data.readers.parquet import Hub
from reference_model.files import InputError
peak = lambda: next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
before = peak()
try:
    Hub(sys.argv[1])
except InputError as error:
    print(error, file=sys.stderr)
print((peak() - before) // 1024)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
@pytest.mark.parametrize("column", ["raw_anns", "sentences"])
def test_text_held_once_and_named_often_takes_no_memory(column, tmp_path):
    """64 cells of 16 MiB are one text in a file of a few kB."""
    text = "x" * (2**24 + 1)
    root, found = written(tmp_path, rows() | {"train": []}), row(1, 100, ["it"])
    found[column] = text if column == "raw_anns" else [found["sentences"][0] | {"raw": text}] * 64
    table = pa.Table.from_pylist([found] * (64 if column == "raw_anns" else 1), schema=COLUMNS)
    path = root / "data/train-00000-of-00001-0abc.parquet"
    parquet.write_table(table, path, compression="zstd")
    assert path.stat().st_size < 20_000
    del table
    run = subprocess.run([sys.executable, "-c", BOMB, root], capture_output=True, text=True)
    assert int(run.stdout) < 400, run.stdout
    assert "train-00000-of-00001-0abc.parquet" in run.stderr and run.stderr.count("\n") == 1


def test_columns_of_too_many_values_are_refused(tmp_path, monkeypatch):
    root = written(tmp_path, rows())
    monkeypatch.setattr(hub_module, "MOST_VALUES", 1)
    assert "values of INT64; at most 1 of plain" in refusal(root)
