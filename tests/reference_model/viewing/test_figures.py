"""The paper's figures: what is drawn is what the arrays say, and can be read at the width of a column."""

import json
import math
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.text import Text

from reference_model import figures as draw
from reference_model.checkpoints.checkpoint import load_checkpoint
from reference_model.cli import main
from reference_model.data.config import DataConfig
from reference_model.data.datasets import read
from reference_model.figures.style import HEAT
from reference_model.files import InputError
from reference_model.model.build import build_metris
from reference_model.scoring.config import EvaluateConfig
from reference_model.scoring.curves import PrecisionRecall
from reference_model.scoring.evaluate import evaluate
from reference_model.scoring.evaluator import Evaluator
from reference_model.scoring.metris_predictor import MetrisPredictor
from reference_model.synthetic.config import GenerateConfig
from reference_model.synthetic.generate import generate
from reference_model.viewing import paper_figures as run_figures
from reference_model.viewing.explain import _within, encode, explain, unknown_words, with_ratio
from reference_model.viewing.paper_figures import embeddings, sweep, trained
from reference_model.viewing.runs import data_of, image_of, log_of, losses, spaced_images

H, W = 20, 30
STEMS = ("comparison", "relevance", "curated", "attention_words", "attention", "embeddings")
STEMS += ("precision_recall", "ratio")


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def image(rng):
    return rng.integers(0, 256, (H, W, 3), dtype=np.uint8)


@pytest.fixture
def masks(rng):
    return [rng.random((H, W)) < 0.3 for _ in range(3)]


@pytest.fixture(scope="module")
def checkpoint(run):
    return load_checkpoint(run)


@pytest.fixture(scope="module")
def group(run):
    return spaced_images(data_of(run, None), "val", 1)[0]


def texts(figure):
    figure.canvas.draw()
    return [t for t in figure.findobj(Text) if t.get_visible() and t.get_text().strip()]


# --------------------------------------------------------------------------------------------------- pixels


@pytest.mark.parametrize("opacity", [0.0, 0.3, 1.0])
def test_tint_mixes_inside_the_mask_and_leaves_the_rest(image, masks, opacity):
    before, mask = image.copy(), masks[0]
    shown = draw.tinted(image, mask, (10, 200, 30), opacity=opacity)
    assert (image == before).all() and (shown[~mask] == image[~mask]).all()
    expected = (1 - opacity) * image[mask] + opacity * np.array([10, 200, 30])
    assert np.abs(shown[mask] - expected).max() <= 0.5 + 1e-4


@pytest.mark.parametrize(
    ("mask", "options"),
    [
        (np.zeros((W, H), bool), {}),
        (np.zeros((H, W), np.uint8), {}),
        (np.zeros((H, W), bool), {"opacity": 1.5}),
    ],
)
def test_tint_refuses_what_it_would_draw_wrongly(image, mask, options):
    with pytest.raises(ValueError, match=r"tinted: .*expected|tinted: .*must be"):
        draw.tinted(image, mask, **options)


def test_grid_spreads_to_pixels_as_repeated_cells(rng):
    grid = rng.random((4, 5))
    assert (draw.spread(grid, 12, 20) == np.kron(grid, np.ones((3, 4)))).all()


def test_heat_has_the_colours_of_its_map_and_keeps_the_order(image):
    import matplotlib

    weights = np.linspace(0, 1, W)[None]
    white = np.full_like(image, 255)
    shown = draw.heated(white, weights, 0.0, 1.0)
    ends = 0.75 * 255 * matplotlib.colormaps[HEAT]([0.0, 1.0])[:, :3] + 0.25 * 255
    assert np.abs(shown[0, [0, -1]] - ends).max() <= 0.5 + 1e-6
    light = shown[0].astype(float) @ [0.2126, 0.7152, 0.0722]
    assert (np.diff(light) > -1).all() and light[-1] > light[0] + 50  # lighter is more


def test_comparison_marks_the_mask_and_nothing_else(image, masks):
    figure = draw.comparison([image], ["a star"], [masks[0]], {"one": [masks[1]], "other": [masks[2]]})
    axes = figure.axes
    assert [a.get_title() for a in axes] == ["image", "truth", "one", "other"]
    assert (axes[0].images[0].get_array() == image).all()
    for panel, mask, colour in zip(axes[1:], masks, (draw.TRUTH, *draw.COLOURS), strict=False):
        drawn = np.asarray(panel.images[0].get_array(), dtype=int)
        grey = (np.ptp(drawn, axis=2) == 0) & ~mask
        assert (grey == ~mask).all()
        assert (np.abs(drawn[mask] - np.array(colour)).max(axis=1) <= 0.25 * 255 + 1).all()
    shared, whole = masks[1] & masks[0], masks[1] | masks[0]
    assert axes[2].get_xlabel() == f"IoU {shared.sum() / whole.sum():.2f}"


@pytest.mark.parametrize("said", ["sign $_$ left", "a $5 bill and a $10 bill"])
def test_dollars_in_a_sentence_are_dollars(image, masks, said, tmp_path):
    figure = draw.comparison([image], [said], [masks[0]], {"a $_$ run": [masks[1]]})
    figure.savefig(tmp_path / "f.png")
    shown = [text for text in figure.findobj(Text) if said in " ".join(text.get_text().split())]
    assert shown and not any(text.get_parse_math() for text in shown)


def test_comparison_refuses_rows_that_do_not_match(image, masks):
    with pytest.raises(ValueError, match=r"got \[1, 2\] rows"):
        draw.comparison([image], ["a", "b"], masks[:1], {"one": masks[:1]})


def test_curated_cells_are_bright_and_the_others_dim(image, rng):
    curated = rng.random((3, 4, 5)) < 0.4
    figure = draw.curated_tokens(image, ["a", "b", "c"], curated)
    for axes, row in zip(figure.axes, curated, strict=True):
        drawn, keep = np.asarray(axes.images[0].get_array()), draw.spread(row, H, W)
        assert (drawn[keep] == image[keep]).all() and (drawn[~keep] <= 0.3 * image[~keep]).all()
        assert f"{row.sum()} of 20" in axes.get_title()


def test_maps_and_words_must_agree_in_number(image):
    for function in (draw.relevance, draw.curated_tokens):
        with pytest.raises(ValueError, match=r"2 words, maps have shape \(3, 4, 4\)"):
            function(image, ["a", "b"], np.zeros((3, 4, 4)))
    with pytest.raises(ValueError, match="neither"):
        draw.attention_to_words(image, ["a"], None, None)


# --------------------------------------------------------------------------------------------------- curves


def test_precision_recall_draws_the_curve_and_the_area_of_scoring(rng):
    metric = PrecisionRecall()
    for _ in range(4):
        truth = rng.random((16, 16)) < 0.3
        metric.update(np.clip(0.4 * truth + 0.6 * rng.random((16, 16)), 0, 1).astype(np.float32), truth)
    curve = metric.compute()
    figure = draw.precision_recall({"run": (curve.precision, curve.recall)})
    (line,) = figure.axes[0].lines
    x, y = line.get_data()
    assert (x[:-1] == curve.recall).all() and (y[:-1] == curve.precision).all() and x[-1] == 0
    assert line.get_drawstyle() == "steps-post"  # of falling recall: each precision until the next recall
    under = float(np.sum(y[:-1] * -np.diff(x)))
    assert under == pytest.approx(curve.area, abs=1e-12)
    assert draw.average_precision(curve.precision, curve.recall) == pytest.approx(curve.area, abs=1e-12)
    assert f"AUC {100 * curve.area:.1f} %" in figure.legends[0].get_texts()[0].get_text()


def test_score_by_ratio_draws_its_points_and_intervals_in_per_cent():
    series = {"a": ([0.1, 0.3], [0.5, 0.6], None), "b": ([0.2, 0.4], [0.4, 0.7], [0.1, 0.2])}
    axes = draw.score_by_ratio(series, chosen=0.3).axes[0]
    found = {c.get_label(): c for c in axes.containers}
    for name, (ratios, scores, _) in series.items():
        x, y = found[name].lines[0].get_data()
        assert np.allclose(x, 100 * np.array(ratios)) and np.allclose(y, 100 * np.array(scores))
    (bars,) = found["b"].lines[2]
    assert np.allclose([s[:, 1] for s in bars.get_segments()], [[30, 50], [50, 90]])
    assert any(np.allclose(line.get_xdata(), 30) for line in axes.lines)  # the trained r, marked


def test_root_alone_tells_where_the_data_set_of_a_run_is_now(tmp_path):
    """And not another one of that folder."""
    root = generate(GenerateConfig(root=tmp_path / "now", scenes="refcoco+", size=96, train=2, val=1, test=1))
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("data:\n  root: /gone\n  dataset: refcoco+\n  text: raw\n")
    for on_error in ("stop", "skip"):
        reader = data_of(run, DataConfig(root, on_error=on_error, workers=2))
        assert "refcoco+" in str(reader.source) and reader.text == "raw" and reader.on_error == on_error
    with pytest.raises(InputError, match="refcocog"):
        data_of(run, DataConfig(root, dataset="refcocog", split_by="umd"))


def test_log_is_read_as_far_as_it_goes(tmp_path):
    lines = [
        '{"step": 1, "total": 2.0, "mask": 1.5}',
        '{"step": 2, "total": null}',
        "null",
        '{"step": 3, "to',
    ]
    (tmp_path / "log.jsonl").write_text("\n".join(lines))
    steps, found = losses(log_of(tmp_path))
    assert steps.tolist() == [1, 2] and found["total"][0] == 2.0 and math.isnan(found["total"][1])
    axes = draw.training_curves(steps, found).axes[0]
    assert axes.lines[0].get_data()[1].tolist() == [2.0]


# ----------------------------------------------------------------------------------------------- embeddings


def _silhouette(x, labels):
    """Rousseeuw's mean of (b - a) / max(a, b), a pixel at a time, by cosine distance."""
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    distance, found = 1 - x @ x.T, []
    for i, label in enumerate(labels):
        own = labels == label
        if own.sum() == 1:
            found.append(0.0)
            continue
        a, b = distance[i, own].sum() / (own.sum() - 1), distance[i, ~own].mean()
        found.append((b - a) / max(a, b))
    return float(np.mean(found))


@pytest.mark.parametrize("apart", [0.0, 1.0, 10.0])
def test_silhouette_is_rousseeuws(rng, apart):
    target = np.arange(40) % 4 == 0
    x = rng.normal(size=(40, 6)) + apart * np.outer(target, [1, 0, 0, 0, 0, 0]) - apart * np.eye(6)[1]
    assert draw.silhouette(x, target) == pytest.approx(_silhouette(x, target), abs=1e-9)


def test_silhouette_of_one_kind_is_refused(rng):
    with pytest.raises(ValueError, match="0 of 5 pixels"):
        draw.silhouette(rng.normal(size=(5, 3)), np.zeros(5, bool))


def test_embedding_map_shows_every_point_and_sets_clusters_apart(rng):
    away = np.array([9, 0, 0, 0])
    pixels = np.concatenate([rng.normal(size=(30, 4)) + away, rng.normal(size=(20, 4)) - away])
    found = draw.Embeddings(
        pixels, np.arange(50) >= 30, rng.normal(size=(3, 4)) + away, rng.normal(size=(2, 4))
    )
    axes = draw.embedding_map({"run": found}).axes[0]
    dots = {c.get_label(): c.get_offsets() for c in axes.collections}
    assert {k: len(v) for k, v in dots.items()} == {"other pixels": 30, "target pixels": 20, "LE": 3, "VE": 2}
    assert f"silhouette {draw.silhouette(pixels, found.target):+.2f}" in axes.get_title()
    centre = {name: np.asarray(at).mean(axis=0) for name, at in dots.items()}
    near = np.linalg.norm(centre["LE"] - centre["other pixels"])
    assert near < np.linalg.norm(centre["LE"] - centre["target pixels"])
    assert (draw.positions(pixels, seed=1) == draw.positions(pixels, seed=1)).all()


# ------------------------------------------------------------------------------------ readable, for everybody


def _drawn(image, masks, rng):
    words, grid = ["[CLS]", "the", "yellowish", "triangle", "left", "of", "[SEP]"], rng.random((7, 4, 4))
    half = grid / grid.sum(axis=0) / 2
    long = "the large yellow triangle left of the small red square"
    sums = [half.sum(axis=0)] * 2
    curve = (np.linspace(0.2, 1, 50), np.linspace(1, 0, 50))
    cloud = draw.Embeddings(rng.normal(size=(30, 4)), np.arange(30) > 9, *rng.normal(size=(2, 3, 4)))
    return {
        "comparison": draw.comparison([image] * 2, [long, "star"], masks[:2], {"a run": masks[:2]}),
        "relevance": draw.relevance(image, words, grid, title=f"Relevance: {long}"),
        "one word": draw.relevance(image, words[:1], grid[:1]),
        "curated": draw.curated_tokens(image, words, grid > 0.5),
        "words": draw.attention_to_words(image, words, half, half),
        "sums": draw.attention_sums([image] * 2, [long, "star"], masks[:2], masks[:2], sums, sums),
        "embeddings": draw.embedding_map({"a": cloud, "b": cloud}, seed=0),
        "curves": draw.precision_recall({"a run": curve, "another run of it": curve}),
        "ratio": draw.score_by_ratio({"a": ([0.1, 0.8], [0.5, 0.6], None)}, chosen=0.1),
        "losses": draw.training_curves(np.arange(3), {"total": np.ones(3), "mask": np.ones(3)}),
    }


def test_every_figure_can_be_read_at_the_width_of_a_column(image, masks, rng):
    for name, figure in _drawn(image, masks, rng).items():
        assert figure.get_size_inches()[0] <= draw.PAGE + 1e-6, name
        for text in texts(figure):
            assert text.get_fontsize() >= 6, f"{name}: {text.get_text()!r} is too small"
        box, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
        inside = min(box.x0, box.y0) > -0.02 and box.x1 < width + 0.02 and box.y1 < height + 0.02
        assert inside, f"{name}: {box} leaves the page of {width} x {height} inches"
        labelled = [a for a in figure.axes if a.lines]
        assert all(a.get_xlabel() and a.get_ylabel() and a.get_title() for a in labelled), name
        assert figure.get_suptitle() or labelled, f"{name} has no title"


def test_names_of_many_runs_cover_nothing(image, masks, rng):
    names = [f"runs/refcoco-plus-with-some-change/{seed}" for seed in range(6)]
    curve = (np.linspace(0.2, 1, 50), np.linspace(1, 0, 50))
    cloud = draw.Embeddings(rng.normal(size=(30, 4)), np.arange(30) > 9, *rng.normal(size=(2, 3, 4)))
    means = ", ".join(["+0.12"] * 6)
    for figure in (
        draw.precision_recall(dict.fromkeys(names, curve), title="Precision and recall (testA, 1500 images)"),
        draw.embedding_map(dict.fromkeys(names, cloud), title=f"Over 1500 images\nmean silhouette {means}"),
        draw.comparison([image], ["a star"], masks[:1], dict.fromkeys(names, masks[:1])),
    ):
        boxes = [(t.get_text(), t.get_window_extent()) for t in texts(figure)]
        whole = figure.bbox
        for i, (text, box) in enumerate(boxes):
            assert box.x0 >= whole.x0 and box.x1 <= whole.x1, f"{text!r} leaves the figure"
            for other, over in boxes[:i]:
                apart = box.x0 >= over.x1 or over.x0 >= box.x1 or box.y0 >= over.y1 or over.y0 >= box.y1
                assert apart, f"{text!r} covers {other!r}"
        if figure.legends:
            frame = figure.legends[0].get_window_extent()
            assert all(frame.y1 <= axes.get_window_extent().y0 for axes in figure.axes)


def _as_seen(colour, kind):
    """A colour as a dichromat sees it (Viénot, Brettel and Mollon, 1999), in linear RGB."""
    linear = (np.asarray(colour) / 255) ** 2.2
    to_lms = np.array(
        [[17.8824, 43.5161, 4.11935], [3.45565, 27.1554, 3.86714], [0.0299566, 0.184309, 1.46709]]
    )
    lost = {
        "protan": np.array([[0, 2.02344, -2.52581], [0, 1, 0], [0, 0, 1]]),
        "deutan": np.array([[1, 0, 0], [0.494207, 0, 1.24827], [0, 0, 1]]),
    }[kind]
    return np.clip(np.linalg.inv(to_lms) @ lost @ to_lms @ linear, 0, 1) ** (1 / 2.2)


@pytest.mark.parametrize("kind", ["protan", "deutan"])
def test_colours_differ_for_colour_blind_readers(kind):
    seen = [_as_seen(colour, kind) for colour in (draw.TRUTH, *draw.COLOURS)]
    apart = [np.linalg.norm(a - b) for i, a in enumerate(seen) for b in seen[:i]]
    assert min(apart) > 0.1  # pure red and a green of its lightness: under 0.05


def test_saved_figures_are_the_same_bytes_each_time(tmp_path):
    figure = lambda: draw.score_by_ratio({"a": ([0.1, 0.8], [0.5, 0.6], None)})
    first, second = (draw.save(figure(), tmp_path / name / "x") for name in "ab")
    assert [p.suffix for p in first] == [".png", ".pdf"]
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(first, second, strict=True))


def test_figures_need_neither_torch_nor_a_model():
    probe = "import sys, reference_model.figures; print({'torch', 'transformers', 'timm'} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"


# ------------------------------------------------------------------------------------------- out of a model


def test_explanation_is_what_the_model_says(checkpoint, group):
    sentences = ["the large red star", group[0].expression]
    encoded = encode(checkpoint, image_of(group[0]))
    found = explain(checkpoint, encoded, sentences)
    for sentence, one in zip(sentences, found, strict=True):
        (alone,) = explain(checkpoint, encoded, [sentence])
        assert one.tokens == alone.tokens and one.tokens[0] == "[CLS]" and "[PAD]" not in one.tokens
        torch.testing.assert_close(one.logits, alone.logits, atol=1e-4, rtol=1e-4)
        assert (one.curated.sum(axis=(1, 2)) == max(1, math.floor(0.3 * one.curated[0].size + 0.5))).all()
        for language, visual in zip(one.to_language, one.to_visual, strict=True):
            total = language.sum(axis=0) + visual.sum(axis=0)
            assert np.abs(total - 1).max() < 1e-5  # padding gets none of a pixel's attention
            assert len(language) == len(visual) == len(one.tokens)


def test_another_ratio_is_that_of_a_model_built_with_it(checkpoint, small, group):
    encoded, sentence = encode(checkpoint, image_of(group[0])), [group[0].expression]
    before = explain(checkpoint, encoded, sentence)[0]
    (live,) = explain(checkpoint, encoded, sentence, ratio=0.6)
    built = build_metris(replace(checkpoint.config, ratio=0.6)).eval()
    built.load_state_dict(checkpoint.model.state_dict())
    (expected,) = explain(replace(checkpoint, model=built), encoded, sentence)
    assert torch.equal(live.logits, expected.logits) and (live.curated == expected.curated).all()
    after = explain(checkpoint, encoded, sentence)[0]
    assert torch.equal(before.logits, after.logits) and not torch.equal(before.logits, live.logits)
    shared = with_ratio(checkpoint.model, 0.6)
    assert {p.data_ptr() for p in shared.parameters()} == {
        p.data_ptr() for p in checkpoint.model.parameters()
    }
    assert not shared.training


def test_every_ratio_is_scored_as_evaluation_scores_it(bold_run):
    checkpoint, groups = load_checkpoint(bold_run), spaced_images(data_of(bold_run, None), "val", 4)
    found = sweep(checkpoint, groups, (0.1, 1.0))
    sizes = {"image_size": checkpoint.config.image_size, "max_tokens": checkpoint.config.max_tokens}
    for ratio, scores in found.scores.items():
        model = with_ratio(checkpoint.model, ratio)
        expected = Evaluator().score(
            MetrisPredictor(model, checkpoint.tokenizer, **sizes),
            [record for group in groups for record in group],
        )
        assert scores == pytest.approx(expected, abs=1e-6)
    assert len({scores["oIoU"] for scores in found.scores.values()}) == 3


def test_maps_of_a_padded_image_are_cut_to_it():
    """Three cells of 32 pixels cover an image of 80: each pixel has its own cell's value."""
    maps = torch.arange(9.0).reshape(1, 3, 3)
    cut = _within(maps, (96, 96), (80, 80))
    assert cut.shape == (1, 80, 80)
    assert all(cut[0, y, x] == maps[0, y // 32, x // 32] for y in range(0, 80, 7) for x in range(0, 80, 7))
    assert _within(maps, (96, 96), (96, 96)) is maps


@pytest.mark.parametrize("ratio", [0.0, -0.1, 30, float("nan")])
def test_ratio_out_of_range_is_refused(checkpoint, ratio):
    with pytest.raises(InputError, match=r"30 per cent is 0\.3"):
        with_ratio(checkpoint.model, ratio)


def test_words_that_were_never_learnt_are_named(checkpoint):
    known = next(word for word in checkpoint.tokenizer.get_vocab() if word.isalpha() and len(word) > 3)
    assert unknown_words(checkpoint, f"{known} zeppelin") == ["zeppelin"]


def test_embeddings_meet_as_the_attention_has_them(checkpoint, group):
    """Queries of pixels and keys of tokens give the attention back, head by head."""
    record = group[0]
    encoded = encode(checkpoint, image_of(record))
    truth = np.zeros((16, 16), bool)
    truth[:8] = True
    found = embeddings(checkpoint, encoded, record.expression, truth)
    (one,) = explain(checkpoint, encoded, [record.expression])
    l, heads = len(one.tokens), checkpoint.model.decoder.stages[-1].attention.num_heads
    assert len(found.pixels) == 256 and found.target.sum() == 128  # the finest grid, 16 x 16
    split = lambda x: x.reshape(len(x), heads, -1).transpose(1, 0, 2)
    q, k = split(found.pixels), split(np.concatenate([found.language, found.visual]))
    weights = np.exp(q @ k.transpose(0, 2, 1) / math.sqrt(q.shape[-1]))
    weights = (weights / weights.sum(axis=-1, keepdims=True)).mean(axis=0)
    assert np.abs(weights[:, :l].T - one.to_language[-1].reshape(l, -1)).max() < 1e-5
    assert embeddings(checkpoint, encoded, record.expression, np.ones((16, 16), bool)) is None


def test_trained_ratios_are_means_with_students_interval(tmp_path):
    path = tmp_path / "table-fig6.csv"
    rows = ["ratio_0.1,0,val,0,0.50", "ratio_0.1,1,val,0,0.60", "ratio_0.1,2,val,0,0.40", "full,0,val,0,0.9"]
    rows += ["ratio_0.3,0,val,0,0.7", "ratio_0.3,1,val,0,0.7", "ratio_0.3,2,val,0,0.7"]
    path.write_text("\n".join(["row,seed,split,mIoU,oIoU", *rows, "ratio_0.1,0,testA,0,0.1"]))
    ratios, scores, halves = trained(path, "val")
    assert ratios == [0.1, 0.3] and scores == pytest.approx([0.5, 0.7])
    assert halves == pytest.approx([4.302653 * 0.1 / math.sqrt(3), 0.0], abs=1e-5)  # t of 2 degrees, 95 %
    with pytest.raises(InputError, match="no row ratio_"):
        trained(path, "testB")


def test_figures_of_a_run_have_the_scores_of_evaluate(bold_run, scenes, tmp_path, capsys):
    other = shutil.copytree(bold_run, tmp_path / "another")
    arguments = [
        "--checkpoint",
        bold_run,
        "--against",
        other,
        "--ratios",
        "0.3,0.9",
        "--count",
        2,
        "--out",
        tmp_path / "drawn",
        "--json",
    ]
    assert main(["figures", *map(str, arguments)]) == 0
    found = json.loads(capsys.readouterr().out)
    scored = evaluate(EvaluateConfig(DataConfig(root=scenes), bold_run, out=tmp_path / "m.json", json=True))
    name, twin = found["oIoU"]
    assert (name, twin) == ("bold", "another") and found["images"] == 6
    for numbers in ("oIoU", "AUC-PR", "silhouette"):  # the same weights, so the same curve
        assert found[numbers][name] == found[numbers][twin]
    assert found["oIoU"][name] == pytest.approx(scored["val"]["METRIS"]["oIoU"], abs=1e-9)
    # Other batches round otherwise: a pixel may fall into the next of 1,001 bins.
    assert found["AUC-PR"][name] == pytest.approx(scored["val"]["METRIS"]["AUC-PR"], rel=1e-5)
    assert found["oIoU by r"]["0.3"] == found["oIoU"][name] and set(found["oIoU by r"]) == {"0.3", "0.9"}
    wanted = {f"{stem}.{kind}" for stem in STEMS for kind in ("png", "pdf")}
    assert {Path(path).name for path in found["files"]} == wanted
    assert all(Path(path).stat().st_size > 1000 for path in found["files"])


@pytest.fixture
def quick(monkeypatch):
    """A t-SNE of few pixels, and figures that are drawn but whose files are left empty: both take seconds."""

    def save(figure, stem):
        stem.parent.mkdir(parents=True, exist_ok=True)
        paths = (stem.with_suffix(".png"), stem.with_suffix(".pdf"))
        for path in paths:
            path.touch()
        return paths

    monkeypatch.setattr(draw, "save", save)
    monkeypatch.setattr(run_figures, "_PIXELS", 8)


def drawn_by(folder, out, capsys, *more):
    arguments = [
        "--checkpoint",
        folder,
        "--ratios",
        "0.9",
        "--count",
        2,
        "--limit",
        2,
        "--out",
        out,
        "--json",
    ]
    assert main(["figures", *map(str, [*arguments, *more])]) == 0
    caught = capsys.readouterr()
    found = json.loads(caught.out)
    assert {Path(path) for path in found["files"]} == set(out.iterdir())
    return found, {Path(path).stem for path in found["files"]}


@pytest.mark.parametrize(
    ("changes", "lacks"),
    [
        ({"guidance": "enhanced_le"}, {"relevance", "curated", "attention", "ratio"}),
        (
            {"guidance": "enhanced_le+pixels", "no_target": True},
            {"relevance", "curated", "attention", "ratio"},
        ),
        ({"guidance": "ve"}, {"attention"}),
    ],
)
@pytest.mark.usefixtures("quick")
def test_figure_that_does_not_apply_is_left_out_in_one_line(changes, lacks, variant, tmp_path, capsys):
    folder = variant("other", **changes)
    with pytest.warns(UserWarning, match="not drawn") as caught:
        found, stems = drawn_by(folder, tmp_path / "f", capsys)
    assert set(found["not drawn"]) == lacks and stems | lacks == set(STEMS) and not stems & lacks
    told = [str(w.message) for w in caught if "not drawn" in str(w.message)]
    assert sorted(line.split(":")[0] for line in told) == sorted(lacks) and not any("\n" in x for x in told)
    curates = "ratio" not in lacks
    assert bool(found["oIoU by r"]) == curates


def test_words_that_curate_nothing_have_no_ve_token_to_draw(variant, group):
    for cues, kept in (("global", lambda tokens: tokens[:1]), ("local", lambda tokens: tokens[1:])):
        checkpoint = load_checkpoint(variant("cues", cues=cues))
        encoded = encode(checkpoint, image_of(group[0]))
        (one,) = explain(checkpoint, encoded, [group[0].expression])
        truth = np.zeros((16, 16), bool)
        truth[:8] = True
        found = embeddings(checkpoint, encoded, group[0].expression, truth)
        assert one.visual_tokens == kept(one.tokens) and len(found.language) == len(one.tokens)
        assert len(found.visual) == len(one.visual_tokens) == len(one.to_visual[-1])
        shown = draw.attention_to_words(
            np.zeros((9, 9, 3), np.uint8),
            one.tokens,
            one.to_language[-1],
            one.to_visual[-1],
            visual_words=one.visual_tokens,
        )
        titles = [axes.get_title().rsplit(":", 1)[0] for axes in shown.axes]
        assert [t[3:] for t in titles if t.startswith("VE ")] == one.visual_tokens
        # What is left out got no attention: the shares of the others add up to 1.
        total = one.to_language[-1].sum(axis=0) + one.to_visual[-1].sum(axis=0)
        assert np.abs(total - 1).max() < 1e-5


@pytest.mark.usefixtures("quick")
def test_targets_that_cover_no_cell_cost_the_t_sne_alone(bold_run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(run_figures, "embeddings", lambda *_, **__: None)
    with pytest.warns(UserWarning, match="embeddings: not drawn, no target covers a cell"):
        found, stems = drawn_by(bold_run, tmp_path / "f", capsys)
    assert stems == set(STEMS) - {"embeddings"} and set(found["silhouette"].values()) == {None}
    assert "no target covers" in found["not drawn"]["embeddings"]
    assert re.search(r"bold +[\d.]+ +[\d.]+ +-\n", run_figures._text(found))


@pytest.fixture
def damaged(scenes, tmp_path):
    """The data set with one image of val that cannot be decoded, and how many sentences are about it."""
    root = shutil.copytree(scenes, tmp_path / "damaged")
    first, *_ = groups = spaced_images(read(DataConfig(root)), "val", 100)
    first[0].image.write_bytes(b"no image")
    return root, len(first), sum(map(len, groups))


@pytest.mark.usefixtures("quick")
def test_broken_image_stops_figures_or_is_left_out_and_counted(bold_run, damaged, tmp_path, capsys):
    root, gone, whole = damaged
    given = ["figures", "--checkpoint", str(bold_run), "--data.root", str(root), "--out", str(tmp_path / "f")]
    assert main(given) == 2
    assert "not an image of a known kind" in capsys.readouterr().err and not (tmp_path / "f").exists()
    skip = [*given, "--data.on_error", "skip", "--ratios", "0.3", "--count", "1", "--json"]
    with pytest.warns(UserWarning, match=f"; {gone} of {whole} sentences left out"):
        assert main(skip) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["sentences left out"] == gone and found["images"] == 5
    for path in (root / "images" / "train2014").glob("*.jpg"):
        path.write_bytes(b"no image")
    assert main(skip) == 2
    assert f"none of {whole} sentences can be used" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "value", "says"),
    [
        ("--limit", "0", "limit: must be >= 1, got 0"),
        ("--ratios", "0.1,30", "ratios: each must be in (0, 1], got 30"),
        ("--ratios", "few", "expected numbers such as 0.1,0.3,0.5"),
        ("--count", "40", "count: must be in [1, 12], got 40"),
        ("--split", "vall", "did you mean 'val'?"),
        ("--against", "nowhere", "nowhere"),
    ],
)
def test_mistakes_are_one_line(option, value, says, run, tmp_path, capsys):
    arguments = ["--checkpoint", str(run), "--out", str(tmp_path / "f"), option, value]
    assert main(["figures", *arguments]) == 2
    err = capsys.readouterr().err
    assert says in err and err.count("\n") == 1 and not (tmp_path / "f").exists()
