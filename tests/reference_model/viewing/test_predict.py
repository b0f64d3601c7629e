"""Prediction and evaluation from a checkpoint folder alone."""

import json
from itertools import pairwise

import numpy as np
import pytest
from PIL import Image

from reference_model.checkpoints.checkpoint import load_checkpoint
from reference_model.data.config import DataConfig
from reference_model.data.images import open_image
from reference_model.data.readers.refer import Refer
from reference_model.files import InputError
from reference_model.scoring.config import EvaluateConfig
from reference_model.scoring.evaluate import evaluate
from reference_model.scoring.metrics import SegmentationMetrics
from reference_model.scoring.outcome import outcome
from reference_model.viewing.config import PredictConfig
from reference_model.viewing.overlay import overlay
from reference_model.viewing.predict import predict


@pytest.fixture
def photo(scenes, tmp_path):
    """Save the first scene again in another shape and with another mode."""
    source = next((scenes / "images" / "train2014").glob("*.jpg"))

    def save(name, size=(90, 50), mode="RGB", **options):
        path = tmp_path / name
        Image.open(source).resize(size).convert(mode).save(path, **options)
        return path

    return save


def test_several_sentences_equal_one_at_a_time(run, photo):
    checkpoint, image = load_checkpoint(run), open_image(photo("a.png"))
    sentences = ["the red star", "leftmost thing", "the large blue circle"]
    together = checkpoint.predict(image, sentences, threshold=0.1)
    alone = [checkpoint.predict(image, [sentence], threshold=0.1)[0] for sentence in sentences]
    assert all(np.array_equal(a, b) for a, b in zip(together, alone))


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "CMYK", "P"])
def test_mask_has_the_size_of_the_photo_whatever_its_mode(run, photo, tmp_path, mode):
    image = photo(f"a.{'jpg' if mode == 'CMYK' else 'png'}", mode=mode)
    out = tmp_path / "out" / "mask.png"
    predict(PredictConfig(checkpoint=run, image=image, expression=["the red star"], out=out))
    mask = Image.open(out)
    assert mask.size == (90, 50) and set(np.unique(np.asarray(mask))) <= {0, 255}
    assert (out.parent / "mask_overlay.png").is_file()


def test_turned_photo_gives_an_upright_mask(run, photo, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    image = photo("a.jpg", exif=exif.tobytes())
    predict(PredictConfig(checkpoint=run, image=image, expression=["star"], out=tmp_path / "mask.png"))
    assert Image.open(tmp_path / "mask.png").size == (50, 90)


def test_lower_threshold_gives_a_larger_mask(run, photo):
    checkpoint, image = load_checkpoint(run), open_image(photo("a.png"))
    masks = [checkpoint.predict(image, ["star"], threshold=t)[0] for t in (0.9, 0.5, 0.1, 0.01)]
    assert all((larger | smaller == larger).all() for smaller, larger in pairwise(masks))


def test_overlay_keeps_the_inside_outlines_it_and_dims_the_rest():
    image = Image.new("RGB", (8, 7), (200, 100, 50))
    mask = np.zeros((7, 8), dtype=bool)
    mask[1:6, 2:7] = True
    shown = np.asarray(overlay(image, mask, colour=(1, 2, 3))).astype(int)
    inner = np.zeros_like(mask)
    inner[2:5, 3:6] = True
    assert (shown[inner] == (200, 100, 50)).all()
    assert (shown[mask & ~inner] == (1, 2, 3)).all()
    assert (np.ptp(shown[~mask], axis=-1) == 0).all() and (shown[~mask] < 100).all()


def test_pictures_of_samples_show_their_iou(run, scenes, tmp_path, capsys):
    config = PredictConfig(
        checkpoint=run, data=DataConfig(root=scenes), split="testA", count=3, out=tmp_path / "p", json=True
    )
    files = predict(config)
    assert len(files) == 3 and all(Image.open(path).width > 200 for path in files)
    records, checkpoint = Refer(scenes).records("testA"), load_checkpoint(run)
    last = records[-1]
    (mask,) = checkpoint.predict(open_image(last.image), [last.expression])
    shown = json.loads(capsys.readouterr().out)[-1]
    assert shown["expression"] == last.expression
    assert shown["iou"] == pytest.approx(outcome(mask, last.mask()).iou, abs=1e-4)


def test_evaluation_equals_scoring_each_prediction_alone(run, scenes, tmp_path, capsys):
    config = EvaluateConfig(
        checkpoint=run,
        data=DataConfig(root=scenes),
        splits="val,testB",
        threshold=0.2,
        batch_size=5,
        out=tmp_path / "m.json",
        json=True,
        baselines=True,
    )
    scores = evaluate(config)
    checkpoint = load_checkpoint(run)
    for split in ("val", "testB"):
        metrics = SegmentationMetrics()
        for record in Refer(scenes).records(split):
            image = open_image(record.image)
            metrics.update(checkpoint.predict(image, [record.expression], threshold=0.2)[0], record.mask())
        for key, value in metrics.compute().items():
            assert scores[split]["METRIS"][key] == pytest.approx(value)
        assert set(scores[split]) == {"METRIS", "mean training mask", "largest object"}
    assert json.loads((tmp_path / "m.json").read_text()) == scores == json.loads(capsys.readouterr().out)


def test_largest_object_is_right_where_the_target_is_the_largest(run, scenes, tmp_path):
    config = EvaluateConfig(
        checkpoint=run, data=DataConfig(root=scenes), out=tmp_path / "m.json", baselines=True
    )
    data = Refer(scenes)
    records = data.records("val")
    largest = [max(data.annotations(r.image_id), key=lambda a: a["area"])["id"] == r.ann_id for r in records]
    assert evaluate(config)["val"]["largest object"]["P@0.9"] == pytest.approx(np.mean(largest))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"image": None}, "give --image and --expression"),
        ({"expression": None}, "give --image and --expression"),
        ({"expression": ["   "]}, "has no word"),
        ({"threshold": 1.5}, r"threshold: must be > 0 and < 1, got 1.5"),
    ],
)
def test_nonsense_is_refused_and_nothing_written(run, photo, tmp_path, changes, says):
    out = tmp_path / "out" / "mask.png"
    usual = {"checkpoint": run, "image": photo("a.png"), "expression": ["star"], "out": out}
    with pytest.raises(InputError, match=says):
        predict(PredictConfig(**usual | changes))
    assert not out.parent.exists()


def test_overlong_sentence_is_cut_with_a_warning(run, photo, tmp_path):
    config = PredictConfig(
        checkpoint=run, image=photo("a.png"), expression=["star " * 40], out=tmp_path / "m.png"
    )
    with pytest.warns(UserWarning, match="20 are kept"):
        predict(config)
    assert (tmp_path / "m.png").is_file()
