"""Sentences that mean nothing in the image: classifier, threshold, gRefCOCO's metrics, a whole run."""

import json
from dataclasses import replace
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from reference_model.checkpoints.checkpoint import Checkpoint, load_checkpoint
from reference_model.cli import main
from reference_model.data.config import DataConfig
from reference_model.data.datasets import read
from reference_model.data.images import open_image
from reference_model.files import InputError
from reference_model.model.build import build_metris
from reference_model.model.config import ModelConfig
from reference_model.model.guidance import Guided
from reference_model.model.loss import MetrisLoss
from reference_model.model.metris import MetrisOutput
from reference_model.model.no_target import NoTargetHead
from reference_model.scoring.answers import Answer, resized
from reference_model.scoring.config import EvaluateConfig
from reference_model.scoring.evaluate import evaluate
from reference_model.scoring.evaluator import Evaluator
from reference_model.scoring.metrics import SegmentationMetrics
from reference_model.scoring.metris_predictor import MetrisPredictor
from reference_model.scoring.protocols import PROTOCOLS
from reference_model.scoring.table import score_table
from reference_model.synthetic.config import GenerateConfig
from reference_model.synthetic.generate import generate
from reference_model.tokens import build_tokenizer
from reference_model.training import best as training
from reference_model.training.train import train
from reference_model.viewing import predict as viewing
from reference_model.viewing.config import PredictConfig
from reference_model.viewing.predict import predict

# ---- the classifier -----------------------------------------------------------------------------


def guidance_of(tokens, mask):
    return Guided(tokens, mask, None, None)


def test_head_is_the_mean_vote_of_real_tokens():
    head, tokens = NoTargetHead(6).double(), torch.randn(3, 5, 6, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 0, 1, 0, 0], [0, 0, 0, 0, 0]]).bool()
    votes = [[head.mlp(t)[0] for t, real in zip(row, kept) if real] for row, kept in zip(tokens, mask)]
    expected = torch.stack([sum(row) / len(row) for row in votes[:2]] + [torch.zeros(()).double()])
    torch.testing.assert_close(head(guidance_of(tokens, mask)), expected)


def test_padded_tokens_change_no_logit_and_get_no_gradient():
    head, tokens = NoTargetHead(6), torch.randn(2, 4, 6)
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]]).bool()
    padded = tokens.clone()
    padded[~mask] = 1e6
    padded.requires_grad_()
    more = torch.cat([padded, torch.randn(2, 3, 6)], dim=1)
    longer = torch.cat([mask, torch.zeros(2, 3, dtype=torch.bool)], dim=1)
    logits = head(guidance_of(tokens, mask))
    torch.testing.assert_close(head(guidance_of(padded, mask)), logits)
    torch.testing.assert_close(head(guidance_of(more, longer)), logits)
    head(guidance_of(padded, mask)).sum().backward()
    assert (padded.grad[~mask] == 0).all() and (padded.grad[mask].abs().amax(dim=-1) > 0).all()


@pytest.fixture
def model(small):
    return build_metris(replace(small, no_target=True)).eval()


def test_padding_a_sentence_changes_no_decision_of_the_model(model):
    image, ids = torch.randn(1, 3, 64, 64), torch.randint(5, 120, (1, 6))
    mask = torch.ones(1, 6, dtype=torch.bool)
    alone = model(image, ids, mask).no_target
    padded_ids = torch.cat([ids, torch.zeros(1, 5, dtype=torch.long)], dim=1)
    padded = model(image, padded_ids, torch.arange(11)[None] < 6).no_target
    torch.testing.assert_close(padded, alone, atol=1e-5, rtol=1e-4)


def test_loss_of_the_classifier_trains_what_makes_the_guidance_tokens(model):
    model.train()
    output = model(torch.randn(2, 3, 64, 64), torch.randint(5, 120, (2, 6)), torch.ones(2, 6).bool())
    target = torch.zeros(2, 64, 64)
    target[1, :9] = 1
    loss = MetrisLoss(contrastive_weight=0.0, temperature=0.07, no_target_weight=0.1)
    losses = loss(output, target)
    wanted = torch.nn.functional.softplus(torch.stack([-output.no_target[0], output.no_target[1]])).mean()
    torch.testing.assert_close(losses.no_target, wanted)
    torch.testing.assert_close(losses.total, losses.mask + 0.1 * wanted)
    losses.no_target.backward()
    for part in (model.no_target, model.guidance, model.text_encoder, model.image_encoder):
        assert any(p.grad is not None and p.grad.abs().max() > 0 for p in part.parameters())


# ---- from an output to masks --------------------------------------------------------------------


def output_of(no_target, logits=None):
    logits = torch.full((len(no_target), 4, 4), 3.0) if logits is None else logits
    return MetrisOutput(logits, None, None, (1, 1), (1, 1), torch.tensor(no_target), None)


def predicted(output, size, **options):
    """What a checkpoint whose model gives this output predicts about an image of this size."""
    model = SimpleNamespace(device="cpu", encode_image=lambda x: None, refer=lambda *_, **__: output)
    checkpoint = Checkpoint(model, build_tokenizer(["star"]), ModelConfig(image_size=8))
    image = np.zeros((*size, 3), np.uint8)
    return checkpoint.predict(image, ["star"] * len(output.logits), **options, return_scores=True)


@given(
    st.lists(st.floats(-8, 8, width=32), min_size=1, max_size=5),
    st.floats(0.01, 0.99),
)
def test_mask_is_empty_exactly_above_the_threshold(logits, threshold):
    found = predicted(output_of(logits), (6, 5), no_target_threshold=threshold)
    for logit, mask, absent in zip(logits, found.masks, found.no_target, strict=True):
        probability = torch.tensor(logit).sigmoid().item()
        assert absent == pytest.approx(probability, abs=1e-6)
        assert mask.shape == (6, 5) and mask.any() == (probability <= threshold)


def test_logit_of_zero_is_a_target_at_the_usual_threshold():
    below, at, above = predicted(output_of([-1e-3, 0.0, 1e-3]), (4, 4)).masks
    assert below.all() and at.all() and not above.any()


def test_model_without_classifier_empties_no_mask():
    logits = torch.randn(2, 4, 4)
    output = MetrisOutput(logits, None, None, (1, 1), (1, 1), None, None)
    protocol = replace(PROTOCOLS["metris"], threshold=0.3)
    for size in ((7, 9), (3, 2), (4, 4)):
        found = predicted(output, size, threshold=0.3, no_target_threshold=0.01)
        assert found.no_target is None
        for row, mask in zip(logits, found.masks, strict=True):
            np.testing.assert_array_equal(mask, resized(Answer(row, True, None), *size, protocol).mask)


# ---- metrics ------------------------------------------------------------------------------------

pixels = st.sets(st.tuples(st.integers(0, 3), st.integers(0, 4))) | st.just(set())


def mask_of(cells):
    mask = np.zeros((4, 5), bool)
    for cell in cells:
        mask[cell] = True
    return mask


def generalised(pairs):
    metrics = SegmentationMetrics()
    for prediction, truth in pairs:
        metrics.update(mask_of(prediction), mask_of(truth))
    return metrics.compute()


@given(st.lists(st.tuples(pixels, pixels), min_size=1, max_size=8))
@settings(deadline=None)
def test_metrics_of_grefcoco_equal_arithmetic_of_sets(pairs):
    result = generalised(pairs)
    ious, intersection, union = [], 0, 0
    counts = dict.fromkeys(("TP", "FN", "FP", "TN"), 0)
    for predicted, truth in pairs:  # the table of ReLA's evaluation, row by row
        if not truth:
            ious.append(Fraction(not predicted))
            union += len(predicted)
            counts["FN" if predicted else "TP"] += 1
        elif not predicted:
            ious.append(Fraction(0))
            union += len(truth)
            counts["FP"] += 1
        else:
            ious.append(Fraction(len(predicted & truth), len(predicted | truth)))
            intersection += len(predicted & truth)
            union += len(predicted | truth)
            counts["TN"] += 1
    share = lambda part, rest: part / (part + rest) if part + rest else 0
    if all(truth for _, truth in pairs):
        assert not result.keys() & {"gIoU", "cIoU", "N-acc", "T-acc"}
        return
    assert result["gIoU"] == pytest.approx(float(sum(ious) / len(ious)), abs=1e-12)
    assert result["cIoU"] == (intersection / union if union else 0)
    assert result["N-acc"] == share(counts["TP"], counts["FN"])
    assert result["T-acc"] == share(counts["TN"], counts["FP"])


def test_right_silence_is_worth_one_in_giou_and_nothing_in_miou():
    result = generalised([(set(), set()), ({(0, 0)}, {(0, 0)})])
    assert (result["gIoU"], result["mIoU"], result["cIoU"]) == (1, 0.5, 1)
    assert (result["N-acc"], result["T-acc"]) == (1, 1)


def test_table_shows_the_metrics_of_grefcoco_where_a_split_has_them():
    with_none, without = generalised([(set(), set())]), generalised([({(0, 0)}, {(0, 0)})])
    assert "gIoU" not in score_table({"val": {"METRIS": without}})
    both = {"val": {"METRIS": with_none}, "testA": {"METRIS": without}}
    head, first, second = score_table(both).splitlines()
    assert head.split()[-5:] == ["gIoU", "cIoU", "N-acc", "T-acc", "sentences"]
    assert first.split()[-5:] == ["100.00", "0.00", "100.00", "0.00", "1"]
    assert second.split()[-5:] == ["-", "-", "-", "-", "1"]


# ---- a whole run --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def any_scenes(tmp_path_factory):
    root = tmp_path_factory.mktemp("any_scenes") / "data"
    return generate(GenerateConfig(root=root, size=64, train=16, val=8, test=6, seed=2, targets="any"))


@pytest.fixture(scope="module")
def any_data(any_scenes):
    return DataConfig(root=any_scenes, dataset="grefcoco")


@pytest.fixture(scope="module")
def any_run(run_config, any_data, tmp_path_factory):
    out = tmp_path_factory.mktemp("any_runs") / "run"
    model = replace(run_config.model, no_target=True)
    return train(replace(run_config, data=any_data, model=model, out=out, steps=2))


def test_generated_set_is_read_as_it_was_meant(any_scenes, any_data):
    data = read(any_data)
    stored = json.loads((any_scenes / "grefcoco/grefs(unc).json").read_text())
    records = [record for split in data.splits for record in data.records(split)]
    assert len(records) == sum(len(ref["sentences"]) for ref in stored)
    assert {len(record.ann_id) for record in records} >= {0, 1, 2}
    for record in records:
        areas = [a["area"] for a in data.annotations(record.image_id) if a["id"] in record.ann_id]
        assert record.mask().sum() == sum(areas)  # objects share no pixel


def test_two_steps_train_the_classifier_and_the_log_has_its_loss(any_run):
    entries = [json.loads(line) for line in (any_run / "log.jsonl").read_text().splitlines()]
    losses = next(entry for entry in entries if "no_target" in entry)
    assert 0.1 < losses["no_target"] < 3
    assert entries[-1]["val"].keys() >= {"gIoU", "cIoU", "N-acc", "T-acc", "mIoU", "oIoU"}
    assert load_checkpoint(any_run).model.no_target is not None


def test_evaluation_equals_scoring_each_prediction_alone(any_run, any_data, tmp_path):
    for threshold in (0.3, 0.5, 0.7):
        usual = {"threshold": 0.4, "no_target_threshold": threshold}
        out = tmp_path / "m.json"
        config = EvaluateConfig(
            any_data, any_run, splits="testA", batch_size=5, out=out, baselines=True, **usual
        )
        scores = evaluate(config)["testA"]
        checkpoint, metrics = load_checkpoint(any_run), SegmentationMetrics()
        for record in read(any_data).records("testA"):
            (mask,) = checkpoint.predict(record.image, [record.expression], **usual)
            metrics.update(mask, record.mask(), target=not record.no_target)
        assert numbers(scores["METRIS"]) == pytest.approx(metrics.compute())
        assert all("gIoU" in score for score in scores.values()) and len(scores) == 3


def numbers(scores):
    """What a run says about masks alone."""
    return {key: value for key, value in scores.items() if key != "AUC-PR" and not isinstance(value, dict)}


def predictor_of(checkpoint):
    return MetrisPredictor(checkpoint.model, checkpoint.tokenizer, image_size=64, max_tokens=20)


def with_decision(checkpoint, logit):
    """The same model with a classifier that always gives this logit."""
    last = checkpoint.model.no_target.mlp[-1]
    with torch.no_grad():
        last.weight.zero_()
        last.bias.fill_(logit)
    return checkpoint


def test_decision_of_the_classifier_is_what_evaluation_and_prediction_use(any_run, any_data):
    records = read(any_data).records("val")
    checkpoint = load_checkpoint(any_run)
    evaluator = Evaluator(replace(PROTOCOLS["metris"], threshold=0.01))
    predictor = predictor_of(with_decision(checkpoint, 1.0))  # probability 0.73
    silent = evaluator.score(predictor, records)
    assert (silent["N-acc"], silent["T-acc"], silent["mIoU"], silent["cIoU"]) == (1, 0, 0, 0)
    assert silent["gIoU"] == np.mean([record.no_target for record in records])
    bolder = replace(evaluator, no_target_threshold=0.75).score(predictor, records)
    assert (bolder["N-acc"], bolder["T-acc"]) == (0, 1) and bolder["mIoU"] > 0
    image = open_image(records[0].image)
    assert not checkpoint.predict(image, ["star"], threshold=0.01).any()
    found = checkpoint.predict(image, ["star"], threshold=0.01, no_target_threshold=0.75, return_scores=True)
    assert found.masks.any() and found.no_target == pytest.approx(0.7311, abs=1e-4)


def test_scores_of_records_that_all_have_a_target_are_as_before(any_run, any_data):
    checkpoint = load_checkpoint(any_run)
    records = [record for record in read(any_data).records("val") if not record.no_target]
    assert set(Evaluator().score(predictor_of(checkpoint), records)) == {
        *("oIoU", "mIoU", "P@0.5", "P@0.6", "P@0.7", "P@0.8", "P@0.9", "count"),
    }


@pytest.mark.parametrize("logit", [-1.0, 1.0])
def test_pictures_and_json_say_no_target(any_run, any_data, tmp_path, monkeypatch, capsys, logit):
    checkpoint, titles = with_decision(load_checkpoint(any_run), logit), []
    monkeypatch.setattr(viewing, "load", lambda *_, **__: checkpoint)
    drawn = viewing.captioned
    monkeypatch.setattr(
        viewing,
        "captioned",
        lambda panels, text: titles.append([t for _, t in panels]) or drawn(panels, text),
    )
    image = read(any_data).records("val")[0].image
    out = tmp_path / "mask.png"
    predict(PredictConfig(any_run, image, ["the red star"], out, threshold=0.01, json=True))
    (entry,) = json.loads(capsys.readouterr().out)
    assert entry["no_target"] == pytest.approx(1 / (1 + np.exp(-logit)), abs=1e-4)
    assert (titles[-1][-1] == "prediction: no target (0.73)") == (logit > 0) == (entry["area"] == 0)
    assert np.asarray(Image.open(out)).any() == (logit < 0)

    predict(PredictConfig(any_run, data=any_data, count=99, out=tmp_path / "p", threshold=0.01, json=True))
    records, entries = read(any_data).records("val"), json.loads(capsys.readouterr().out)
    for record, entry, (_, truth, title) in zip(records, entries, titles[1:], strict=True):
        assert (truth == "truth: no target") == record.no_target
        assert ("no target" in title) == (logit > 0)
        if logit > 0 or record.no_target:
            assert entry["iou"] == (logit > 0 and record.no_target)


def test_model_without_classifier_predicts_without_its_probability(run, scenes, tmp_path, capsys):
    image = next((scenes / "images/train2014").glob("*.jpg"))
    predict(PredictConfig(run, image, ["the red star"], tmp_path / "mask.png", json=True))
    assert "no_target" not in json.loads(capsys.readouterr().out)[0]


def test_best_weights_are_those_of_the_best_giou(any_data, run_config, tmp_path, monkeypatch):
    scored = iter([{"gIoU": 0.2, "mIoU": 0.9}, {"gIoU": 0.6, "mIoU": 0.1}, {"gIoU": 0.4, "mIoU": 0.95}])
    evaluations, saved = [], []
    monkeypatch.setattr(
        Evaluator, "score", lambda *_, **__: evaluations.append(1) or next(scored) | {"oIoU": 0.0}
    )
    save = training.save_weights
    monkeypatch.setattr(
        training, "save_weights", lambda *a, **k: saved.append(len(evaluations)) or save(*a, **k)
    )
    size = len(read(any_data).records("train")) // 2
    train(replace(run_config, data=any_data, out=tmp_path / "r", steps=6, batch_size=size, evaluate_every=1))
    assert saved == [1, 2]  # by mIoU it would be the first and the third
    entries = [json.loads(line) for line in (tmp_path / "r/log.jsonl").read_text().splitlines()]
    assert [entry["val"]["gIoU"] for entry in entries if "val" in entry] == [0.2, 0.6, 0.4]


@pytest.mark.parametrize("value", [0.0, 1.0, -0.5, float("nan")])
def test_threshold_outside_of_its_range_is_refused(any_run, any_data, tmp_path, value):
    says = "no_target_threshold: must be > 0 and < 1"
    with pytest.raises(InputError, match=says):
        evaluate(EvaluateConfig(any_data, any_run, no_target_threshold=value, out=tmp_path / "m.json"))
    with pytest.raises(InputError, match=says):
        predict(PredictConfig(any_run, data=any_data, no_target_threshold=value, out=tmp_path / "p"))


def test_commands_need_no_further_option(any_scenes, any_run, tmp_path, capsys):
    data = ["--data.root", str(any_scenes), "--data.dataset", "grefcoco"]
    out = tmp_path / "m.json"
    assert main(["evaluate", "--checkpoint", str(any_run), *data, "--out", str(out)]) == 0
    head, row = capsys.readouterr().out.splitlines()[:2]
    assert "gIoU" in head and row.startswith("val")
    sizes = ["--size", "32", "--train", "2", "--val", "1", "--test", "0"]
    assert main(["generate", "--root", str(tmp_path / "g"), "--targets", "any", *sizes]) == 0
    assert (tmp_path / "g/grefcoco/grefs(unc).json").is_file()
