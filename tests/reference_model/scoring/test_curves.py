"""The precision-recall curve against counting pixels threshold by threshold."""

import time
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reference_model.scoring.curves import PrecisionRecall

# Steps of probability, of which the middle is taken: float32 tells no 0.251 from what is just below it.
pixels = st.lists(st.tuples(st.integers(0, 1000), st.booleans()), min_size=1, max_size=30)


def curve_of(*parts):
    metric = PrecisionRecall()
    for part in parts:
        thousandths, truth = (np.array(column)[None] for column in zip(*part))
        metric.update(((thousandths + 0.5) / 1000).clip(max=1).astype(np.float32), truth)
    return metric.compute()


@given(pixels)
def test_every_threshold_equals_counting(part):
    curve, true = curve_of(part), sum(truth for _, truth in part)
    area, recall_above = Fraction(0), Fraction(0)
    for step in range(1000, -1, -1):
        predicted = [truth for thousandths, truth in part if thousandths >= step]
        precision = Fraction(sum(predicted), len(predicted)) if predicted else Fraction(1)
        recall = Fraction(sum(predicted), true) if true else Fraction(0)
        assert curve.thresholds[step] == pytest.approx(step / 1000, abs=1e-12)
        assert curve.precision[step] == pytest.approx(float(precision), abs=1e-12)
        assert curve.recall[step] == pytest.approx(float(recall), abs=1e-12)
        area, recall_above = area + (recall - recall_above) * precision, recall
    assert curve.area == pytest.approx(float(area), abs=1e-12)


@given(st.lists(pixels, min_size=2, max_size=4))
def test_pixels_of_all_sentences_are_pooled(parts):
    apart, together = curve_of(*parts), curve_of([pixel for part in parts for pixel in part])
    for key, value in apart._asdict().items():
        np.testing.assert_array_equal(value, getattr(together, key))


@given(pixels)
def test_curve_has_the_shape_of_one(part):
    curve, true = curve_of(part), [truth for _, truth in part]
    assert (np.diff(curve.recall) <= 0).all() and 0 <= curve.area <= 1
    assert curve.precision[0] == pytest.approx(np.mean(true)) and curve.recall[0] == any(true)
    # At any threshold, precision and recall count the same right pixels.
    right = [sum(t for p, t in part if p >= step) for step in range(1001)]
    predicted = [sum(p >= step for p, _ in part) for step in range(1001)]
    np.testing.assert_allclose(curve.precision * predicted, right, atol=1e-9)


@given(pixels, st.integers(0, 2**31))
def test_only_the_order_of_probabilities_matters_to_the_area(part, seed):
    levels = sorted({thousandths for thousandths, _ in part})
    others = sorted(np.random.default_rng(seed).choice(1001, len(levels), replace=False).tolist())
    moved = dict(zip(levels, others))
    again = curve_of([(moved[thousandths], truth) for thousandths, truth in part])
    assert again.area == pytest.approx(curve_of(part).area, abs=1e-12)


def test_perfect_constant_and_worst_answers_have_known_areas():
    half = [True] * 5 + [False] * 5
    assert curve_of(list(zip([900] * 5 + [100] * 5, half))).area == 1
    assert curve_of(list(zip([500] * 10, half))).area == 0.5
    upside_down = curve_of(list(zip([100] * 5 + [900] * 5, half))).area
    assert upside_down == 0.5  # all must be taken before one is right
    assert curve_of(list(zip([100, 900], [False, False]))).area == 0


@given(st.lists(st.floats(0, 1, width=32), min_size=1, max_size=20))
def test_no_probability_leaves_the_histogram(values):
    metric, values = PrecisionRecall(), np.array([values], np.float32)
    metric.update(values, values > 0.5)
    assert metric.histogram.sum() == values.size
    assert metric.histogram[1, 500:].sum() == (values > 0.5).sum()
    assert metric.histogram[1, -1] == (values == 1).sum()


@pytest.mark.parametrize("value", [-0.01, 1.01, np.nan, np.inf])
def test_numbers_that_are_no_probabilities_are_refused(value):
    metric, probability = PrecisionRecall(), np.full((2, 3), 0.5, np.float32)
    probability[1, 1] = value
    with pytest.raises(ValueError, match=r"must be in \[0, 1\]"):
        metric.update(probability, np.ones((2, 3), bool))
    with pytest.raises(ValueError, match=r"\(2, 3\), truth has \(3, 2\)"):
        metric.update(np.zeros((2, 3), np.float32), np.ones((3, 2), bool))


def test_a_sentence_costs_less_than_ten_milliseconds():
    rng, metric = np.random.default_rng(0), PrecisionRecall()
    probability, truth = rng.random((480, 480), dtype=np.float32), rng.random((480, 480)) > 0.8
    seconds = []
    for _ in range(20):
        start = time.perf_counter()
        metric.update(probability, truth)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.01
