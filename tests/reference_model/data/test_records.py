"""Record and its masks: both rules for overlapping polygons, and limits on what a file may ask for."""

import io
import pickle
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as coco_mask

from reference_model.data.records import (
    LONGEST_OUTLINE,
    MOST_POINTS,
    Record,
    segmentation_mask,
    segmentation_union,
)
from reference_model.files import InputError

polygons = st.lists(
    st.lists(st.integers(-10, 40).map(lambda n: n / 2), min_size=6, max_size=12).filter(
        lambda numbers: len(numbers) % 2 == 0
    ),
    min_size=1,
    max_size=5,
)


def record(**changes):
    fields = {
        "image": b"...",
        "height": 20,
        "width": 20,
        "expression": "it",
        "segmentation": [[0, 0, 10, 0, 10, 10, 0, 10], [5, 5, 15, 5, 15, 15, 5, 15]],
        "split": "train",
        "ref_id": 1,
        "ann_id": 2,
        "image_id": 3,
        "sent_id": 4,
        "category_id": 5,
    }
    return Record(**fields | changes)


@given(polygons)
@settings(deadline=None, max_examples=100)
def test_overlaps_are_inside_or_background_as_asked(segmentation):
    """Each polygon alone, by pycocotools, and then counted pixel by pixel."""
    each = np.stack([coco_mask.decode(coco_mask.frPyObjects([one], 18, 22))[..., 0] for one in segmentation])
    count = each.astype(int).sum(axis=0)
    union = segmentation_mask(segmentation, 18, 22, owner="here")
    once = segmentation_mask(segmentation, 18, 22, owner="here", overlaps="exactly_one")
    np.testing.assert_array_equal(union, count > 0)
    np.testing.assert_array_equal(once, count == 1)


def test_two_squares_lose_their_overlap_under_exactly_one():
    one = record()
    assert one.mask().sum() == 175 and one.mask("exactly_one").sum() == 150
    assert one.mask()[7, 7] and not one.mask("exactly_one")[7, 7]


@given(st.lists(st.tuples(polygons, st.sampled_from(["polygons", "text", "counts"])), min_size=1, max_size=4))
@settings(deadline=None, max_examples=60)
def test_union_of_several_forms_is_the_union_of_their_masks(drawn):
    forms, expected = [], np.zeros((18, 22), bool)
    for segmentation, form in drawn:
        mask = segmentation_mask(segmentation, 18, 22, owner="here")
        expected |= mask
        if form == "polygons":
            forms.append(segmentation)
            continue
        runs = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
        if form == "counts":
            flat = mask.T.reshape(-1)
            edges = [0, *(np.flatnonzero(np.diff(flat)) + 1), flat.size]
            runs = {
                "size": [18, 22],
                "counts": [0] * int(flat[0]) + [int(n) for n in np.diff(edges)],
            }
        forms.append(runs)
    union = segmentation_union(forms, 18, 22)
    np.testing.assert_array_equal(segmentation_mask(union, 18, 22, owner="here"), expected)


def test_mask_of_a_png_is_read_anew_and_belongs_to_its_image(tmp_path):
    truth = np.zeros((20, 20), bool)
    truth[3:9, 2:5] = True
    Image.fromarray(truth).save(tmp_path / "m.png")
    one = record(segmentation=tmp_path / "m.png")
    np.testing.assert_array_equal(one.mask(), truth)
    np.testing.assert_array_equal(one.mask("exactly_one"), truth)
    with pytest.raises(InputError, match=r"m.png: has height 20 and width 20, but its image has height 21"):
        record(segmentation=tmp_path / "m.png", height=21).mask()
    (tmp_path / "m.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(InputError, match=r"m.png: "):
        one.mask()


def test_record_with_the_bytes_of_its_image_is_a_short_line_and_a_key():
    data = io.BytesIO()
    Image.new("RGB", (20, 20)).save(data, "PNG")
    one = record(image=data.getvalue())
    assert "PNG" not in repr(one) and len(repr(one)) < 300
    assert one.image_name == "image 3"
    assert {one, pickle.loads(pickle.dumps(one))} == {one}
    with pytest.raises(InputError, match=r"^image 3: annotation 2: "):
        record(segmentation=[]).mask()


# ---- limits -------------------------------------------------------------------------------------


def defect_of(segmentation, height=480, width=640):
    started = time.process_time()
    with pytest.raises(InputError) as caught:
        segmentation_mask(segmentation, height, width, owner="here")
    assert time.process_time() - started < 5 and len(str(caught.value)) < 300
    return str(caught.value)


def test_absurd_polygons_are_refused_before_pycocotools_sees_them():
    triangle = [1.0, 1.0, 3.0, 1.0, 3.0, 3.0]
    assert f"more than {MOST_POINTS} points" in defect_of([triangle] * (MOST_POINTS // 3 + 1))
    assert f"more than {MOST_POINTS} points" in defect_of([[1.0, 1.0] * (MOST_POINTS + 1)])
    # Few points may still draw a line of any length, which pycocotools would take memory for, unasked.
    zigzag = [[-8000.0, 0.0, 16000.0, 1.0] * 100]
    assert f"expected at most {LONGEST_OUTLINE}" in defect_of(zigzag, 8000, 8000)


def test_many_small_polygons_within_the_limits_are_drawn_in_seconds():
    rng = np.random.default_rng(0)
    corners = rng.integers(0, 400, (MOST_POINTS // 3, 2)).tolist()
    drawn = [[float(n) for n in (x, y, x + 2, y, x, y + 2)] for x, y in corners]
    started = time.process_time()
    assert segmentation_mask(drawn, 480, 640, owner="here").any()
    assert time.process_time() - started < 20


@pytest.mark.parametrize("side", [(20_000, 20_000), (10_000, 9_000), (20_001, 1), (0, 5), (True, 5)])
def test_absurd_images_are_refused_before_memory_is_taken(side):
    assert "the image has" in defect_of({"size": list(side), "counts": [side[0] * side[1]]}, *side)
