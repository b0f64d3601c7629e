"""``from reference_model import load, build, preset, METRIS``: what a user of Python has to know."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import reference_model
from reference_model import METRIS, build, load, preset
from reference_model.files import InputError
from reference_model.model.build import build_metris

SENTENCES = ["the red star", "the large blue circle on the left"]


@pytest.fixture(scope="module")
def checkpoint(bold_run):
    return load(str(bold_run), device="cpu")


@pytest.fixture(scope="module")
def photo(scenes):
    return min((scenes / "images" / "train2014").glob("*.jpg"))


def test_importing_the_package_loads_no_torch_and_no_encoders():
    code = "import sys, reference_model; print({'torch', 'timm', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_all_names_are_there_and_others_are_refused_as_python_does():
    assert {"METRIS", "build", "load", "preset"} <= set(dir(reference_model)) & set(reference_model.__all__)
    assert all(getattr(reference_model, name).__doc__ for name in reference_model.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'train'"):
        reference_model.train  # noqa: B018


def test_masks_have_the_size_of_the_image_in_whatever_form_it_comes(checkpoint, photo, tmp_path):
    image = Image.open(photo).convert("RGB").resize((90, 50))
    image.save(tmp_path / "photo.png")
    masks = checkpoint.predict(tmp_path / "photo.png", SENTENCES)
    assert masks.shape == (2, 50, 90) and masks.dtype == bool and masks.any() and not masks.all()
    for form in (str(tmp_path / "photo.png"), image, np.asarray(image)):
        np.testing.assert_array_equal(checkpoint.predict(form, SENTENCES), masks)
    grey = np.asarray(image.convert("L"))
    np.testing.assert_array_equal(
        checkpoint.predict(grey, SENTENCES), checkpoint.predict(np.stack([grey] * 3, axis=-1), SENTENCES)
    )


def test_scores_are_those_that_the_network_gives(checkpoint, photo):
    found = checkpoint.predict(photo, SENTENCES, return_scores=True)
    output = checkpoint.refer(checkpoint.encode(photo), SENTENCES)
    width, height = Image.open(photo).size
    assert found.probabilities.shape == (2, height, width)
    np.testing.assert_array_equal(found.masks, found.probabilities > 0.5)
    np.testing.assert_allclose(found.probabilities, output.logits.sigmoid(), atol=1e-6)  # 64 px: its own size
    rows, columns = output.grid
    np.testing.assert_array_equal(found.scores.reshape(2, -1, rows * columns), output.scores)
    np.testing.assert_array_equal(found.curated.reshape(2, -1, rows * columns), output.dynamic_mask)
    assert found.no_target is None


def test_image_is_encoded_once_and_a_sentence_does_not_depend_on_the_others(checkpoint, photo, monkeypatch):
    calls, encoder = [], checkpoint.model.image_encoder
    encode = encoder.forward
    monkeypatch.setattr(encoder, "forward", lambda x: calls.append(len(x)) or encode(x))
    together = checkpoint.predict(photo, SENTENCES)
    assert calls == [1]
    alone = [checkpoint.predict(photo, [sentence])[0] for sentence in SENTENCES]
    np.testing.assert_array_equal(together, alone)


def test_bytes_are_normalised_by_the_model_itself(checkpoint):
    pixels = torch.randint(256, (2, 3, 64, 64), dtype=torch.uint8)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    floats = ((pixels.permute(0, 2, 3, 1) / 255 - mean) / std).permute(0, 3, 1, 2)
    with torch.no_grad():
        of_bytes, of_floats = (checkpoint.model.encode_image(x).maps for x in (pixels, floats))
    for ours, theirs in zip(of_bytes, of_floats, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert not any("pixel" in name for name in checkpoint.model.state_dict())


@pytest.mark.parametrize(
    ("image", "problem"),
    [
        (np.zeros((4, 4, 3)), "shape (4, 4, 3) and dtype float64"),
        (np.zeros((3, 5, 5), np.uint8), "shape (3, 5, 5)"),
        (Image.new("F", (4, 4)), "float pixels"),
    ],
)
def test_image_without_a_known_range_or_axes_is_refused(checkpoint, image, problem):
    with pytest.raises(InputError) as refused:
        checkpoint.predict(image, SENTENCES)
    assert refused.value.thing == "image" and problem in refused.value.problem
    assert "uint8" in refused.value.step


def test_sentences_and_thresholds_are_checked(checkpoint, photo):
    with pytest.raises(TypeError, match="one string, expected a list"):
        checkpoint.predict(photo, "the red star")
    with pytest.raises(InputError, match="has no word"):
        checkpoint.predict(photo, [" "])
    with pytest.raises(InputError) as refused:
        checkpoint.predict(photo, SENTENCES, threshold=1.0)
    assert refused.value.thing == "threshold" and "got 1" in refused.value.problem


def test_preset_is_built_without_a_parser_and_without_data():
    model = build(preset("metris_tiny", vocab_size=200))
    assert isinstance(model, METRIS) and model.text_encoder.vocab_size == 200
    assert model.state_dict().keys() == build_metris(model.config).state_dict().keys()
    with torch.no_grad():
        logits = model(
            torch.zeros(1, 3, 96, 96, dtype=torch.uint8),
            torch.tensor([[2, 7, 3]]),
            torch.ones(1, 3, dtype=torch.bool),
        ).logits
    assert logits.shape == (1, 96, 96) and logits.isfinite().all()


def test_unknown_presets_and_fields_name_the_nearest():
    with pytest.raises(InputError, match=r"did you mean metris_tiny.*metris_paper"):
        preset("metris_tny")
    with pytest.raises(InputError, match="unknown key ratoi, did you mean ratio"):
        preset("metris_tiny", ratoi=0.5)
    with pytest.raises(InputError, match="ratio"):
        preset("metris_tiny", ratio="much")


def test_load_refuses_what_is_nowhere(tmp_path):
    with pytest.raises(InputError, match="no folder"):
        load(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"neither a checkpoint folder nor an \.onnx or \.pt2 file"):
        load(__file__)


def test_loaded_model_is_the_hubs_and_keeps_its_tokenizer(checkpoint, bold_run, tmp_path):
    assert isinstance(checkpoint.model, METRIS)
    checkpoint.model.save_pretrained(tmp_path / "shared")
    again = METRIS.from_pretrained(tmp_path / "shared")
    assert again.tokenizer.get_vocab() == checkpoint.tokenizer.get_vocab()
    assert again.config == checkpoint.config
