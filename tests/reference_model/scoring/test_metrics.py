"""Metrics against plain sets of pixels, and the baselines against trying every choice."""

import json
import warnings
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from reference_model.data.records import Record
from reference_model.data.transforms import resize_mask
from reference_model.files import InputError
from reference_model.scoring.answers import Answer
from reference_model.scoring.baselines import evenly, largest_object, mean_mask_baseline
from reference_model.scoring.curves import PrecisionRecall
from reference_model.scoring.evaluator import Evaluator, computed
from reference_model.scoring.metrics import SegmentationMetrics
from reference_model.scoring.outcome import outcome, scores, tally
from reference_model.scoring.protocols import PROTOCOLS

pixels = st.sets(st.tuples(st.integers(0, 3), st.integers(0, 4)))
pairs = st.lists(st.tuples(pixels, pixels), min_size=1, max_size=8)


def mask_of(cells, height=4, width=5):
    mask = np.zeros((height, width), bool)
    for cell in cells:
        mask[cell] = True
    return mask


def scored(pairs):
    metrics = SegmentationMetrics()
    ious = []
    for prediction, truth in pairs:
        metrics.update(mask_of(prediction), mask_of(truth))
        ious.append(metrics.latest.iou)
    return ious, metrics.compute()


@given(pairs)
def test_equals_arithmetic_of_sets(pairs):
    ious, result = scored(pairs)
    exact = [Fraction(len(p & t), len(p | t)) if p | t else Fraction(0) for p, t in pairs]
    union = sum(len(p | t) for p, t in pairs)
    intersection = sum(len(p & t) for p, t in pairs)
    assert ious == [float(iou) for iou in exact]
    assert result["count"] == len(pairs)
    assert result["oIoU"] == (intersection / union if union else 0)
    assert result["mIoU"] == pytest.approx(float(sum(exact) / len(exact)), abs=1e-12)
    with_target = sum(bool(truth) for _, truth in pairs)
    for tenths in (5, 6, 7, 8, 9):
        hits = sum(iou >= Fraction(tenths, 10) for iou in exact)
        assert result[f"P@0.{tenths}"] == (hits / with_target if with_target else 0)


@given(pairs, st.randoms())
def test_order_does_not_change_the_last_digit(pairs, shuffler):
    result = scored(pairs)[1]
    shuffler.shuffle(pairs)
    assert scored(pairs)[1] == result


@given(pairs)
def test_parts_add_up_to_the_whole(pairs):
    """What groups, resamples and processes rest on."""
    outcomes = [outcome(mask_of(prediction), mask_of(truth)) for prediction, truth in pairs]
    assert scores(sum(tally(found) for found in outcomes)) == scored(pairs)[1]
    stacked = np.stack([tally(found) for found in outcomes])
    alone = scores(stacked, no_target=True)
    assert alone["mIoU"] == pytest.approx([found.iou for found in outcomes], abs=1e-12)
    assert alone["gIoU"] == pytest.approx([found.giou for found in outcomes], abs=1e-12)
    np.testing.assert_array_equal(alone["count"], np.ones(len(pairs)))


@pytest.mark.parametrize("tenths", [5, 7, 9])
def test_precision_counts_equality(tenths):
    truth = np.zeros((5, 10), bool)
    truth[0] = True
    prediction = truth.copy()
    prediction[0, tenths:] = False
    metrics = SegmentationMetrics()
    metrics.update(prediction, truth)
    assert metrics.compute()[f"P@0.{tenths}"] == 1
    prediction[0, 0] = False
    metrics.update(prediction, truth)
    assert metrics.compute()[f"P@0.{tenths}"] == 0.5


def test_overall_iou_weighs_pixels_and_mean_iou_weighs_expressions():
    metrics = SegmentationMetrics()
    metrics.update(np.ones((100, 100), bool), np.ones((100, 100), bool))
    metrics.update(np.array([[True, False]]), np.array([[False, True]]))
    assert metrics.compute()["mIoU"] == 0.5
    assert metrics.compute()["oIoU"] == 10_000 / 10_002


def test_pair_empty_on_both_sides_counts_as_a_miss_and_leaves_overall_iou():
    metrics = SegmentationMetrics()
    metrics.update(np.zeros((3, 3), bool), np.zeros((3, 3), bool), target=True)
    assert metrics.latest.iou == 0
    metrics.update(np.ones((3, 3), bool), np.ones((3, 3), bool))
    result = metrics.compute()
    assert (result["oIoU"], result["mIoU"], result["P@0.5"]) == (1, 0.5, 0.5)
    assert "gIoU" not in result  # an object too small to have a pixel is an object


def test_empty_pairs_can_count_as_hits():
    nothing = np.zeros((3, 3), bool)
    vlt = replace(PROTOCOLS["metris"], empty_iou=1.0)
    assert outcome(nothing, nothing, vlt).iou == 1 and outcome(nothing, ~nothing, vlt).iou == 0


def test_sums_do_not_overflow_small_integers():
    metrics = SegmentationMetrics()
    whole = np.ones((1000, 1000), bool)
    for _ in range(3000):
        metrics.update(whole[:1], whole[:1])
    many = 10**6 * tally(outcome(whole, whole))
    assert metrics.compute()["oIoU"] == scores(many)["oIoU"] == scores(many)["mIoU"] == 1


@pytest.mark.parametrize(
    ("prediction", "truth", "error", "says"),
    [
        (np.zeros((3, 4), bool), np.zeros((4, 3), bool), ValueError, r"\(3, 4\), truth has \(4, 3\)"),
        (np.zeros((1, 3, 4), bool), np.zeros((1, 3, 4), bool), ValueError, r"expected one \(h, w\)"),
        (np.zeros((3, 4), bool), np.zeros((1, 1), bool), ValueError, r"\(3, 4\), truth has \(1, 1\)"),
        (np.zeros((3, 4)), np.zeros((3, 4), bool), TypeError, "prediction must be bool, got float64"),
        (np.zeros((3, 4), bool), np.zeros((3, 4), np.uint8), TypeError, "truth must be bool, got uint8"),
    ],
)
def test_wrong_masks_are_refused_and_not_counted(prediction, truth, error, says):
    metrics = SegmentationMetrics()
    with pytest.raises(error, match=says):
        metrics.update(prediction, truth)
    with (
        pytest.raises(ValueError, match="no sentence was added"),
        warnings.catch_warnings(action="ignore"),
    ):
        metrics.compute()


# ---- several processes --------------------------------------------------------------------------

SAMPLES, IMAGES = 37, 11


def sentence(index):
    """A sentence whose prediction follows from its number; images have unlike numbers of sentences."""
    rng = np.random.default_rng(index)
    record = replace(record_of(rng.random((6, 7)) > 0.5), image_id=index * 7 % IMAGES, sent_id=index)
    return replace(record, ann_id=()) if index % 9 == 0 else record


def predicted(groups):
    for record in (record for group in groups for record in group):
        rng = np.random.default_rng(1000 + record.sent_id)
        absent = rng.random() if record.sent_id % 3 else None
        yield record, Answer(torch.from_numpy(rng.random((6, 7))), False, absent)


def score_a_share(rank, processes, folder, count, protocol):
    torch.set_num_threads(1)
    if processes > 1:
        dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=processes)
    metrics, curve = SegmentationMetrics(PROTOCOLS[protocol]), PrecisionRecall()
    evaluator, records = Evaluator(PROTOCOLS[protocol]), [sentence(index) for index in range(count)]
    seen = [one.record.sent_id for one in evaluator.outcomes(predicted, records, metrics, curve)]
    found = {"scores": computed(metrics), "seen": seen, "again": evaluator.score(predicted, records)}
    found["curve"] = computed(curve).precision.tolist()
    (folder / f"{processes}_{rank}.json").write_text(json.dumps(found))
    if processes > 1:
        dist.destroy_process_group()


@pytest.mark.parametrize(("processes", "count"), [(2, SAMPLES), (3, 2)])
def test_processes_with_uneven_shares_give_the_scores_of_one(tmp_path, processes, count):
    score_a_share(0, 1, tmp_path, count, "metris")
    torch.multiprocessing.spawn(score_a_share, (processes, tmp_path, count, "metris"), nprocs=processes)
    read = lambda of, rank: json.loads((tmp_path / f"{of}_{rank}.json").read_text())
    alone, together = read(1, 0), [read(processes, rank) for rank in range(processes)]
    assert alone["scores"]["count"] == count and "gIoU" in alone["scores"]
    for share in together:  # bit by bit
        assert share["scores"] == share["again"] == alone["scores"] == alone["again"]
        assert share["curve"] == alone["curve"]
    seen = [id for share in together for id in share["seen"]]
    assert sorted(seen) == sorted(alone["seen"]) == list(range(count))
    assert len({len(share["seen"]) for share in together}) > 1


# ---- baselines ----------------------------------------------------------------------------------


def record_of(mask):
    """A record with uncompressed run lengths of ``mask``."""
    flat = np.concatenate([[False], mask.T.reshape(-1)])
    edges = np.flatnonzero(np.diff(flat))
    counts = np.diff(np.concatenate([[0], edges, [mask.size]])).tolist()
    height, width = mask.shape
    return Record(
        image=Path("none.jpg"),
        height=height,
        width=width,
        expression="it",
        segmentation={"size": [height, width], "counts": counts},
        split="train",
        ref_id=0,
        ann_id=0,
        image_id=0,
        sent_id=0,
        category_id=1,
    )


def mean_iou(guess, masks):
    return np.mean([(guess & mask).sum() / max((guess | mask).sum(), 1) for mask in masks])


@given(st.lists(pixels, min_size=1, max_size=6))
@settings(deadline=None)
def test_mean_mask_has_the_best_threshold_of_all(cells):
    masks = [mask_of(cell, 5, 5) for cell in cells]
    guess = mean_mask_baseline([record_of(mask) for mask in masks], 5)
    mean = np.mean(masks, axis=0)
    best = max(mean_iou(mean >= level, masks) for level in np.unique(mean))
    assert mean_iou(guess, masks) == pytest.approx(best, abs=1e-12)
    assert guess.dtype == bool and mean[guess].min() > mean[~guess].max(initial=-1)


def test_mean_mask_brings_images_of_unlike_size_to_one_grid():
    masks = [np.zeros((8, 12), bool), np.zeros((20, 4), bool)]
    masks[0][:4] = True
    masks[1][:10] = True
    guess = mean_mask_baseline([record_of(mask) for mask in masks], 6)
    for mask in masks:
        np.testing.assert_array_equal(resize_mask(guess, *mask.shape), mask)


@pytest.mark.parametrize("count", [1, 2, 1999, 2000, 2001, 7000])
def test_at_most_2000_records_are_picked_from_end_to_end(count):
    picked = evenly(iter(range(count)), count)
    assert len(picked) == min(count, 2000) and (picked[0], picked[-1]) == (0, count - 1)
    assert max(np.diff(picked), default=1) <= count // 2000 + 1


def test_mean_mask_needs_records():
    with pytest.raises(ValueError, match="train_records is empty"):
        mean_mask_baseline([], 8)


def polygon(left, top, right, bottom):
    return [[left, top, right, top, right, bottom, left, bottom]]


def test_largest_object_is_the_largest_that_is_no_crowd():
    annotations = [
        {"id": 1, "segmentation": polygon(0, 0, 3, 3), "area": 99},
        {"id": 2, "segmentation": polygon(4, 1, 9, 6), "area": 1},  # covers most, whatever is stated
        {"id": 3, "segmentation": polygon(0, 0, 10, 8), "iscrowd": 1},
    ]
    expected = np.zeros((8, 10), bool)
    expected[1:6, 4:9] = True
    np.testing.assert_array_equal(largest_object(annotations, 8, 10), expected)
    np.testing.assert_array_equal(largest_object([], 8, 10), np.zeros((8, 10), bool))


def test_largest_object_names_a_malformed_annotation():
    with pytest.raises(InputError, match="annotation 7: segmentation is None"):
        largest_object([{"id": 7}], 8, 10)
