"""Every preset against sets of pixels and fractions, and against interpolation written out in loops."""

from dataclasses import replace
from fractions import Fraction
from math import cos, exp, floor, pi, sin
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from reference_model.data.records import Record, segmentation_mask
from reference_model.data.transforms import resize_mask
from reference_model.files import InputError
from reference_model.scoring.answers import Answer, resized
from reference_model.scoring.evaluator import Evaluator, ImageGroups, truth_of
from reference_model.scoring.protocols import PROTOCOLS

SIDE = 8
"""Stands in for 480, so that a mask is a few pixels; no centre falls on an edge of images below 16 pixels."""


class Facts(NamedTuple):
    """What was read in a repository, said a second time."""

    square: bool
    threshold: Fraction
    at_least: bool
    exactly_one: bool
    epsilon: Fraction
    precisions: tuple[int, ...]  # tenths
    classifier: bool


EPSILON = Fraction(1, 10**6)
FACTS = {
    "metris": Facts(False, Fraction(1, 2), True, False, Fraction(0), (5, 6, 7, 8, 9), False),
    "lavt": Facts(True, Fraction(1, 2), True, True, Fraction(0), (5, 6, 7, 8, 9), False),
    "cris": Facts(False, Fraction(35, 100), False, False, EPSILON, (5, 6, 7, 8, 9), False),
    "cgformer": Facts(False, Fraction(1, 2), False, True, EPSILON, (5, 6, 7, 8, 9), False),
    "rela": Facts(True, Fraction(1, 2), True, False, Fraction(0), (7, 8, 9), True),
}


class Sample(NamedTuple):
    """A sentence, what is true, and what a model says."""

    height: int
    width: int
    boxes: list[tuple[int, int, int, int]]  # left, top, right, bottom; none where there is no target
    probability: dict[tuple[int, int], Fraction]  # by pixel, at the size of the protocol
    no_target: float | None


def protocol_of(name):
    protocol = PROTOCOLS[name]
    return protocol if protocol.size is None else replace(protocol, size=SIDE)


@st.composite
def samples(draw, name):
    height, width = draw(st.integers(2, 5)), draw(st.integers(2, 5))
    span = lambda most: st.tuples(st.integers(0, most), st.integers(0, most)).map(sorted)
    box = st.tuples(span(width), span(height)).map(
        lambda found: (*(f[0] for f in found), *(f[1] for f in found))
    )
    boxes = draw(st.lists(box.filter(lambda b: b[0] < b[2] and b[1] < b[3]), max_size=3))
    rows, columns = (SIDE, SIDE) if FACTS[name].square else (height, width)
    level = st.sampled_from([0, 30, 36, 49, 51, 80, 100]).map(lambda percent: Fraction(percent, 100))
    # Blocks, so that a prediction can be right; at SIDE a pixel of the image is a block.
    of_cell = draw(st.lists(level, min_size=height * width, max_size=height * width))
    if draw(st.booleans()):
        inside, outside = draw(level), draw(level)
        truth = true_cells(height, width, boxes, exactly_one=False)
        of_cell = [inside if (r, c) in truth else outside for r in range(height) for c in range(width)]
    probability = {
        (r, c): of_cell[cell_under(r, rows, height) * width + cell_under(c, columns, width)]
        for r in range(rows)
        for c in range(columns)
    }
    return Sample(height, width, boxes, probability, draw(st.sampled_from([None, 0.2, 0.8])))


def cell_under(index, count, cells):
    """The cell of the image under the centre of a pixel."""
    return floor(Fraction(2 * index + 1, 2 * count) * cells)


def true_cells(height, width, boxes, *, exactly_one):
    depth = {
        (r, c): sum(left <= c < right and top <= r < bottom for left, top, right, bottom in boxes)
        for r in range(height)
        for c in range(width)
    }
    return {cell for cell, count in depth.items() if (count == 1 if exactly_one else count)}


def record_of(sample, index):
    nothing = {"size": [sample.height, sample.width], "counts": [sample.height * sample.width]}
    return Record(
        image=Path("none.jpg"),
        height=sample.height,
        width=sample.width,
        expression="it",
        segmentation=[[a, b, c, b, c, d, a, d] for a, b, c, d in sample.boxes] or nothing,
        split="val",
        ref_id=index,
        ann_id=(index,) if sample.boxes else (),
        image_id=index,
        sent_id=index,
        category_id=(1,) if sample.boxes else (),
    )


def answer_of(sample):
    rows, columns = (max(axis) + 1 for axis in zip(*sample.probability))
    mask = torch.zeros(rows, columns)
    for cell, probability in sample.probability.items():
        mask[cell] = float(probability)
    return Answer(mask, False, sample.no_target)


def replayed(found):
    """A predictor that gives the answers of samples, by sent_id."""
    return lambda groups: ((r, answer_of(found[r.sent_id])) for group in groups for r in group)


def oracle(found, facts):
    """All scores by sets of pixels and fractions."""
    ious, gious, shared, whole, pooled_shared, pooled_whole = [], [], 0, 0, 0, 0
    with_target, hits, right_silence, right_voice = 0, dict.fromkeys(facts.precisions, 0), 0, 0
    for sample in found:
        cells = true_cells(sample.height, sample.width, sample.boxes, exactly_one=facts.exactly_one)
        rows, columns = (SIDE, SIDE) if facts.square else (sample.height, sample.width)
        truth = {
            (r, c)
            for r in range(rows)
            for c in range(columns)
            if (cell_under(r, rows, sample.height), cell_under(c, columns, sample.width)) in cells
        }
        mask = {cell for cell, probability in sample.probability.items() if probability > facts.threshold}
        says_nothing = sample.no_target is not None and sample.no_target > 0.5
        answer = set() if says_nothing else mask
        silent = says_nothing if facts.classifier and sample.no_target is not None else not answer
        union = len(answer | truth)
        iou = Fraction(len(answer & truth)) / (union + facts.epsilon) if union else Fraction(0)
        ious.append(iou)
        shared, whole = shared + len(answer & truth), whole + union
        if sample.boxes:
            with_target += 1
            right_voice += not silent
            for tenths in facts.precisions:
                hits[tenths] += iou >= Fraction(tenths, 10) if facts.at_least else iou > Fraction(tenths, 10)
            gious.append(Fraction(0) if silent else iou)
            pooled_shared += 0 if silent else len(answer & truth)
            pooled_whole += len((mask if facts.classifier else answer) | truth)
        else:
            right_silence += silent
            gious.append(Fraction(silent))
            pooled_whole += 0 if silent else len(answer | truth)
    share = lambda part, of: Fraction(part, of) if of else Fraction(0)
    result = {"oIoU": share(shared, whole), "mIoU": sum(ious) / len(ious), "count": len(found)}
    result |= {f"P@{tenths / 10}": share(hit, with_target) for tenths, hit in hits.items()}
    if with_target < len(found):
        result |= {"gIoU": sum(gious) / len(gious), "cIoU": share(pooled_shared, pooled_whole)}
        result |= {"N-acc": share(right_silence, len(found) - with_target)}
        result |= {"T-acc": share(right_voice, with_target)}
    return result


@pytest.mark.parametrize("name", FACTS)
@given(data=st.data())
def test_scores_equal_arithmetic_of_sets(name, data):
    found = data.draw(st.lists(samples(name), min_size=1, max_size=6))
    records = [record_of(sample, index) for index, sample in enumerate(found)]
    result = Evaluator(protocol_of(name)).score(replayed(found), records)
    expected = oracle(found, FACTS[name])
    assert result.keys() == expected.keys()
    for key, value in expected.items():
        # An IoU is summed in steps of 2^-40.
        assert result[key] == pytest.approx(float(value), abs=1e-12), key


def test_there_is_an_oracle_for_every_preset():
    assert FACTS.keys() == PROTOCOLS.keys() and all(PROTOCOLS[name].name == name for name in FACTS)
    assert {name: protocol.size for name, protocol in PROTOCOLS.items() if FACTS[name].square} == {
        "lavt": 480,
        "rela": 480,
    }


@pytest.mark.parametrize("name", FACTS)
def test_equality_at_a_precision_counts_where_the_code_says_so(name):
    """7 of 10 pixels, as far as epsilon leaves them equal."""
    protocol = replace(PROTOCOLS[name], epsilon=0.0, size=None)
    sample = Sample(1, 10, [(0, 0, 10, 1)], {(0, c): Fraction(c < 7) for c in range(10)}, None)
    result = Evaluator(protocol).score(replayed([sample]), [record_of(sample, 0)])
    assert result["P@0.7"] == FACTS[name].at_least and result["P@0.8"] == 0


def test_withdrawn_mask_weighs_on_ciou_in_relas_code_only():
    boxes = [(0, 0, 2, 2)]
    everywhere = {(r, c): Fraction(1) for r in range(SIDE) for c in range(SIDE)}
    withdrawn = Sample(2, 4, boxes, everywhere, 0.9)
    right = Sample(2, 4, boxes, {(r, c): Fraction(c < 4) for r in range(SIDE) for c in range(SIDE)}, 0.1)
    nothing = Sample(2, 4, [], everywhere, 0.9)
    records = [record_of(sample, index) for index, sample in enumerate([withdrawn, right, nothing])]
    score = lambda protocol: Evaluator(protocol).score(replayed([withdrawn, right, nothing]), records)
    rela = protocol_of("rela")
    assert score(rela)["cIoU"] == 32 / (64 + 32)
    assert score(replace(rela, empty_by="pixels"))["cIoU"] == 32 / (32 + 32) == score(rela)["oIoU"]


# ---- bringing an answer to a size ---------------------------------------------------------------


def cubic(x):
    x, a = abs(x), -0.75
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0


def interpolated(values, height, width, *, kernel, reach, aligned):
    """Separable interpolation by its definition, float64; beyond the border the last value goes on."""

    def weights(count, to):
        rows = []
        for index in range(to):
            at = index * (count - 1) / (to - 1) if aligned else (index + 0.5) * count / to - 0.5
            if reach == 1:
                at = min(max(at, 0.0), count - 1.0)
            row = [0.0] * count
            for source in range(floor(at) - reach + 1, floor(at) + reach + 1):
                row[min(max(source, 0), count - 1)] += kernel(at - source)
            rows.append(row)
        return np.array(rows)

    return weights(values.shape[0], height) @ values @ weights(values.shape[1], width).T


@pytest.mark.parametrize("name", FACTS)
@given(seed=st.integers(0, 2**31), height=st.integers(4, 9), width=st.integers(4, 9))
def test_answers_are_resized_by_the_rule_of_the_preset(name, seed, height, width):
    # Beyond 6 a probability in float32 no longer tells its logit to 1e-5.
    logits = (np.random.default_rng(seed).normal(size=(3, 4)) * 3).clip(-6, 6)
    sigmoid = lambda values: np.vectorize(lambda x: 1 / (1 + exp(-x)))(values)
    linear = {"kernel": lambda x: max(0.0, 1 - abs(x)), "reach": 1}
    if name in ("cris", "cgformer"):
        found = interpolated(
            sigmoid(logits), height, width, kernel=cubic, reach=2, aligned=name == "cgformer"
        ).clip(0, 1)
    else:
        found = sigmoid(interpolated(logits, height, width, aligned=False, **linear))
    result = resized(Answer(torch.tensor(logits), True, None), height, width, PROTOCOLS[name])
    np.testing.assert_allclose(result.probability, found, atol=1e-5)
    sure = abs(found - float(FACTS[name].threshold)) > 1e-5
    assert ((result.mask == (found > float(FACTS[name].threshold))) | ~sure).all()
    # The same network, asked for probabilities, is scored the same.
    again = resized(Answer(torch.tensor(sigmoid(logits)), False, None), height, width, PROTOCOLS[name])
    np.testing.assert_allclose(again.probability, result.probability, atol=1e-5)


@pytest.mark.parametrize("name", FACTS)
def test_answer_of_the_right_size_is_taken_as_it_is(name):
    probability = torch.rand(5, 6)
    result = resized(Answer(probability, False, 0.3), 5, 6, PROTOCOLS[name])
    np.testing.assert_array_equal(result.probability, probability.numpy())
    mask = probability > 0.5
    np.testing.assert_array_equal(resized(Answer(mask, False, None), 5, 6, PROTOCOLS[name]).mask, mask)
    assert resized(Answer(mask, False, None), 5, 6, PROTOCOLS[name]).probability is None


@given(seed=st.integers(0, 2**31))
def test_thresholded_masks_take_the_value_under_each_centre(seed):
    probability = torch.from_numpy(np.random.default_rng(seed).random((3, 5), dtype=np.float32))
    protocol = replace(PROTOCOLS["metris"], resized="mask", threshold=0.4)
    expected = [
        [probability[cell_under(r, 8, 3), cell_under(c, 8, 5)] > 0.4 for c in range(8)] for r in range(8)
    ]
    for answer in (Answer(probability, False, None), Answer(probability > 0.4, False, None)):
        np.testing.assert_array_equal(resized(answer, 8, 8, protocol).mask, expected)


# ---- sentences ----------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 5), min_size=1, max_size=6), st.integers(0, 99))
def test_sentences_of_a_ref_are_chosen_by_the_rule(counts, seed):
    sample = Sample(2, 2, [(0, 0, 1, 1)], {}, None)
    records, id = [], 0
    for ref, count in enumerate(counts):
        # Falling ids: what counts is the order of the file.
        for _ in range(count):
            id -= 1
            records.append(replace(record_of(sample, ref), sent_id=id, image_id=ref // 2))
    chosen = lambda rule, given=records, seed=seed: [
        record
        for group in ImageGroups(given, replace(PROTOCOLS["lavt"], sentences=rule, seed=seed))
        for record in group
    ]
    of_ref = [[record for record in records if record.ref_id == ref] for ref in range(len(counts))]
    assert chosen("all") == records
    assert chosen("first") == [ref[0] for ref in of_ref]
    assert chosen("last") == [ref[-1] for ref in of_ref]
    drawn = chosen("random")
    assert all(record in ref for record, ref in zip(drawn, of_ref, strict=True))
    assert drawn == chosen("random") == chosen("random", iter(records))
    # What becomes of one ref does not hang on the others.
    assert chosen("random", of_ref[-1]) == drawn[-1:]


def test_random_sentences_differ_from_seed_to_seed_and_take_all_places():
    sample = Sample(2, 2, [(0, 0, 1, 1)], {}, None)
    records = [replace(record_of(sample, ref), sent_id=n) for ref in range(60) for n in range(3)]
    draws = [
        tuple(
            record.sent_id
            for group in ImageGroups(records, replace(PROTOCOLS["lavt"], sentences="random", seed=seed))
            for record in group
        )
        for seed in range(3)
    ]
    assert len(set(draws)) == 3 and all(set(draw) == {0, 1, 2} for draw in draws)


def test_rela_draws_polygons_at_480_and_the_others_resize_what_was_drawn():
    """On a small round object they differ at the border; a corner shows which is which."""
    round_one = [v for k in range(24) for v in (9 + 4 * cos(k * pi / 12), 7 + 4 * sin(k * pi / 12))]
    record = replace(
        record_of(Sample(20, 32, [(0, 0, 1, 1)], {}, None), 1), segmentation=[round_one, [0, 0, 5, 0, 5, 5]]
    )
    scaled = [[v * (15, 24)[i % 2] for i, v in enumerate(polygon)] for polygon in record.segmentation]
    expected = segmentation_mask(scaled, 480, 480, owner="it")
    found = truth_of(record, PROTOCOLS["rela"])
    np.testing.assert_array_equal(found, expected)
    area = pi * 16 * 15 * 24 + 12.5 * 15 * 24
    assert found.sum() == pytest.approx(area, rel=0.02)
    blocks = truth_of(record, replace(PROTOCOLS["rela"], truth="resized"))
    np.testing.assert_array_equal(blocks, resize_mask(record.mask(), 480, 480))
    assert (blocks != found).mean() > 0.002
    # Run lengths have no corners to scale.
    counts = [20 * 8, 20 * 4, 20 * 20]
    runs = replace(record, segmentation={"size": [20, 32], "counts": counts})
    np.testing.assert_array_equal(truth_of(runs, PROTOCOLS["rela"]), resize_mask(runs.mask(), 480, 480))
    with pytest.raises(InputError, match="segmentation has no polygon"):
        truth_of(replace(record, segmentation=[]), PROTOCOLS["rela"])
