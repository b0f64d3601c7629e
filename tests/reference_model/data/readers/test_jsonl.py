"""Jsonl: what the lines of one's own file say is what comes out, and a defect names file and line."""

import json
import os

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from reference_model.data.config import DataConfig
from reference_model.data.datasets import read
from reference_model.data.images import open_image
from reference_model.data.readers.jsonl import LONGEST_LINE, Jsonl
from reference_model.files import InputError

SQUARE = [[2, 2, 8, 2, 8, 8, 2, 8]]


def filled(left, top, right, bottom):
    mask = np.zeros((12, 16), bool)
    mask[top:bottom, left:right] = True
    return mask


def runs_of(mask):
    found = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": found["size"], "counts": found["counts"].decode()}


def entry(**changes):
    return {"image": "pictures/a.jpg", "expression": "left square", "mask": SQUARE} | changes


def written(root, *lines, name="data.jsonl"):
    """Write lines (dicts, or ready-made bytes) beside two pictures of 12 x 16 pixels and two masks."""
    folder = root / "pictures"
    folder.mkdir(exist_ok=True)
    for stem in "ab":
        if not os.path.lexists(folder / f"{stem}.jpg"):
            Image.new("RGB", (16, 12)).save(folder / f"{stem}.jpg")
    Image.fromarray(filled(1, 3, 5, 9)).save(root / "one.png")  # 1 bit
    Image.fromarray(filled(1, 3, 5, 9).astype(np.uint8) * 7).save(root / "seven.png")
    rows = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    (root / name).write_bytes(b"\n".join(rows) + b"\n")
    return root / name


def refusal(path, **options):
    with pytest.raises(InputError) as caught:
        Jsonl(path, **options)
    message = str(caught.value)
    assert "\n" not in message and str(path) in message and len(message) < 1000
    return message


# ---- what is read -------------------------------------------------------------------------------


def test_what_a_line_says_is_what_comes_out(tmp_path):
    whole = entry(
        expression=["left square", "the square"],
        split="val",
        height=12,
        width=16,
        image_id=70,
        ref_id=71,
        sent_id=[72, 73],
        ann_id=74,
        category_id=75,
        note="not looked at",
    )
    data = Jsonl(written(tmp_path, whole))
    assert data.splits == {"val": 2} and data.skipped == []
    one, two = data.records("val")
    assert (one.expression, one.sent_id, two.expression, two.sent_id) == ("left square", 72, "the square", 73)
    assert (one.height, one.width, one.image_id, one.ref_id, one.ann_id, one.category_id) == (
        12, 16, 70, 71, 74, 75
    )  # fmt: skip
    assert one.image == tmp_path / "pictures/a.jpg" and one.split == "val"
    assert one.segmentation is two.segmentation  # so that the mask of an object is drawn once
    np.testing.assert_array_equal(one.mask(), filled(2, 2, 8, 8))


def test_what_a_line_leaves_out_comes_from_its_number_and_its_image(tmp_path):
    lines = [
        entry(),
        b"",
        entry(expression=["a", "b"]),
        entry(image="pictures/b.jpg"),
        entry(image="./pictures/b.jpg"),
    ]
    records = Jsonl(written(tmp_path, *lines)).records("train")
    assert [(r.ref_id, r.ann_id, r.sent_id, r.image_id) for r in records] == [
        (1, 1, 1000, 1),
        (3, 3, 3000, 1),
        (3, 3, 3001, 1),
        (4, 4, 4000, 4),
        (5, 5, 5000, 4),  # the same image by another spelling
    ]
    assert {(r.height, r.width, r.category_id, r.split) for r in records} == {(12, 16, 0, "train")}


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        (SQUARE, filled(2, 2, 8, 8)),
        ({"boxes": [[2, 2, 6, 6]]}, filled(2, 2, 8, 8)),
        ({"boxes": [[2, 2, 6, 6], [0, 0, 1, 12]]}, filled(2, 2, 8, 8) | filled(0, 0, 1, 12)),
        ({"size": [12, 16], "counts": [0, 12, 180]}, filled(0, 0, 1, 12)),
        (runs_of(filled(4, 5, 9, 7)), filled(4, 5, 9, 7)),
        ("one.png", filled(1, 3, 5, 9)),
        ("seven.png", filled(1, 3, 5, 9)),
        (None, filled(0, 0, 0, 0)),
    ],
    ids=["polygons", "box", "boxes", "counts", "text", "1-bit png", "8-bit png", "nothing"],
)  # fmt: skip
def test_every_form_of_a_mask_is_the_mask_it_says(tmp_path, mask, expected):
    (record,) = Jsonl(written(tmp_path, entry(mask=mask))).records("train")
    np.testing.assert_array_equal(record.mask(), expected)
    np.testing.assert_array_equal(record.mask("exactly_one"), expected)
    assert record.no_target == (mask is None)


@pytest.mark.parametrize("mode", ["P", "RGB", "RGBA", "I;16"])
def test_mask_png_of_any_depth_has_background_where_all_is_zero(tmp_path, mode):
    truth = filled(1, 3, 5, 9)
    if mode == "P":  # the index counts, not its colour
        picture = Image.fromarray(truth.astype(np.uint8)).convert("P")
        picture.putpalette([255, 255, 255, 0, 0, 0])
    elif mode == "I;16":
        picture = Image.fromarray(truth.astype(np.uint16) * 256)
    else:
        channels = np.zeros((12, 16, len(mode)), np.uint8)
        channels[..., 2] = truth * 9
        channels[..., 3:] = 255
        picture = Image.fromarray(channels)
    path = written(tmp_path, entry(mask="m.png"))
    picture.save(tmp_path / "m.png")
    np.testing.assert_array_equal(Jsonl(path).records("train")[0].mask(), truth)


def test_splits_keep_the_order_of_the_file_and_their_own_lines(tmp_path):
    lines = [entry(expression=f"number {k}", split="val" if k % 3 else "test") for k in range(9)]
    data = Jsonl(written(tmp_path, *lines))
    assert data.splits == {"test": 3, "val": 6}
    assert [r.expression for r in data.records("test")] == [f"number {k}" for k in (0, 3, 6)]
    assert [r.sent_id // 1000 for r in data.stream("val")] == [2, 3, 5, 6, 8, 9]
    assert [r.expression for r in data.records("test")] == [f"number {k}" for k in (0, 3, 6)]
    with pytest.raises(InputError, match=r"data.jsonl: no split 'vall'; did you mean 'val'"):
        data.records("vall")


def test_raw_sentences_are_read_where_asked_for_and_there(tmp_path):
    path = written(tmp_path, entry(raw="LEFT Square!"), entry(expression=["x", "y"], raw=["X", "Y"]), entry())
    expected = {
        "sent": ["left square", "x", "y", "left square"],
        "raw": ["LEFT Square!", "X", "Y", "left square"],
    }
    for text, sentences in expected.items():
        assert [r.expression for r in Jsonl(path, text=text).records("train")] == sentences


def test_windows_line_ends_and_byte_order_mark_are_read(tmp_path):
    text = json.dumps(entry(expression="café à gauche"), ensure_ascii=False)
    path = written(tmp_path, b"\xef\xbb\xbf" + text.encode() + b"\r", text.encode())
    assert [r.expression for r in Jsonl(path).records("train")] == ["café à gauche"] * 2


def test_size_of_an_image_is_that_which_a_person_sees(tmp_path):
    path = written(tmp_path, entry(image="turned.jpg", mask={"boxes": [[0, 0, 12, 3]]}))
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (16, 12)).save(tmp_path / "turned.jpg", exif=exif)
    (record,) = Jsonl(path).records("train")
    assert (record.height, record.width) == (16, 12)
    assert open_image(record.image, height_width=(record.height, record.width)).size == (12, 16)


def test_size_is_read_without_decoding(tmp_path):
    path = written(tmp_path, entry())
    picture = (tmp_path / "pictures/a.jpg").read_bytes()
    start = picture.index(b"\xff\xda")  # where the pixels begin
    (tmp_path / "pictures/a.jpg").write_bytes(picture[: start + 14])
    assert Jsonl(path).records("train")[0].width == 16


def test_a_file_is_its_own_layout(tmp_path):
    path = written(tmp_path, entry(raw="RAW"), entry(mask="gone.png"))
    with pytest.warns(UserWarning, match=r"line 2 names .*gone.png, which is missing"):
        data = read(DataConfig(path, text="raw", on_error="skip"))
    assert type(data) is Jsonl and data.records("train")[0].expression == "RAW"
    with pytest.raises(InputError, match=r"holds .*data.jsonl.*; give .*data.jsonl itself"):
        read(DataConfig(tmp_path))


def test_no_record_of_a_large_file_stays_in_memory(tmp_path):
    import tracemalloc

    lines = [entry(mask=[[k % 7 + 0.5 for k in range(2000)]]) for _ in range(100)]
    path = written(tmp_path, *lines)
    assert path.stat().st_size > 700_000
    tracemalloc.start()
    data = Jsonl(path)
    assert sum(1 for _ in data.stream("train")) == 100
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert kept < 100_000 and peak < 1_000_000


# ---- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b"{", "line 2: not a whole JSON line"),
        (b"[" * 100_000, "line 2: nested too deep"),
        (b"9" * 5000, "line 2: not a whole JSON line"),
        (b'{"image": "\xff"}', "line 2: not a whole JSON line"),
        (b"[]", "line 2 is [], expected a dict"),
        ({"expression": "x", "mask": None}, "line 2 has no 'image'"),
        (entry(image=5), "'image' = 5, expected str"),
        (entry(image="../a.jpg"), "line 2 has 'image' = '../a.jpg', expected a path below"),
        (entry(image="/etc/passwd"), "'/etc/passwd', expected a path below"),
        (entry(image="pictures/../../a.jpg"), "expected a path below"),
        (entry(image="a\0.jpg"), "expected a path below"),
        (entry(image=""), "expected a path below"),
        (entry(image="pictures/c.jpg"), "pictures/c.jpg, which is missing"),
        (entry(image="pictures"), "pictures, which is not a file"),
        (entry(image="\ud800/\udcff.jpg"), "expected a path below"),
        (entry(image="a\nb.jpg"), "expected a path below"),
        (entry(image="x" * 2000), "expected a path below"),
        (entry(image="\xe9t\xe9/\N{SNOWMAN}.jpg"), "été/☃.jpg, which is missing"),
        (entry(image="one.png/a.jpg"), "which is missing"),
        (entry(expression=None), "'expression' = None, expected list"),
        (entry(expression=["a", 5]), "expected a list of str"),
        (entry(expression=[]), "has 0 sentences, expected 1 to 1000"),
        (entry(expression=["a"] * 1001), "has 1001 sentences"),
        (entry(expression=" \t"), "without words"),
        (entry(expression="x" * 10_001), "sentence of 10001 characters, more than 10000"),
        (entry(expression="\ud800 man"), "not valid Unicode text"),
        ({"image": "pictures/a.jpg", "mask": SQUARE}, "has no 'expression'"),
        ({"image": "pictures/a.jpg", "expression": "x"}, "has no 'mask'; write null"),
        (entry(mask=5), "'mask': segmentation is 5"),
        (entry(mask=[]), "'mask': segmentation has no polygon"),
        (entry(mask=[[1, 1, 5, 1, 5, 1e9]]), "polygon 0 leaves its 12 x 16 image"),
        (entry(mask={"size": [16, 12], "counts": [192]}), "RLE has size [16, 12]"),
        (entry(mask={"boxes": 5}), "'boxes' = 5, expected list"),
        (entry(mask={"boxes": []}), "segmentation has no polygon"),
        (entry(mask={"boxes": [[1, 1, 0, 5]]}), "the box [1, 1, 0, 5], expected [x, y, width, height]"),
        (entry(mask={"boxes": [[1, 1, 5]]}), "the box [1, 1, 5]"),
        (entry(mask={"boxes": [[1, 1, 5, "5"]]}), "the box"),
        (entry(mask={"boxes": [[10**400, 0.5, 5, 5]]}), "the box"),
        (entry(mask={"boxes": [[float("nan"), 1, 5, 5]]}), "the box"),
        (entry(mask={"boxes": [[200, 1, 5, 5]]}), "polygon 0 leaves"),
        (entry(mask="../one.png"), "'mask' = '../one.png', expected a path below"),
        (entry(mask="gone.png"), "gone.png, which is missing"),
        (entry(mask="pictures/a.jpg"), "is a JPEG, but a mask must be a PNG"),
        (entry(mask="data.jsonl"), "not an image of a known kind"),
        (entry(mask="one.png", image="pictures/b.jpg", height=12, width=15), "width 16, but the image has"),
        (entry(height=12), "has no 'width'"),
        (entry(height=12.0, width=16), "'height' = 12.0, expected int"),
        (entry(image="pictures/b.jpg", height=10**6, width=16), "the image has height 1000000"),
        (entry(image="pictures/b.jpg", height=15_000, width=15_000, mask=None), "pixels, more than"),
        (entry(image="pictures/b.jpg", height=-1, width=16, mask=None), "the image has height -1"),
        (entry(split=""), "'split' = ''"),
        (entry(split="train,val"), "expected a name such as train"),
        (entry(split="a\nb"), "expected a name such as train"),
        (entry(split="x" * 65), "expected a name such as train"),
        (entry(split=None), "'split' = None, expected str"),
        (entry(image_id="7"), "'image_id' = '7', expected int"),
        (entry(image_id=2**70), "'image_id' = "),
        (entry(image="pictures/b.jpg", image_id=1), "'pictures/b.jpg' is that of 'pictures/a.jpg'"),
        (entry(image_id=9), "'pictures/a.jpg' has id 9, 12 x 16 pixels, but before id 1"),
        (entry(height=16, width=12), "has id 1, 16 x 12 pixels, but before id 1, 12 x 16"),
        (entry(sent_id=[1, 2]), "has 2 'sent_id' for 1 sentences"),
        (entry(sent_id=True), "'sent_id' = True, expected int"),
        (entry(ref_id="a"), "'ref_id' = 'a', expected int"),
        (entry(ann_id=[]), "has a mask, but 'ann_id' = []"),
        (entry(category_id=["1"]), "expected a list of int"),
    ],
)  # fmt: skip
def test_each_defect_names_its_line_or_is_left_out(tmp_path, line, says):
    path = written(tmp_path, entry(), line, entry(expression="last"))
    message = refusal(path)
    assert f"{path}: line 2" in message and says in message
    with pytest.warns(UserWarning, match=r"line 2.*; 1 such left out"):
        data = Jsonl(path, on_error="skip")
    assert [r.expression for r in data.records("train")] == ["left square", "last"]
    assert data.splits == {"train": 2} and len(data.skipped) == 1 and says in data.skipped[0]


def test_a_file_of_nothing_but_defects_is_refused_even_then(tmp_path):
    assert "line 1" in refusal(written(tmp_path, b"{", b"}"), on_error="skip")
    assert "holds no line" in refusal(written(tmp_path, b"", b"  "))


def test_missing_file_names_what_is_there(tmp_path):
    written(tmp_path, entry())
    assert "no such file" in refusal(tmp_path / "other.jsonl") and "'data.jsonl'" in refusal(
        tmp_path / "other.jsonl"
    )


def test_overlong_line_is_passed_over(tmp_path):
    path = written(tmp_path, entry(), entry(note="x" * (LONGEST_LINE + 100)), entry(expression="last"))
    assert f"line 2 has more than {LONGEST_LINE} bytes" in refusal(path)
    with pytest.warns(UserWarning, match="line 2"):
        data = Jsonl(path, on_error="skip")
    assert [(r.expression, r.ref_id) for r in data.records("train")] == [("left square", 1), ("last", 3)]


def test_pipe_in_place_of_a_file_is_refused_at_once(tmp_path):
    written(tmp_path, entry())
    os.mkfifo(tmp_path / "pipe.jsonl")
    refusal(tmp_path / "pipe.jsonl")
    os.mkfifo(tmp_path / "pictures/pipe.jpg")
    assert "which is not a file" in refusal(written(tmp_path, entry(image="pictures/pipe.jpg")))
    (tmp_path / "pictures/a.jpg").unlink()
    (tmp_path / "pictures/a.jpg").symlink_to("/dev/zero")
    assert "which is a link to no file" in refusal(written(tmp_path, entry()))


def test_link_out_of_its_folder_is_refused_but_a_linked_folder_is_not(tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    Image.new("RGB", (16, 12)).save(outside / "secret.jpg")
    root = tmp_path / "data"
    root.mkdir()
    path = written(root, entry(image="pictures/c.jpg"))
    (root / "pictures/c.jpg").symlink_to(outside / "secret.jpg")
    assert "c.jpg, which is a link that leaves its folder" in refusal(path)
    (root / "pictures/c.jpg").unlink()
    (root / "pictures/c.jpg").symlink_to("a.jpg")  # stays inside
    assert len(Jsonl(path).records("train")) == 1
    (root / "linked").symlink_to(outside)
    assert len(Jsonl(written(root, entry(image="linked/secret.jpg"))).records("train")) == 1
    (root / "pictures/d.jpg").symlink_to("d.jpg")
    assert "d.jpg, which is" in refusal(written(root, entry(image="pictures/d.jpg")))
