"""Paired comparison of results: against a bootstrap written out in loops, and what holds of any two files."""

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reference_model.cli import main
from reference_model.files import InputError
from reference_model.scoring import bootstrap
from reference_model.scoring.bootstrap import interval, resampled_sums, two_sided_p
from reference_model.scoring.compare import compare
from reference_model.scoring.config import CompareConfig
from reference_model.scoring.outcome import outcome, scores, tally
from reference_model.scoring.protocols import PROTOCOLS
from reference_model.scoring.results import result_line
from tests.reference_model.scoring.test_metrics import record_of


def results(path, predictions, *, protocol="metris", images=4, change=None):
    """Write results of sentences whose truth follows from their number."""
    protocol = PROTOCOLS[protocol]
    with path.open("w") as file:
        for index, prediction in enumerate(predictions):
            truth = truth_of(index)
            record = replace(record_of(truth), sent_id=index, image_id=index % images, split="val")
            record = record if truth.any() else replace(record, ann_id=())
            found = outcome(prediction, truth, protocol)
            if change is None or (record := change(record)) is not None:
                file.write(result_line(record, found, prediction, protocol, None, protocol.cutoff))
    return path


def truth_of(index):
    return np.random.default_rng(index).random((6, 7)) > (0.5 if index % 5 else 1)


def guesses(seed, count=20, worse=0.3):
    rng = np.random.default_rng(1000 + seed)
    return [truth_of(i) ^ (rng.random((6, 7)) < worse * rng.random()) for i in range(count)]


@pytest.fixture
def pair(tmp_path):
    return results(tmp_path / "a.jsonl", guesses(1)), results(tmp_path / "b.jsonl", guesses(2, worse=0.2))


# ---- the bootstrap ------------------------------------------------------------------------------


@given(
    st.lists(st.lists(st.integers(0, 99), min_size=2, max_size=2), min_size=1, max_size=7), st.integers(0, 9)
)
def test_sums_are_of_as_many_rows_as_there_are(rows, seed):
    values = np.array([[*row, 1] for row in rows])
    sums = resampled_sums(values, resamples=200, seed=seed)
    assert sums.shape == (200, 3) and (sums[:, 2] == len(rows)).all()
    assert (sums >= len(rows) * values.min(axis=0)).all() and (sums <= len(rows) * values.max(axis=0)).all()
    np.testing.assert_array_equal(sums, resampled_sums(values, resamples=200, seed=seed))


def test_resamples_have_the_mean_and_spread_of_drawing_with_replacement():
    values = np.random.default_rng(0).random((40, 1)) * 10
    sums = resampled_sums(values, resamples=20_000, seed=1)[:, 0]
    spread = values.std() * np.sqrt(40)
    assert abs(sums.mean() - values.sum()) < 4 * spread / np.sqrt(20_000)
    assert sums.std() == pytest.approx(spread, rel=0.03)


def test_memory_in_portions_changes_no_draw(monkeypatch):
    values = np.random.default_rng(0).integers(0, 9, (13, 2))
    whole = resampled_sums(values, resamples=150, seed=4)
    monkeypatch.setattr(bootstrap, "_AT_ONCE", 100)
    np.testing.assert_array_equal(resampled_sums(values, resamples=150, seed=4), whole)


def test_intervals_hold_the_truth_about_as_often_as_they_say():
    rng, held = np.random.default_rng(5), 0
    for _ in range(200):
        values = rng.normal(3.0, 1.0, (60, 1))
        low, high = interval(resampled_sums(values, resamples=400, seed=int(rng.integers(1e9)))[:, 0] / 60)
        held += low <= 3.0 <= high
    assert 0.88 <= held / 200 <= 0.99


def test_p_is_small_only_where_resamples_agree_on_the_sign():
    assert two_sided_p(np.ones(999)) == 2 / 1000 == two_sided_p(-np.ones(999))
    assert two_sided_p(np.zeros(999)) == 1 == two_sided_p(np.array([-1.0, 1.0] * 50))
    assert two_sided_p(np.array([-1.0] * 49 + [1.0] * 950)) == 2 * 50 / 1000


# ---- two files ----------------------------------------------------------------------------------


def test_differences_are_those_of_the_scores_and_intervals_those_of_images(pair):
    found = compare(CompareConfig(*pair, resamples=300, seed=6))
    tallies = [
        np.stack([tally(outcome(p, truth_of(i))) for i, p in enumerate(predictions)])
        for predictions in (guesses(1), guesses(2, worse=0.2))
    ]
    whole = [scores(rows.sum(axis=0)) for rows in tallies]
    assert found["scores"].keys() == whole[0].keys() - {"count"} and "gIoU" in found["scores"]
    # The same draws, image by image and sentence by sentence.
    rng, differences = np.random.default_rng(6), {key: [] for key in found["scores"]}
    for drawn in rng.integers(4, size=(300, 4)):
        rows = [index for image in drawn for index in range(20) if index % 4 == image]
        a, b = (scores(table[rows].sum(axis=0), no_target=True) for table in tallies)
        for key in differences:
            differences[key].append(b[key] - a[key])
    for key, of in found["scores"].items():
        assert (of["a"], of["b"]) == (whole[0][key], whole[1][key])
        assert of["difference"] == whole[1][key] - whole[0][key]
        assert of["interval"] == pytest.approx(np.quantile(differences[key], [0.025, 0.975]), abs=1e-9)
        assert 0 < of["p"] <= 1


def test_wins_ties_and_losses_count_sentences(pair):
    found = compare(CompareConfig(*pair, resamples=100))
    value = lambda p, index: outcome(p, truth_of(index)).giou
    gains = [
        value(b, index) - value(a, index)
        for index, (a, b) in enumerate(zip(guesses(1), guesses(2, worse=0.2), strict=True))
    ]
    assert found["wins"] == sum(gain > 0 for gain in gains)
    assert found["losses"] == sum(gain < 0 for gain in gains)
    assert found["wins"] + found["ties"] + found["losses"] == found["sentences"] == 20
    order = np.argsort(gains, kind="stable")
    assert gains[found["worst"][0]["sent_id"]] == gains[order[0]]
    assert gains[found["best"][0]["sent_id"]] == gains[order[-1]]
    best = [case["b"] - case["a"] for case in found["best"]]
    assert best == sorted(best, reverse=True) and min(best) > 0


def test_a_file_equals_itself(pair):
    found = compare(CompareConfig(pair[0], pair[0], resamples=100))
    assert found["ties"] == 20 and not found["best"] and not found["worst"]
    for of in found["scores"].values():
        assert of["difference"] == 0 == of["interval"][0] == of["interval"][1] and of["p"] == 1


def test_swapping_the_files_turns_the_signs(pair):
    there = compare(CompareConfig(*pair, resamples=400))
    back = compare(CompareConfig(*pair[::-1], resamples=400))
    for key, of in there["scores"].items():
        other = back["scores"][key]
        assert other["difference"] == -of["difference"] and other["p"] == of["p"]
        assert other["interval"] == pytest.approx([-bound for bound in of["interval"][::-1]], abs=1e-12)
    assert (there["wins"], there["losses"]) == (back["losses"], back["wins"])
    assert there["best"][0]["sent_id"] == back["worst"][0]["sent_id"]


def test_perfect_results_are_better_beyond_doubt(tmp_path, pair):
    perfect = results(tmp_path / "perfect.jsonl", [truth_of(index) for index in range(20)])
    found = compare(CompareConfig(pair[0], perfect, resamples=1000))
    assert found["losses"] == 0 and found["wins"] > 10
    assert found["scores"]["mIoU"]["interval"][0] > 0 and found["scores"]["mIoU"]["p"] == 2 / 1001


def test_order_of_lines_does_not_matter(pair, tmp_path):
    lines = pair[1].read_text().splitlines()
    (tmp_path / "turned.jsonl").write_text("\n".join(lines[::-1]))
    found = [compare(CompareConfig(pair[0], b, resamples=100)) for b in (pair[1], tmp_path / "turned.jsonl")]
    assert found[0]["scores"] == found[1]["scores"]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"change": lambda r: None if r.sent_id == 7 else r},
            "b.jsonl: lacks sent_id 7 of split val, which .*a.jsonl",
        ),
        ({"change": lambda r: replace(r, split="testA")}, "b.jsonl: lacks sent_id 0 of split val"),
        ({"change": lambda r: replace(r, image_id=9)}, "sent_id 0 of split val has image_id 9, but 0"),
        ({"change": lambda r: replace(r, expression="no")}, "has expression 'no', but 'it'"),
        ({"protocol": "lavt"}, "has protocol 'lavt', but 'metris'"),
    ],
)
def test_other_samples_are_refused_by_the_first_that_differs(tmp_path, pair, changes, says):
    other = results(tmp_path / "b.jsonl", guesses(2), **changes)
    with pytest.raises(InputError, match=says):
        compare(CompareConfig(pair[0], other))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            lambda rows: rows[3].update(truth_area=1),
            "sent_id 3 of split val has pixels of the true mask 1, but",
        ),
        (lambda rows: rows[3]["mask"].update(size=[7, 6]), r"has height and width \[7, 6\], but \[6, 7\]"),
        (lambda rows: rows.append(rows[2]), ":21: sent_id 2 of split val a second time"),
        (lambda rows: rows.append({**rows[2], "sent_id": 77}), "a.jsonl: lacks sent_id 77"),
        (
            lambda rows: rows[0].pop("iou"),
            ":1: has no 'iou'; compare takes what metris evaluate --results wrote",
        ),
        (lambda rows: rows[0].update(protocol="ours"), ":1: protocol 'ours' is none of metris, lavt"),
        (lambda rows: rows[0].update(union="3"), ":1 has 'union' = '3'"),
        (lambda rows: rows.clear(), "b.jsonl: holds no results"),
        (lambda rows: rows[3].update(threshold=0.2), "sent_id 3 of split val has threshold 0.2, but 0.5"),
        (lambda rows: rows[3].update(sentences="first"), "has sentences 'first', but 'all'"),
        (lambda rows: rows[3].update(iou=float("nan")), ":4: iou nan and counts .* cannot be those of masks"),
        (lambda rows: rows[3].update(iou=1e300), ":4: iou 1e.300 and counts"),
        (lambda rows: rows[3].update(union=43), r":4: iou .* cannot be those of masks of size \[6, 7\]"),
        (lambda rows: rows[3].update(pooled_union=-1), ":4: iou"),
        (lambda rows: rows[3]["mask"].update(size=["6", 7]), r":4: iou .*of size \['6', 7\]"),
    ],
)
def test_lines_that_do_not_fit_are_named(pair, change, says):
    rows = [json.loads(line) for line in pair[1].read_text().splitlines()]
    change(rows)
    pair[1].write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(InputError, match=says):
        compare(CompareConfig(*pair))


@pytest.mark.parametrize("changes", [{"resamples": 99}, {"resamples": 10**6 + 1}, {"seed": -1}])
def test_ranges_are_kept(pair, changes):
    (name,) = changes
    with pytest.raises(InputError, match=f"{name}: must be in"):
        compare(CompareConfig(*pair, **changes))


def test_command_prints_a_table_or_json(pair, capsys):
    assert main(["compare", *map(str, pair), "--resamples", "100"]) == 0
    shown = capsys.readouterr().out
    assert "mIoU" in shown and "95 % interval" in shown and "b is better on" in shown
    assert main(["compare", *map(str, pair), "--resamples", "100", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["sentences"] == 20


def test_files_of_old_and_masks_given_as_such_compare_with_any(pair):
    rows = [json.loads(line) for line in pair[1].read_text().splitlines()]
    rows[0]["threshold"] = None
    for row in rows[1:]:
        del row["threshold"], row["sentences"]
    pair[1].write_text("\n".join(map(json.dumps, rows)))
    assert compare(CompareConfig(*pair, resamples=100))["sentences"] == len(rows)


def test_sentences_from_files_move_no_cursor(tmp_path, capsys):
    change = lambda record: replace(record, expression="the\x1b[2J man\nwins 99.9")
    files = [results(tmp_path / f"{n}.jsonl", guesses(n), change=change) for n in (1, 2)]
    compare(CompareConfig(*files, resamples=100))
    shown = capsys.readouterr().out
    assert "\x1b" not in shown and r"the\x1b[2J man\nwins 99.9" in shown
