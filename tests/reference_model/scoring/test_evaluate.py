"""One evaluator for checkpoints, callables and files: the same sentences, the same masks, the same scores."""

import json
import pickle
import shutil
import sys
from dataclasses import replace
from itertools import groupby
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask

from reference_model.checkpoints.checkpoint import load_checkpoint
from reference_model.cli import main
from reference_model.data.config import ConvertConfig, DataConfig
from reference_model.data.convert import convert
from reference_model.data.datasets import read
from reference_model.data.images import open_image
from reference_model.data.readers.shards import ShardWriter
from reference_model.data.records import segmentation_mask
from reference_model.files import InputError
from reference_model.model.metris import METRIS
from reference_model.scoring import evaluator as evaluator_module
from reference_model.scoring import predictors
from reference_model.scoring.config import EvaluateConfig
from reference_model.scoring.evaluate import evaluate
from reference_model.scoring.evaluator import Evaluator, ImageGroups
from reference_model.scoring.metris_predictor import MetrisPredictor
from reference_model.scoring.predictors import CallablePredictor
from reference_model.scoring.protocols import PROTOCOLS
from reference_model.synthetic.config import GenerateConfig
from reference_model.synthetic.generate import generate
from reference_model.training.train import train
from tests.reference_model.training.test_distributed import on_processes

KINDS = ("checkpoint", "model", "predictions")


@pytest.fixture(scope="module")
def data(scenes):
    return DataConfig(root=scenes)


@pytest.fixture(scope="module")
def any_data(tmp_path_factory):
    root = tmp_path_factory.mktemp("any") / "data"
    generate(GenerateConfig(root=root, size=64, train=8, val=8, test=2, seed=5, targets="any"))
    return DataConfig(root=root, dataset="grefcoco")


@pytest.fixture(scope="module")
def any_run(run_config, any_data, tmp_path_factory):
    out = tmp_path_factory.mktemp("any_runs") / "run"
    return train(
        replace(run_config, data=any_data, model=replace(run_config.model, no_target=True), out=out, steps=2)
    )


def answers(folder, data):
    checkpoint = load_checkpoint(folder)
    predictor = MetrisPredictor(checkpoint.model, checkpoint.tokenizer, 64, 20)
    return [answer for _, answer in predictor(ImageGroups(read(data).records("val")))]


@pytest.fixture(scope="module")
def threshold(run, data):
    """Where the few steps of training leave half of the pixels inside, so that masks have shapes."""
    return float(torch.stack([answer.mask.sigmoid() for answer in answers(run, data)]).median())


@pytest.fixture(scope="module")
def middles(any_run, any_data):
    """As `threshold`, and half of the masks withdrawn."""
    found = answers(any_run, any_data)
    masks = float(torch.stack([answer.mask.sigmoid() for answer in found]).median())
    return {"threshold": masks, "no_target_threshold": float(np.median([a.no_target for a in found]))}


def scores_of(config):
    """The scores of one prediction on one split."""
    ((_, by_name),) = evaluate(config).items()
    ((_, scores),) = by_name.items()
    return scores


def numbers(scores):
    """Without what says how they came about, and without what only probabilities give."""
    return {key: value for key, value in scores.items() if isinstance(value, int | float) and key != "AUC-PR"}


def module_with(monkeypatch, **functions):
    monkeypatch.setitem(sys.modules, "my_models", SimpleNamespace(**functions))
    return "my_models:{}".format


# ---- the same scores, whatever is scored --------------------------------------------------------


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_results_scored_again_give_the_same_scores(any_run, any_data, middles, tmp_path, protocol):
    results, again = tmp_path / "results.jsonl", tmp_path / "again.jsonl"
    usual = {
        "protocol": protocol,
        "splits": "val, testA",
        "no_target_threshold": middles["no_target_threshold"],
    }
    cut = {"threshold": middles["threshold"], "out": tmp_path / "m.json"}
    first = evaluate(EvaluateConfig(any_data, any_run, results=results, **cut, **usual))
    second = evaluate(EvaluateConfig(any_data, predictions=results, results=again, **usual))
    for split in ("val", "testA"):
        assert numbers(first[split]["METRIS"]) == numbers(second[split]["results.jsonl"])
        assert "AUC-PR" in first[split]["METRIS"] and "AUC-PR" not in second[split]["results.jsonl"]
    assert results.read_text() == again.read_text()


# pycocotools itself calls NumPy as NumPy 1 was called.
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_lines_of_results_hold_what_was_predicted_and_found(any_run, any_data, middles, tmp_path):
    results = tmp_path / "results.jsonl"
    config = EvaluateConfig(any_data, any_run, results=results, out=tmp_path / "m.json", **middles)
    scores = scores_of(config)
    rows = {row["sent_id"]: row for row in map(json.loads, results.read_text().splitlines())}
    records, ious = read(any_data).records("val"), []
    assert rows.keys() == {record.sent_id for record in records} and len(rows) == scores["count"]
    for record in records:
        row = rows[record.sent_id]
        for key in ("ref_id", "image_id", "split", "expression"):
            assert row[key] == getattr(record, key)
        assert row["category_id"] == list(record.category_id) and row["protocol"] == "metris"
        mask = coco_mask.decode(row["mask"]).astype(bool) & (
            row["no_target"] <= middles["no_target_threshold"]
        )
        truth = record.mask()
        assert row["intersection"] == (mask & truth).sum() and row["union"] == (mask | truth).sum()
        assert row["truth_area"] == truth.sum() and row["target"] == (not record.no_target)
        assert row["answered"] == mask.any()
        ious.append(row["intersection"] / row["union"] if row["union"] else 0.0)
        assert row["iou"] == ious[-1]
    assert scores["mIoU"] == pytest.approx(np.mean(ious), abs=1e-12)


@pytest.mark.parametrize("protocol", ["lavt", "rela"])
def test_square_protocols_compare_masks_of_480_by_480(run, data, tmp_path, protocol):
    results = tmp_path / "results.jsonl"
    evaluate(EvaluateConfig(data, run, results=results, protocol=protocol, out=tmp_path / "m.json"))
    assert {tuple(json.loads(line)["mask"]["size"]) for line in results.open()} == {(480, 480)}


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_model_is_scored_alike_as_checkpoint_and_as_callable(
    run, data, threshold, tmp_path, monkeypatch, protocol
):
    checkpoint = load_checkpoint(run)

    def masks(image, sentences):
        size, masks = checkpoint.config.image_size, []
        found = MetrisPredictor(checkpoint.model, checkpoint.tokenizer, size, 20)
        record = SimpleNamespace(image=tmp_path / "i.png", height=image.height, width=image.width)
        image.save(record.image)
        record.image_name, record.image_id = "i", 0
        for sentence in sentences:
            alone = SimpleNamespace(**vars(record), expression=sentence)
            ((_, answer),) = found([[alone]])
            masks.append(answer.mask.sigmoid())
        return masks

    name = module_with(monkeypatch, masks=masks)("masks")
    usual = {"protocol": protocol, "threshold": threshold}
    direct = scores_of(EvaluateConfig(data, run, out=tmp_path / "m.json", **usual))
    other = scores_of(EvaluateConfig(data, model=name, **usual))
    assert numbers(other) == pytest.approx(numbers(direct), abs=2e-3)
    assert other["AUC-PR"] == pytest.approx(direct["AUC-PR"], abs=2e-3)


def test_true_masks_score_full_marks_in_every_form(data, tmp_path, monkeypatch):
    records = read(data).records("val")
    pixels = lambda record: np.asarray(Image.open(record.image).convert("RGB")).tobytes()
    by_sentence = {(pixels(record), record.expression): record.mask() for record in records}
    assert all((by_sentence[pixels(r), r.expression] == r.mask()).all() for r in records)  # no sentence twice
    true_masks = lambda image, sentences: [by_sentence[image.tobytes(), s] for s in sentences]
    name = module_with(
        monkeypatch,
        masks=true_masks,
        stacked=lambda *args: np.stack(true_masks(*args)),
        tensors=lambda *args: torch.from_numpy(np.stack(true_masks(*args))).requires_grad_(False),
        probabilities=lambda *args: [torch.from_numpy(mask).half() for mask in true_masks(*args)],
    )
    for form in ("masks", "stacked", "tensors", "probabilities"):
        scores = scores_of(EvaluateConfig(data, model=name(form)))
        assert scores["mIoU"] == scores["oIoU"] == scores["P@0.9"] == 1
        assert scores.get("AUC-PR") == (1 if form == "probabilities" else None)


def test_masks_from_png_and_from_run_lengths_of_other_programs(data, tmp_path):
    records, lines = read(data).records("val"), []
    for number, record in enumerate(records):
        mask = record.mask()
        if number % 3 == 0:
            Image.fromarray(mask.astype(np.uint8) * 255).save(tmp_path / f"{number}.png")
            given = f"{number}.png"
        elif number % 3 == 1:
            given = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
            given["counts"] = given["counts"].decode()
        else:
            flat = mask.T.ravel()
            edges = np.flatnonzero(np.diff(np.concatenate([[False], flat])))
            counts = np.diff(np.concatenate([[0], edges, [flat.size]])).tolist()
            given = {"size": list(mask.shape), "counts": counts}
        lines.append({"sent_id": record.sent_id, "mask": given})
    file = tmp_path / "p.jsonl"
    file.write_text("\n\n".join(map(json.dumps, lines[::-1])))
    scores = scores_of(EvaluateConfig(data, predictions=file))
    assert (scores["mIoU"], scores["count"]) == (1, len(records))


def test_clipseg_is_scored_by_one_command(data, tmp_path, capsys):
    out, results = tmp_path / "m.json", tmp_path / "r.jsonl"
    name = "tests.support.clipseg_model:segment"
    arguments = ["--data.root", str(data.root), "--model", name, "--out", str(out), "--results", str(results)]
    assert main(["evaluate", *arguments, "--protocol", "cris", "--intervals", "--breakdowns"]) == 0
    assert name in capsys.readouterr().out
    scores = json.loads(out.read_text())["val"][name]
    from tests.support import clipseg_model

    ious = []
    for record in read(data).records("val"):
        with torch.inference_mode():
            (found,) = clipseg_model.segment(Image.open(record.image), [record.expression])
        size = (record.height, record.width)
        found = torch.nn.functional.interpolate(found[None, None], size, mode="bicubic")[0, 0] > 0.35
        truth = torch.from_numpy(record.mask())
        ious.append(((found & truth).sum() / ((found | truth).sum() + 1e-6)).item())
    assert scores["mIoU"] == pytest.approx(np.mean(ious), abs=1e-3)
    assert 0 < scores["AUC-PR"] < 1 and scores["evaluation"]["model"] == name
    assert len(results.read_text().splitlines()) == scores["count"] == len(ious)


# ---- images once, records as they come ----------------------------------------------------------


def test_an_image_is_encoded_once_and_a_true_mask_filled_once(run, data, monkeypatch):
    encoded, filled = [], []
    encode, fill = METRIS.encode_image, evaluator_module.truth_of
    monkeypatch.setattr(METRIS, "encode_image", lambda self, x: encoded.append(len(x)) or encode(self, x))
    monkeypatch.setattr(evaluator_module, "truth_of", lambda r, p: filled.append(r) or fill(r, p))
    checkpoint, records = load_checkpoint(run), read(data).records("val")
    images = {record.image_id for record in records}
    most = max(sum(r.image_id == image for r in records) for image in images)
    predictor = MetrisPredictor(checkpoint.model, checkpoint.tokenizer, 64, 20, batch_size=most + 1)
    assert Evaluator().score(predictor, records)["count"] == len(records)
    assert sum(encoded) == len(images) < len(records)
    assert len(filled) == len({(r.image_id, r.ann_id) for r in records}) < len(records)


@pytest.mark.parametrize("batch_size", [1, 3, 1000])
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_and_workers_change_no_answer(run, data, batch_size, workers):
    checkpoint, records = load_checkpoint(run), read(data).records("val")
    usual = MetrisPredictor(checkpoint.model, checkpoint.tokenizer, 64, 20)
    groups = list(ImageGroups(records))
    expected = list(usual(groups))
    found = list(replace(usual, batch_size=batch_size, workers=workers)(groups))
    assert [r.sent_id for r, _ in found] == [r.sent_id for group in groups for r in group]
    for (record, answer), (same, right) in zip(found, expected, strict=True):
        assert record.sent_id == same.sent_id
        torch.testing.assert_close(answer.mask, right.mask, atol=1e-4, rtol=1e-4)


def test_model_trains_on_as_before_once_it_was_scored(run, data):
    checkpoint, records = load_checkpoint(run), read(data).records("val")[:3]
    predictor = MetrisPredictor(checkpoint.model.train(), checkpoint.tokenizer, 64, 20)
    before = torch.get_rng_state()
    Evaluator().score(predictor, records)
    assert checkpoint.model.training and torch.equal(torch.get_rng_state(), before)
    checkpoint.model.eval()
    Evaluator().score(predictor, records)
    assert not checkpoint.model.training


def test_a_stream_is_never_held(data):
    """Records, with the images in them, come as they are asked for: one image ahead at most."""
    records = sorted(read(data).records("train"), key=lambda record: record.image_id)
    sizes = [len(list(group)) for _, group in groupby(records, key=lambda record: record.image_id)]
    taken, ahead, answered = [], [], []
    stream = (taken.append(record) or record for record in records)

    def masks(image, sentences):
        answered.extend(sentences)
        ahead.append(len(taken) - len(answered))
        return np.zeros((len(sentences), 5, 5), bool)

    scores = Evaluator().score(CallablePredictor(masks, "it"), stream)
    assert scores["count"] == len(records) and max(ahead) <= 1 < max(sizes)


def test_listed_and_streamed_records_score_alike(run, data):
    checkpoint, records = load_checkpoint(run), read(data).records("val")
    predictor = MetrisPredictor(checkpoint.model, checkpoint.tokenizer, 64, 20, batch_size=4)
    in_order = sorted(records, key=lambda record: (record.image_id, record.ref_id))
    listed = Evaluator().score(predictor, records[::-1])
    assert Evaluator().score(predictor, iter(in_order)) == pytest.approx(listed, abs=1e-6)


@pytest.mark.parametrize("workers", [0, 2])
def test_shards_are_scored_like_the_data_they_were_made_of(run, data, threshold, tmp_path, workers):
    convert(ConvertConfig(data, out=tmp_path / "shards", splits="val"))
    sharded = DataConfig(root=tmp_path / "shards", workers=workers)
    usual = {"threshold": threshold, "batch_size": 5, "out": tmp_path / "m.json"}
    found = scores_of(EvaluateConfig(sharded, run, **usual))
    expected = scores_of(EvaluateConfig(data, run, **usual))
    assert numbers(found) == pytest.approx(numbers(expected), abs=1e-4)
    assert found["evaluation"]["dataset"] == "refcoco" and found["evaluation"]["split_by"] == "unc"
    with pytest.raises(InputError, match="no split 'vall'; did you mean 'val'"):
        evaluate(EvaluateConfig(sharded, run, splits="vall"))


# ---- what is written ----------------------------------------------------------------------------


def test_metrics_say_what_was_scored_and_how(run, data, tmp_path):
    out = tmp_path / "m.json"
    evaluate(EvaluateConfig(data, run, protocol="cris", no_target_threshold=0.4, out=out))
    said = json.loads(out.read_text())["val"]["METRIS"]["evaluation"]
    assert said.pop("data").endswith("refcoco/refs(unc).p") and said.pop("checkpoint") == str(run)
    expected = {"dataset": "refcoco", "split_by": "unc", "generated": True, "protocol": "cris"}
    expected |= {"threshold": 0.35, "no_target_threshold": 0.4, "sentences": "all", "left_out": 0}
    assert said == expected


def test_first_sentences_are_one_of_each_object(run, data, tmp_path):
    found = scores_of(EvaluateConfig(data, run, sentences="first", out=tmp_path / "m.json"))
    objects = {record.ref_id for record in read(data).records("val")}
    assert found["count"] == len(objects) < len(read(data).records("val"))
    assert found["evaluation"]["sentences"] == "first"


def test_curve_is_written_beside_and_its_area_is_the_score(run, data, tmp_path):
    scores = scores_of(EvaluateConfig(data, run, out=tmp_path / "m.json"))
    curve = json.loads((tmp_path / "m_curves.json").read_text())["val"]
    recall, precision = np.array(curve["recall"]), np.array(curve["precision"])
    assert len(recall) == len(precision) == len(curve["thresholds"]) == 1001
    steps = recall - np.append(recall[1:], 0)
    assert scores["AUC-PR"] == pytest.approx((steps * precision).sum(), abs=1e-4)
    records, checkpoint = read(data).records("val"), load_checkpoint(run)
    for step in (300, 700):
        right = predicted = true = 0
        for record in records:
            image = Image.open(record.image).convert("RGB")
            (mask,) = checkpoint.predict(image, [record.expression], threshold=step / 1000)
            truth = record.mask()
            right, predicted = right + (mask & truth).sum(), predicted + mask.sum()
            true += truth.sum()
        assert recall[step] == pytest.approx(right / true, abs=2e-3)
        assert precision[step] == pytest.approx(right / predicted if predicted else 1, abs=2e-2)


def test_breakdowns_part_the_sentences_and_average_to_the_whole(any_run, any_data, middles, tmp_path):
    config = EvaluateConfig(any_data, any_run, breakdowns=True, out=tmp_path / "m.json", **middles)
    scores, records = scores_of(config), read(any_data).records("val")
    lengths = scores["by length"]
    assert sum(of["count"] for of in lengths.values()) == scores["count"]
    for key in ("mIoU", "gIoU"):
        mean = sum(of["count"] * of.get(key, of["mIoU"]) for of in lengths.values()) / scores["count"]
        assert mean == pytest.approx(scores[key], abs=1e-12)
    words = [len(record.expression.split()) for record in records]
    expected = {
        "1-2 words": sum(n <= 2 for n in words),
        "3-5 words": sum(3 <= n <= 5 for n in words),
        "6-8 words": sum(6 <= n <= 8 for n in words),
        "9 words or more": sum(n >= 9 for n in words),
    }
    assert {name: of["count"] for name, of in lengths.items()} == {k: v for k, v in expected.items() if v}
    names = read(any_data).categories
    found = {name: of["count"] for name, of in scores["by category"].items()}
    assert found.pop("no target") == sum(record.no_target for record in records)
    for name, count in found.items():
        assert count == sum(name in {names[id] for id in record.category_id} for record in records)
    assert list(found.values()) == sorted(found.values(), reverse=True)


def test_intervals_are_those_of_drawing_images(any_run, any_data, middles, tmp_path):
    results, out = tmp_path / "r.jsonl", tmp_path / "m.json"
    config = EvaluateConfig(any_data, any_run, intervals=True, results=results, out=out, **middles)
    found = scores_of(config)
    assert scores_of(config) == found  # seeded
    assert found["intervals"].keys() == numbers(found).keys() - {"count"}
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    images = sorted({row["image_id"] for row in rows})
    column = lambda value: np.array(
        [sum(value(row) for row in rows if row["image_id"] == image) for image in images]
    )
    drawn = np.random.default_rng(0).integers(len(images), size=(10_000, len(images)))
    total = lambda value: column(value)[drawn].sum(axis=1)
    for key, part, whole in (
        ("mIoU", lambda row: row["iou"], lambda row: 1),
        ("oIoU", lambda row: row["intersection"], lambda row: row["union"]),
        ("T-acc", lambda row: row["target"] and row["answered"], lambda row: row["target"]),
    ):
        expected = np.quantile(total(part) / total(whole), [0.025, 0.975])
        assert found["intervals"][key] == pytest.approx(expected, abs=1e-9)
        assert expected[0] < found[key] < expected[1]


def test_out_is_nowhere_without_a_checkpoint_unless_it_is_named(data, tmp_path, monkeypatch, capsys):
    name = module_with(monkeypatch, masks=lambda image, s: np.zeros((len(s), 4, 4)))("masks")
    before = set(tmp_path.iterdir())
    monkeypatch.chdir(tmp_path)
    evaluate(EvaluateConfig(data, model=name))
    assert set(tmp_path.iterdir()) == before and "metrics:" not in capsys.readouterr().out


# ---- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [(), ("checkpoint", "model"), KINDS])
def test_exactly_one_thing_is_scored(run, data, tmp_path, given):
    chosen = {"checkpoint": run, "model": "a:b", "predictions": tmp_path / "p.jsonl"}
    with pytest.raises(InputError, match="give one of --checkpoint, --model or --predictions, got"):
        evaluate(EvaluateConfig(data, **{key: chosen[key] for key in given}))


@pytest.mark.parametrize(
    ("returned", "says"),
    [
        (lambda k: None, "returned a NoneType"),
        (lambda k: 3, "returned a int"),
        (lambda k: np.zeros((k + 1, 4, 4)), r"returned \d+ masks, expected \d+ masks"),
        (lambda k: np.zeros((k, 1, 4, 4)), r"has shape \(1, 4, 4\)"),
        (lambda k: np.zeros((k, 0, 4)), r"has shape \(0, 4\)"),
        (lambda k: np.zeros((k, 4, 4), np.uint8), "is uint8"),
        (lambda k: np.full((k, 4, 4), 1.5), "has values from 1.5 to 1.5"),
        (lambda k: np.full((k, 4, 4), -0.1), "has values from -0.1"),
        (lambda k: np.full((k, 4, 4), np.nan), "has values from nan"),
        (lambda k: ["mask"] * k, "returned a list"),
    ],
)
def test_what_is_no_mask_is_refused_and_nothing_written(data, tmp_path, monkeypatch, returned, says):
    name = module_with(monkeypatch, it=lambda image, sentences: returned(len(sentences)))("it")
    with pytest.raises(InputError, match=f"model {name}: .*{says}"):
        evaluate(EvaluateConfig(data, model=name, out=tmp_path / "m.json", results=tmp_path / "r.jsonl"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("json", "expected PACKAGE.MODULE:NAME"),
        ("json:", "expected PACKAGE.MODULE:NAME"),
        ("no_such_package.models:it", "no module 'no_such_package'"),
        ("json.nowhere:it", "no module 'json.nowhere'"),
        ("json:laods", "json has no callable 'laods'; it has .*loads"),
        ("json:__name__", "has no callable '__name__'"),
    ],
)
def test_names_that_lead_nowhere_are_refused(data, name, says):
    with pytest.raises(InputError, match=f"model {name}: .*{says}"):
        evaluate(EvaluateConfig(data, model=name))


def test_what_a_model_itself_fails_to_import_keeps_its_traceback(tmp_path, monkeypatch):
    (tmp_path / "needs_more.py").write_text("import no_such_dependency\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(ModuleNotFoundError, match="no_such_dependency"):
        predictors.callable_from("needs_more:it")


def test_transposed_masks_are_recognised(tmp_path, monkeypatch):
    image = tmp_path / "i.png"
    Image.new("RGB", (7, 5)).save(image)
    record = SimpleNamespace(
        image=image, height=5, width=7, expression="it", sent_id=4, image_id=1, ref_id=1, image_name="i"
    )
    with pytest.raises(
        InputError, match=r"model m: .*\(sent_id 4\) has height 7 and width 5, the image 5 and 7"
    ):
        list(CallablePredictor(lambda *_: [np.zeros((7, 5))], "m")([[record]]))


def lines_of(data, change):
    records = read(data).records("val")
    rle = lambda r: {"size": [r.height, r.width], "counts": [r.height * r.width]}
    rows = [{"sent_id": record.sent_id, "mask": rle(record)} for record in records]
    change(rows)
    return "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda rows: rows.clear(), "holds no predictions"),
        (lambda rows: rows.pop(), r"has no line with sent_id \d+ \(.* of split val\) among its \d+"),
        (lambda rows: rows.append(rows[0]), r":\d+: sent_id \d+ a second time"),
        (lambda rows: rows.insert(0, "{"), ":1: not a JSON object"),
        (lambda rows: rows.insert(0, "[1]"), r":1 is \[1\], expected a dict with 'sent_id'"),
        (lambda rows: rows[0].update(sent_id="1"), ":1 has 'sent_id' = '1'"),
        (lambda rows: rows[0].pop("mask"), ":1: has no 'mask'"),
        (lambda rows: rows[0].update(mask="no.png"), ":1: mask .*no.png: no such image"),
        (lambda rows: rows[0].update(mask=3), ":1: mask is 3, expected a path or RLE"),
        (lambda rows: rows[0]["mask"].update(counts=[5]), ":1: RLE covers 5 pixels"),
        (lambda rows: rows[0]["mask"].update(size=[10**9, 10**9]), ":1: the image has height"),
        (lambda rows: rows[0].update(no_target=1.5), ":1: no_target is 1.5"),
    ],
)
def test_predictions_that_cannot_be_used_are_refused_by_line(data, tmp_path, change, says):
    file = tmp_path / "p.jsonl"
    file.write_text(lines_of(data, change))
    with pytest.raises(InputError, match=says):
        evaluate(EvaluateConfig(data, predictions=file))


def test_equal_sentence_numbers_of_two_splits_are_told_apart(data, tmp_path):
    """A line that names its split is for it alone; one that names none is for any other."""
    file, rows = tmp_path / "p.jsonl", []
    for record in read(data).records("val"):
        pixels, size = record.height * record.width, [record.height, record.width]
        empty, whole = ({"size": size, "counts": counts} for counts in ([pixels], [0, pixels]))
        rows.append({"sent_id": record.sent_id, "split": "testA", "mask": empty})
        rows.append({"sent_id": record.sent_id, "mask": whole})
    file.write_text("\n".join(map(json.dumps, rows)))
    assert scores_of(EvaluateConfig(data, predictions=file))["mIoU"] > 0


def test_diverged_weights_are_named(run, data, tmp_path):
    checkpoint, records = load_checkpoint(run), read(data).records("val")
    with torch.no_grad():
        next(checkpoint.model.decoder.parameters()).fill_(torch.nan)
    from reference_model.scoring.curves import PrecisionRecall
    from reference_model.scoring.metrics import SegmentationMetrics

    predictor = MetrisPredictor(checkpoint.model, checkpoint.tokenizer, 64, 20)
    with pytest.raises(InputError, match="the model gives NaN"):
        list(Evaluator().outcomes(predictor, records, SegmentationMetrics(), PrecisionRecall()))


def test_broken_images_are_left_out_on_request(data, run, tmp_path):
    records = read(data).records("val")
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"no picture")
    first = min(record.image_id for record in records)
    mixed = [replace(r, image=broken) if r.image_id == first else r for r in records]
    checkpoint = load_checkpoint(run)
    usual = MetrisPredictor(checkpoint.model, checkpoint.tokenizer, 64, 20)
    with pytest.raises(InputError, match="not an image"):
        Evaluator().score(usual, mixed)
    with pytest.warns(UserWarning, match=r"broken.jpg.*its sentences are left out"):
        found = Evaluator().score(replace(usual, on_error="skip"), mixed)
    rest = [record for record in records if record.image_id != first]
    assert found == pytest.approx(Evaluator().score(usual, rest), abs=1e-6)


def test_masks_of_results_are_those_that_predict_draws(run, data, threshold, tmp_path):
    results = tmp_path / "r.jsonl"
    evaluate(EvaluateConfig(data, run, results=results, threshold=threshold, out=tmp_path / "m.json"))
    checkpoint, rows = load_checkpoint(run), list(map(json.loads, results.read_text().splitlines()))
    record = {record.sent_id: record for record in read(data).records("val")}
    for row in rows[:5]:
        image = Image.open(record[row["sent_id"]].image).convert("RGB")
        (mask,) = checkpoint.predict(image, [row["expression"]], threshold=threshold)
        found = segmentation_mask(row["mask"], *mask.shape, owner="row")
        assert (found != mask).mean() < 1e-3  # a batch rounds otherwise


# ---- what is left out, and what is said of it ----------------------------------------------------


@pytest.fixture
def spoilt(data, tmp_path):
    """The scenes with one broken image, one annotation that no ref names, and two broken masks."""
    root = tmp_path / "spoilt"
    shutil.copytree(data.root, root)
    records = read(DataConfig(root)).records("val")
    records[0].image.write_bytes(b"no picture")
    path = root / "refcoco/instances.json"
    instances = json.loads(path.read_text())
    named = {record.ann_id for split in ("train", "val") for record in read(data).records(split)}
    images = {record.image_id for record in records}
    lone = [a for a in instances["annotations"] if a["id"] not in named and a["image_id"] in images]
    for annotation in lone:
        annotation["segmentation"] = "broken"
    assert lone
    path.write_text(json.dumps(instances))
    return DataConfig(root, on_error="skip")


@pytest.mark.filterwarnings("ignore:.*left out")
def test_baselines_stand_on_the_sentences_of_the_model_and_the_others_are_counted(
    spoilt, tmp_path, monkeypatch, capsys
):
    name = module_with(monkeypatch, masks=lambda image, s: np.zeros((len(s), 4, 4)))("masks")
    results = tmp_path / "r.jsonl"
    found = evaluate(EvaluateConfig(spoilt, model=name, baselines=True, results=results))["val"]
    records = read(spoilt).records("val")
    left = sum(record.image_id == records[0].image_id for record in records)
    counts = {who: scores["count"] for who, scores in found.items()}
    assert set(counts) == {name, "mean training mask", "largest object"}
    assert set(counts.values()) == {len(records) - left} and 0 < left < len(records)
    assert found[name]["evaluation"]["left_out"] == left
    assert f"val: {left} sentences left out; every row is of the others" in capsys.readouterr().out
    # What was left out then has no line, and is left out again.
    again = scores_of(EvaluateConfig(spoilt, predictions=results))
    assert (again["count"], again["evaluation"]["left_out"]) == (counts[name], left)
    with pytest.raises(
        InputError, match=rf"has no line with .*; {left} of {len(records)} sentences lack theirs"
    ):
        evaluate(EvaluateConfig(replace(spoilt, on_error="stop"), predictions=results))


@pytest.mark.parametrize("sentences", ["all", "first"])
@pytest.mark.filterwarnings("ignore:.*left out")
def test_left_out_sentences_of_shards_are_counted(sentences, data, tmp_path, monkeypatch):
    reader, broken = read(data), None
    with ShardWriter(tmp_path / "shards", 2**20) as writer:
        for image_id, found in groupby(reader.stream("val"), key=lambda record: record.image_id):
            broken = broken or image_id
            records = list(found)
            writer.write(b"no" if image_id == broken else records[0].image.read_bytes(), records)
        writer.finish({}, {})
    name = module_with(monkeypatch, masks=lambda image, s: np.zeros((len(s), 4, 4)))("masks")
    config = DataConfig(tmp_path / "shards", on_error="skip")
    scores = scores_of(EvaluateConfig(config, model=name, sentences=sentences))
    chosen = [
        r
        for group in ImageGroups(reader.records("val"), replace(PROTOCOLS["metris"], sentences=sentences))
        for r in group
    ]
    left = sum(record.image_id == broken for record in chosen)
    assert (scores["count"], scores["evaluation"]["left_out"]) == (len(chosen) - left, left) and left


def test_predictions_are_scored_where_no_image_is(data, tmp_path):
    for layout in ("refer", "cris", "jsonl"):
        root = tmp_path / layout
        generate(GenerateConfig(root=root, layout=layout, size=48, train=2, val=2, test=1))
        place = DataConfig(next(root.glob("*.jsonl")) if layout == "jsonl" else root)
        records = read(place).records("val")
        file = tmp_path / f"{layout}.jsonl"
        rle = lambda r: {"size": [r.height, r.width], "counts": [r.height * r.width]}
        file.write_text("\n".join(json.dumps({"sent_id": r.sent_id, "mask": rle(r)}) for r in records))
        shutil.rmtree(next(path for path in root.iterdir() if path.name.startswith("images")))
        assert scores_of(EvaluateConfig(place, predictions=file))["count"] == len(records)
        assert scores_of(EvaluateConfig(replace(place, on_error="skip"), predictions=file))["count"] == len(
            records
        )
        with pytest.raises(InputError, match=r"image"):
            evaluate(EvaluateConfig(place, model="json:loads"))


def test_a_sentence_has_one_line_however_many_splits_hold_it(data, tmp_path, monkeypatch):
    root = tmp_path / "root"
    root.mkdir()
    for name in data.root.iterdir():
        (root / name.name).symlink_to(name)
    ids = sorted(read(data).categories)
    (root / "classes.json").write_text(json.dumps({"seen": ids[1:], "unseen": ids[:1]}))
    name = module_with(monkeypatch, masks=lambda image, s: np.zeros((len(s), 4, 4)))("masks")
    results, config = tmp_path / "r.jsonl", DataConfig(root)
    evaluate(EvaluateConfig(config, model=name, splits="val_seen, val", results=results))
    rows = [json.loads(line)["sent_id"] for line in results.open()]
    assert sorted(rows) == sorted(record.sent_id for record in read(data).records("val"))
    evaluate(EvaluateConfig(config, predictions=results, splits="val"))


def test_sentences_of_one_number_are_refused_before_the_model_runs(data, tmp_path, monkeypatch):
    refs = data.root / "refcoco/refs(unc).p"
    found = pickle.loads(refs.read_bytes())
    root = tmp_path / "root"
    (root / "refcoco").mkdir(parents=True)
    (root / "images").symlink_to(data.root / "images")
    shutil.copyfile(data.root / "refcoco/instances.json", root / "refcoco/instances.json")
    for sentence in (sentence for ref in found if ref["split"] == "val" for sentence in ref["sentences"]):
        sentence["sent_id"] = 7
    (root / "refcoco/refs(unc).p").write_bytes(pickle.dumps(found))
    run = []
    name = module_with(monkeypatch, masks=lambda image, s: run.append(s))("masks")
    with pytest.raises(InputError, match=r"results: sent_id 7 of split val .* is that of several sentences"):
        evaluate(EvaluateConfig(DataConfig(root), model=name, results=tmp_path / "r.jsonl"))
    assert not run


def test_lines_and_metrics_tell_the_threshold_that_cut(run, data, threshold, tmp_path, monkeypatch, capsys):
    results, out = tmp_path / "r.jsonl", tmp_path / "m.json"
    usual = {"threshold": threshold, "sentences": "first"}
    evaluate(EvaluateConfig(data, run, results=results, out=out, **usual))
    rows = list(map(json.loads, results.open()))
    assert {(row["threshold"], row["sentences"]) for row in rows} == {(threshold, "first")}
    capsys.readouterr()
    again = scores_of(EvaluateConfig(data, predictions=results, sentences="first"))
    assert again["evaluation"]["threshold"] == threshold
    assert (
        f"probability > {threshold:g}, union of polygons, the first sentence of each ref"
        in capsys.readouterr().out
    )
    with pytest.raises(InputError, match="threshold: does nothing to --predictions"):
        evaluate(EvaluateConfig(data, predictions=results, **usual))
    name = module_with(monkeypatch, masks=lambda image, s: np.zeros((len(s), 4, 4), bool))("masks")
    assert scores_of(EvaluateConfig(data, model=name))["evaluation"]["threshold"] is None
    assert "own size, masks as given, union" in capsys.readouterr().out
    with pytest.raises(InputError, match=r"threshold: does nothing to the bool masks of my_models:masks"):
        evaluate(EvaluateConfig(data, model=name, threshold=0.4))


def test_masks_of_another_protocol_are_refused(run, data, tmp_path):
    results = tmp_path / "r.jsonl"
    evaluate(EvaluateConfig(data, run, protocol="lavt", results=results, out=tmp_path / "m.json"))
    with pytest.raises(
        InputError, match=r"r.jsonl:1: its mask was cut and resized by protocol lavt, not metris"
    ):
        evaluate(EvaluateConfig(data, predictions=results))


def test_grey_pictures_are_no_masks(data, tmp_path):
    values = np.zeros((8, 8), np.uint8)
    values[2:, 2:], values[4:, 4:] = 90, 200
    Image.fromarray(values).save(tmp_path / "p.png")
    file = tmp_path / "p.jsonl"
    file.write_text(lines_of(data, lambda rows: rows[0].update(mask="p.png")))
    with pytest.raises(
        InputError, match=r"p.jsonl:1: mask .*p.png: has more values than 0 and one other; cut"
    ):
        evaluate(EvaluateConfig(data, predictions=file))


@pytest.mark.parametrize(
    ("layout", "dataset", "split_by", "expected"),
    [
        ("jsonl", "refcoco", "unc", ("own.jsonl", None)),
        ("cris", "refcocog", "umd", ("refcocog", "umd")),
        ("cris", "refcocog_u", "unc", ("refcocog", "umd")),
    ],
)
def test_metrics_name_the_data_set_that_its_files_name(
    layout, dataset, split_by, expected, tmp_path, monkeypatch
):
    """Not the folder that it happens to lie in, nor what the config would mean in another layout."""
    root = tmp_path / "refcoco"
    generate(GenerateConfig(root=root, layout=layout, size=48, train=2, val=2, test=1))
    if layout == "jsonl":
        next(root.glob("*.jsonl")).rename(root / "own.jsonl")
    else:
        for part in ("anns", "masks"):
            (root / part / "refcoco").rename(root / part / "refcocog_u")
    place = root / "own.jsonl" if layout == "jsonl" else root
    name = module_with(monkeypatch, masks=lambda image, s: np.zeros((len(s), 4, 4)))("masks")
    said = scores_of(EvaluateConfig(DataConfig(place, dataset, split_by), model=name))["evaluation"]
    assert (said["dataset"], said["split_by"], said["generated"]) == (*expected, True)


def test_other_splits_stay_in_the_metrics_of_a_checkpoint(run, data, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    for name in ("metrics.json", "metrics_curves.json"):
        (folder / name).unlink(missing_ok=True)
    for splits in ("val", "testA,testB", "val"):
        evaluate(EvaluateConfig(data, folder, splits=splits))
    for name in ("metrics.json", "metrics_curves.json"):
        assert set(json.loads((folder / name).read_text())) == {"val", "testA", "testB"}
    evaluate(EvaluateConfig(data, folder, splits="val", out=folder / "metrics.json"))
    assert set(json.loads((folder / "metrics.json").read_text())) == {"val"}
    (folder / "metrics.json").write_text("[]")
    with pytest.raises(InputError, match=r"metrics.json: holds \[\], expected scores by split; move it away"):
        evaluate(EvaluateConfig(data, folder))


def test_models_get_a_batch_of_sentences_at_most_and_their_errors_stay_theirs(data, monkeypatch):
    sizes = []

    def fails(image, sentences):
        yield np.zeros((4, 4))
        raise RuntimeError("CUDA out of memory")

    masks = lambda image, s: sizes.append(len(s)) or (np.zeros((4, 4)) for _ in s)
    name = module_with(monkeypatch, masks=masks, fails=fails)
    assert scores_of(EvaluateConfig(data, model=name("masks"), batch_size=2))["count"] == sum(sizes)
    assert max(sizes) == 2
    with pytest.raises(RuntimeError, match="CUDA out of memory"):
        evaluate(EvaluateConfig(data, model=name("fails")))


def test_tables_show_every_precision_of_the_protocol(run, data, tmp_path, capsys):
    evaluate(EvaluateConfig(data, run, protocol="rela", out=tmp_path / "m.json"))
    assert "P@0.7  P@0.8  P@0.9" in capsys.readouterr().out


@pytest.mark.parametrize("sort", ["probabilities", "masks", "both"])
def test_three_processes_write_what_one_writes(any_data, tmp_path, monkeypatch, capfd, sort):
    """Of val they have 3, 3 and 2 images, of testA one of them has none; "both" are masks of one image."""
    counts = {s: len({r.image_id for r in read(any_data).records(s)}) for s in ("val", "testA")}
    assert counts == {"val": 8, "testA": 2}

    def guess(image, sentences):
        grey = torch.from_numpy(np.array(image.convert("L"))) / 255
        guesses = torch.stack([grey / (1 + len(sentence) % 3) for sentence in sentences])
        masks = sort == "masks" or (sort == "both" and image.tobytes() == first)
        return guesses > 0.2 if masks else guesses

    first = open_image(read(any_data).records("val")[0].image).tobytes()
    config = EvaluateConfig(
        any_data,
        model=module_with(monkeypatch, guess=guess)("guess"),
        splits="val,testA",
        out=tmp_path / "m.json",
        results=tmp_path / "r.jsonl",
        device="cpu",
        baselines=True,
        breakdowns=True,
        intervals=True,
    )

    def written():
        files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
        for path in tmp_path.iterdir():
            path.unlink()
        return files, capfd.readouterr().out

    evaluate(config)
    alone = written()
    assert set(alone[0]) == {"m.json", "r.jsonl"} | (set() if sort == "masks" else {"m_curves.json"})
    assert ("AUC-PR" in json.loads(alone[0]["m.json"])["val"]["my_models:guess"]) == (sort == "probabilities")
    assert on_processes(3, lambda rank: evaluate(config)) == [0]
    assert written() == alone


def test_error_of_one_process_ends_all_with_its_line(data, tmp_path, monkeypatch):
    first = open_image(read(data).records("val")[0].image).tobytes()

    def guess(image, sentences):
        return torch.zeros(len(sentences), 8, 8) + (2.0 if image.tobytes() == first else 0.5)

    config = EvaluateConfig(
        data, model=module_with(monkeypatch, guess=guess)("guess"), out=tmp_path / "m.json"
    )

    def refused(rank):
        with pytest.raises(InputError, match=r"has values from 2 to 2, no probabilities"):
            evaluate(config)

    assert on_processes(2, refused) == [0] and not (tmp_path / "m.json").exists()


def test_a_name_that_other_launchers_set_too_is_not_torchrun(data, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    config = EvaluateConfig(
        data, model=module_with(monkeypatch, flat=lambda i, s: torch.ones(len(s), 2, 2))("flat")
    )
    assert scores_of(config)["count"] == len(read(data).records("val"))
