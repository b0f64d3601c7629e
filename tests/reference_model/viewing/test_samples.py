"""The page of samples: which ones are on it, and that each shows its image, its mask and its words."""

import io
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageDraw

import reference_model.viewing.samples as samples_module
from reference_model.data.config import ConvertConfig, DataConfig
from reference_model.data.convert import convert
from reference_model.data.datasets import read
from reference_model.data.records import Record
from reference_model.files import InputError
from reference_model.viewing.config import ShowConfig
from reference_model.viewing.overlay import TRUTH
from reference_model.viewing.samples import LONGEST, SIDE, evenly_spaced, page, show, tile


@pytest.fixture(scope="module")
def shards(scenes, tmp_path_factory):
    return convert(ConvertConfig(DataConfig(scenes), tmp_path_factory.mktemp("shards") / "out"))


@pytest.fixture
def words(monkeypatch):
    """All that is written on a picture."""
    written = []
    draw = ImageDraw.ImageDraw.text
    monkeypatch.setattr(
        ImageDraw.ImageDraw,
        "text",
        lambda self, at, text, **kw: (written.append(text), draw(self, at, text, **kw)),
    )
    return written


def record(size=(64, 48), colour=(200, 100, 50), **changes):
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, format="PNG")
    w, h = size
    square = [[w / 4, h / 4, 3 * w / 4, h / 4, 3 * w / 4, 3 * h / 4, w / 4, 3 * h / 4]]
    fields = dict(image=buffer.getvalue(), height=h, width=w, expression="the box", segmentation=square)
    ids = dict(ref_id=12, ann_id=1, image_id=7, sent_id=345, category_id=1)
    return Record(**fields | ids | {"split": "testA"} | changes)


def test_page_of_any_layout_is_the_same(scenes, shards, tmp_path, capsys):
    pages = [
        show(ShowConfig(DataConfig(root), split="val", count=5, out=tmp_path / f"{k}.png"))
        for k, root in enumerate((scenes, shards))
    ]
    assert pages[0].read_bytes() == pages[1].read_bytes()
    assert capsys.readouterr().out.splitlines()[0] == f"{pages[0]}: 5 samples of val"


@pytest.mark.parametrize("count", [1, 2, 7, 200])
def test_as_many_samples_as_asked_for_or_as_there_are(count, scenes, tmp_path, words, capsys):
    data = DataConfig(scenes)
    out = show(ShowConfig(data, split="train", count=count, out=tmp_path / "a.png"))
    expected = min(count, read(data).splits["train"])
    titles = [text for text in words if text.startswith("train, ref ")]
    assert len(titles) == len(set(titles)) == expected
    assert f"{expected} samples of train" in capsys.readouterr().out
    with Image.open(out) as sheet:
        columns = round(expected**0.5)
        assert sheet.width // columns >= SIDE and sheet.height >= -(-expected // columns) * SIDE


def test_samples_are_evenly_spaced_and_read_once(scenes, shards):
    for root in (scenes, shards):
        reader = read(DataConfig(root))
        ids = [record.sent_id for record in reader.stream("train")]
        passes = []
        stream = reader.stream
        reader.stream = lambda split, stream=stream, passes=passes: passes.append(split) or stream(split)
        picked = [ids.index(record.sent_id) for record in evenly_spaced(reader, "train", 5)]
        assert passes == ["train"]
        assert picked == np.linspace(0, len(ids) - 1, 5).round().astype(int).tolist()
        assert [r.sent_id for r in evenly_spaced(reader, "train", 10**6)] == ids


def test_parts_by_classes_can_be_shown(scenes, tmp_path, monkeypatch):
    reader = read(DataConfig(scenes))
    seen = [record.sent_id for record in reader.stream("val")][:3]
    monkeypatch.setattr(
        reader, "stream", lambda split: (r for r in type(reader).stream(reader, "val") if r.sent_id in seen)
    )
    assert [record.sent_id for record in evenly_spaced(reader, "val_seen", 12)] == seen


def test_tile_outlines_the_mask_leaves_the_rest_and_says_what_it_is(words):
    drawn = np.asarray(tile(record()))
    assert words == ["testA, ref 12, sentence 345", "the box"]
    outline, image = ((drawn == colour).all(axis=-1) for colour in (TRUTH, (200, 100, 50)))
    rows, columns = np.flatnonzero(outline.any(axis=1)), np.flatnonzero(outline.any(axis=0))
    # A quarter of an image that is SIDE wide and three quarters of it high.
    assert np.ptp(columns) == pytest.approx(SIDE / 2, abs=6) and np.ptp(rows) == pytest.approx(
        SIDE * 3 / 8, abs=6
    )
    # Inside and outside of the outline everything is as it was: SIDE x 3/4 SIDE in all.
    assert (outline | image).sum() == SIDE * SIDE * 3 // 4 and image.sum() > 20 * outline.sum()


def test_tile_without_a_target_says_so_and_has_no_outline(words):
    nothing = {"size": [48, 64], "counts": [48 * 64]}
    drawn = np.asarray(tile(record(ann_id=(), category_id=(), segmentation=nothing)))
    assert words[0] == "testA, ref 12, sentence 345: no target"
    assert (drawn == (200, 100, 50)).all(axis=-1).any() and not (drawn == TRUTH).all(axis=-1).any()


@pytest.mark.parametrize("size", [(1, 1), (4000, 30), (30, 4000), (5, 9)])
def test_tiles_of_any_shape_have_one_width(size):
    assert tile(record(size)).width == tile(record()).width


def test_endless_sentence_is_shortened(words):
    drawn = tile(record(expression="word " * 2000))
    assert sum(map(len, words[1:])) <= LONGEST and words[-1].endswith("...") and drawn.height < 2 * SIDE


def test_title_of_the_largest_ids_fits(monkeypatch):
    found = []
    draw = ImageDraw.ImageDraw.text
    monkeypatch.setattr(
        ImageDraw.ImageDraw,
        "text",
        lambda self, at, text, font, **kw: (
            found.append((at[0] + font.getlength(text), text)) or draw(self, at, text, font=font, **kw)
        ),
    )
    drawn = tile(record(ref_id=259839, sent_id=278667, ann_id=(), split="testA"))
    assert all(right <= drawn.width for right, _ in found) and "no target" in found[0][1]


def test_tiles_stand_in_rows_and_none_covers_another():
    tiles = [Image.new("RGB", (10, height), (height, 0, 0)) for height in (5, 9, 7, 3, 4)]
    sheet = np.asarray(page(tiles))
    assert sheet.shape == (9 + 7 + 4, 20, 3)
    for value in (5, 9, 7, 3, 4):
        assert (sheet == (value, 0, 0)).all(axis=-1).sum() == 10 * value


def test_broken_image_stops_or_is_left_out(scenes, tmp_path, monkeypatch):
    reader = read(DataConfig(scenes))
    records = reader.records("val")
    records[0] = replace(records[0], image=b"no image")
    monkeypatch.setattr(reader, "stream", lambda split: iter(records))
    monkeypatch.setattr(samples_module, "read", lambda config: reader)
    config = ShowConfig(DataConfig(scenes), split="val", count=len(records), out=tmp_path / "a.png")
    with pytest.raises(InputError, match=rf"image {records[0].image_id}: not an image"):
        show(config)
    assert not config.out.exists()
    with pytest.warns(UserWarning, match=r"not an image of a known kind.*; left out"):
        show(replace(config, data=DataConfig(scenes, on_error="skip")))
    assert config.out.exists()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"count": 0}, r"count: must be in \[1, 200\], got 0"),
        ({"count": 201}, r"count: must be in \[1, 200\], got 201"),
        ({"split": "trian"}, r"no split 'trian'; did you mean 'train'"),
    ],
)
def test_what_cannot_be_shown_is_refused(changes, says, scenes, tmp_path):
    with pytest.raises(InputError, match=says):
        show(replace(ShowConfig(DataConfig(scenes), out=tmp_path / "a.png"), **changes))


def test_out_must_be_a_png(scenes, tmp_path):
    with pytest.raises(InputError, match=r"a.jpg: must name a PNG file"):
        show(ShowConfig(DataConfig(scenes), out=tmp_path / "a.jpg"))
