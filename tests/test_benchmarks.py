"""The benchmarks: what they compare is one function, a wrong row is refused, results are merged and drawn."""

import json
import os
import re
import shlex
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks import baselines, cases, compare, conftest, data, report, training
from benchmarks.cases import Case, require_truth
from metris_blocks import VisualExpressionExtractor
from metris_blocks.layers import MultiHeadAttention
from metris_blocks.ops import top_r_mask
from tests.conftest import assert_equal
from tests.support import paper
from tests.support.strategies import normal

B, L, N, C, D, HEADS, RATIO = 2, 3, 7, 6, 4, 2, 0.4
ROOT = Path(__file__).parents[1]


@pytest.fixture
def mask():
    return top_r_mask(normal(3, B, L, N), RATIO)


# ------------------------------------------------------------------------- the alternatives are the equations


@pytest.mark.parametrize("attend", [baselines.literal_attention, baselines.sdpa_attention])
def test_attention_baselines_equal_the_paper(attend, mask):
    q, k, v = normal(0, B, L, HEADS, C), normal(1, B, N, HEADS, C), normal(2, B, N, HEADS, C)
    found = attend(*(x.transpose(1, 2) for x in (q, k, v)), mask).transpose(1, 2)
    assert_equal(found, paper.attention(q, k, v, mask))


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("way", ["torch.nn.MultiheadAttention", "literal", "sdpa"])
def test_projected_baselines_equal_the_paper(way, masked, mask):
    module = MultiHeadAttention(D, C, num_heads=HEADS).double()
    x, context, mask = normal(0, B, L, D), normal(1, B, N, C), mask if masked else None
    written = partial(baselines.projected, module, x, context, mask)
    found = {
        "torch.nn.MultiheadAttention": partial(baselines.torch_multihead, module, x, context, mask),
        "literal": partial(written, baselines.literal_attention),
        "sdpa": partial(written, baselines.sdpa_attention),
    }[way]()
    assert_equal(found, paper.multi_head_attention(x, context, mask, module.state_dict(), HEADS))


@pytest.mark.parametrize("aggregate", [baselines.literal_aggregation, baselines.matmul_aggregation])
def test_aggregation_baselines_equal_the_paper(aggregate, mask):
    scores, visual = normal(0, B, L, N), normal(1, B, N, C)
    assert_equal(aggregate(scores, mask, visual), paper.eq5_aggregate(scores, mask, visual))


def test_curation_baselines_equal_the_paper():
    visual, language = normal(0, B, N, C), normal(1, B, L, C)
    scores = baselines.literal_relevance(visual, language)
    assert_equal(scores, paper.eq2_relevance(visual, language))
    chosen = paper.eq3_dynamic_mask(paper.eq2_curate(scores, RATIO), N)
    assert baselines.literal_selection(scores, RATIO).equal(chosen)


@pytest.mark.parametrize("way", ["literal", "sdpa", "auto"])
def test_extractor_baselines_equal_the_paper(way):
    module = VisualExpressionExtractor(C, D, D, joint_dim=5, num_heads=HEADS, ratio=RATIO).double()
    visual, language = normal(0, B, N, C), normal(1, B, L, D)
    tokens, _, _ = paper.extract(visual, language, module.state_dict(), num_heads=HEADS, ratio=RATIO)
    assert_equal(baselines.extractor_ways(module)[way](visual, language), tokens)


# ------------------------------------------------------------------------------------------ truth before time


def products(wrong):
    """A case of x @ y whose way "other" errs by ``wrong`` in the value, and so in the gradients."""
    leaves = [normal(0, 4, 5).float().requires_grad_(), normal(1, 5, 3).float().requires_grad_()]
    build = lambda: {"literal": lambda x, y: x @ y, "other": lambda x, y: (1 + wrong) * (x @ y)}
    return Case(leaves, build, flop=120, nbytes=188)


@pytest.mark.parametrize("mode", ["forward", "backward", "forward+backward"])
def test_wrong_row_is_refused_and_a_right_one_is_not(mode):
    require_truth(products(0), "other", mode)
    with pytest.raises(AssertionError, match=r"other is wrong: error 0\.0"):
        require_truth(products(1e-3), "other", mode)


def test_not_a_number_is_wrong():
    with pytest.raises(AssertionError, match="error inf"):
        require_truth(products(float("nan")), "other", "forward")


def test_backward_is_timed_without_its_forward():
    ran = []

    class Noted(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ran.append("forward")
            return 2 * x

        @staticmethod
        def backward(ctx, gradient):
            ran.append("backward")
            return 2 * gradient

    case = Case([torch.ones(2, requires_grad=True)], lambda: {"literal": Noted.apply}, flop=0, nbytes=0)
    prepare, run = case.steps("literal", "backward")
    prepare()
    ran.clear()
    run()
    assert ran == ["backward"]


def bench(*options, folder):
    """Run benchmarks as `make bench` does, their results in ``folder``."""
    command = re.search(r"^BENCH := ((?:.*\\\n)*.*)$", (ROOT / "Makefile").read_text(), re.M)[1]
    words = shlex.split(command.replace("\\\n", " "))
    # Told of xdist, pytest-benchmark would refuse to measure.
    ours = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment = ours | {"METRIS_BENCH_RESULTS": str(folder)}
    return subprocess.run(
        [sys.executable, *words, *options], cwd=ROOT, env=environment, capture_output=True, text=True
    )


def test_rows_are_measured_or_say_why_not(tmp_path):
    done = bench("-k", "bench_relevance and stage4-b1- and not compiled", folder=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = tmp_path.glob("*.json")
    rows = json.loads(path.read_text())["rows"]
    assert len(rows) == 3 * len(cases.MODES) * len(cases.DTYPES)
    assert all(("ms" in row) != ("skipped" in row) for row in rows)
    measured = [row for row in rows if "ms" in row]
    assert {row["provider"] for row in measured} >= {"literal", "auto"}
    for row in measured:
        assert {"device", "torch", "commit", "gflop", "mbytes", "peak_mib", "roofline_share"} <= row.keys()
        assert row["ms"] > 0 and row["peak_mib"] > 0
        assert ("ratio_to_literal" in row) == (row["provider"] != "literal")


def test_gpu_machines_need_few_packages():
    """What `make bench-gpu` asks for; what else is installed here is hidden."""
    hidden = ["jsonargparse", "pycocotools", "matplotlib", "hypothesis", "xformers", "xdist", "gradio"]
    modules = [f"benchmarks.{path.stem}" for path in (ROOT / "benchmarks").glob("bench_*.py")]
    hide = f"import sys; sys.modules.update(dict.fromkeys({hidden}))"
    code = f"{hide}; import benchmarks.conftest, {', '.join(modules)}"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


# ------------------------------------------------------------------------------------------------ the results


def row(provider, *, stem="attention", **values):
    about = {"stem": stem, "provider": provider, "mode": "forward", "stage": "stage4", "b": 1}
    return about | {"dtype": "float32", "n": 225, "c": 1024} | values


def test_rerun_replaces_its_rows_and_keeps_what_it_cannot_measure():
    before = [row("auto", ms=2.0), row("sdpa", ms=3.0), row("triton", skipped="needs cuda")]
    merged = conftest.merged(
        before, [row("auto", ms=1.0), row("sdpa", skipped="out of time"), row("new", ms=5.0)]
    )
    shown = {found["provider"]: found.get("ms", found.get("skipped")) for found in merged}
    assert shown == {"auto": 1.0, "sdpa": 3.0, "triton": "needs cuda", "new": 5.0}


def test_report_writes_what_the_results_say_and_nothing_else():
    ours = row("auto", ms=2.0, ratio_to_literal=0.4, ratio_to_sdpa=0.8, peak_mib=1.5)
    result = {
        "device": "Abacus",
        "rows": [ours, row("literal", ms=5.0, peak_mib=6.0), row("xformers", skipped="no")],
    }
    readme = f"before\n{report.BEGIN}\nstale\n{report.END}\nafter\n"
    written = report.rewrite(readme, {"abacus": result})
    assert written.startswith("before\n") and written.endswith("after\n") and "stale" not in written
    assert "| attention | 1 | forward | 2 | 0.40 | 0.80 | 1.5 | 6 |" in written
    assert report.rewrite(written, {"abacus": result}) == written
    with pytest.raises(ValueError, match="no '<!-- benchmarks: begin -->'"):
        report.rewrite("no marks", {"abacus": result})


def test_readme_shows_the_committed_results():
    results = report.load()
    readme = (ROOT / "README.md").read_text()
    assert not results or report.rewrite(readme, results) == readme, "run `make bench-report`"


# ---------------------------------------------------------------------------------------------- two revisions


def test_every_row_of_auto_can_be_compared():
    names = list(compare.names())
    assert {name.split()[0] for name in names} == set(report.STEMS)
    assert len(names) == len(set(names))


def test_trees_take_turns_and_ratios_are_of_pairs(monkeypatch):
    order = []

    class Fake:
        def __init__(self, name, ms):
            self.name, self.ms = name, iter(ms)

        def ask(self, line=""):
            if line:
                return "ready" if "missing" not in line or self.name == "here" else "no such row"
            order.append(self.name)
            return next(self.ms)

    here, base = Fake("here", [9, 1, 2, 30, 4, 5]), Fake("base", [9, 2, 4, 60, 8, 10])
    (cells, refused) = compare.compare(here, base, ["attention s forward", "missing s forward"], 5)
    assert cells == ["attention s forward", "8", "4", "0.500", "0.500 to 0.500"]
    assert refused[-1] == "base: no such row"
    assert order == ["here", "base"] * 6


@pytest.mark.slow
@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="needs the history")
def test_bench_compare_runs_two_trees():
    words = ["HEAD", "--only", "relevance stage4-b1 forward$", "--rounds", "2", "--threads", "1"]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.compare", *words], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    line = done.stdout.splitlines()[-1]
    assert re.fullmatch(r"relevance stage4-b1 forward +\S+ +\S+ +\d\.\d+  \d\.\d+ to \d+\.\d+", line), line


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "say which revision"),
        (["no-such-revision"], "git has no no-such-revision"),
        (["HEAD", "--only", "nothing"], "matches no row"),
        (["HEAD", "--rounds", "0"], "--rounds must be >= 1, got 0"),
    ],
)
def test_bench_compare_refuses(words, says, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench-compare", *words])
    with pytest.raises(SystemExit) as refusal:
        compare.main()
    assert refusal.value.code == 2 and says in capsys.readouterr().err


# ----------------------------------------------------------------------------------------- data and scoring


def test_data_rows_are_measured_and_go_between_the_marks():
    text = data.tables(rounds=1, pictures=3)
    rows = [line.split("|") for line in text.splitlines() if line.count("|") == 5][2:]
    ratios = [float(row[4]) for row in rows]
    assert len(ratios) == 12 and all(ratio > 0 for ratio in ratios)
    begin, end = data.MARKS
    readme = report.between(f"a {begin} old {end} b", text, begin, end)
    assert readme.startswith("a ") and readme.endswith(" b") and text in readme and "old" not in readme


def test_every_variant_of_training_has_a_row_or_says_why(monkeypatch):
    """Steps are not taken here: the slow variants are twice as slow, and wait for data."""
    monkeypatch.setattr(training, "generate", lambda config: config.root.mkdir())

    def run(preset, variant, data, out):
        out.mkdir()
        slow = variant != "float32"
        return {
            "step_seconds": 1.0 + slow,
            "images_per_second": 4.0,
            "data_wait": 0.04 + 0.02 * slow,
            "memory_MiB": 100.0,
        }

    monkeypatch.setattr(training, "run", run)
    monkeypatch.setattr(training, "_add_utilisation", lambda rows: None)
    rows = training.measured(2)
    pairs = [(row["preset"], row["variant"]) for row in rows]
    assert sorted(pairs) == sorted((p, v) for p in training.PRESETS for v in training.VARIANTS)
    lines = training.table("here", rows).splitlines()
    assert len(lines) == 4 + len(pairs)
    for line, row in zip(lines[4:], rows, strict=True):
        if "why" in row:
            assert row["why"] in line
        else:
            assert row["ratio"] == 1.0 + (row["variant"] != "float32")
            assert ("above 5%" in line) == (row["variant"] != "float32")


def test_utilisation_is_the_work_of_forward_and_backward_over_the_peak(monkeypatch):
    """100 MACs an image, 30 more a sentence; four sentences about two images in half a second."""
    parts = [{"part": "image encoder", "GMACs": 100e-9}, {"part": "whole model", "GMACs": 130e-9}]
    done = SimpleNamespace(stdout=json.dumps({"parts": parts}))
    monkeypatch.setattr(training.subprocess, "run", lambda *_, **__: done)
    monkeypatch.setattr(training, "roofline", lambda *_: (16_000.0, None))
    row = {"preset": "p", "variant": "bf16", "batch": 4, "images_per_second": 4.0, "step_seconds": 0.5}
    training._add_utilisation([row])
    assert row["utilisation"] == pytest.approx(2 * 3 * (2 * 100 + 4 * 30) / 0.5 / 16_000)


def test_data_rows_of_another_result_are_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(data.coco_mask, "decode", lambda runs: np.zeros((480, 640)))
    with pytest.raises(ValueError, match="mask: differs from pycocotools"):
        data.image_rows(tmp_path, 1)
