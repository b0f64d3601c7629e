"""A checkpoint folder is enough to predict, and a broken one is refused before it predicts nonsense."""

import shutil
from dataclasses import replace

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel

from reference_model.checkpoints.checkpoint import load_checkpoint, save_weights, start_checkpoint
from reference_model.files import InputError
from reference_model.model.build import build_metris
from reference_model.processes import pick_device
from reference_model.tokens import build_tokenizer
from reference_model.training.train import train


@pytest.fixture
def saved(run, tmp_path):
    return shutil.copytree(run, tmp_path / "copy")


def test_loaded_model_equals_the_saved_one(small, tmp_path):
    tokenizer = build_tokenizer(["the red star"])
    model = build_metris(small).eval()
    start_checkpoint(tmp_path, yaml.safe_dump({"model": {**_plain(small)}}), tokenizer)
    save_weights(tmp_path, model)
    loaded = load_checkpoint(tmp_path)
    images, ids = torch.randn(2, 3, 64, 64), torch.randint(5, 100, (2, 6))
    mask = torch.ones(2, 6, dtype=torch.bool)
    assert loaded.model(images, ids, mask).logits.equal(model(images, ids, mask).logits)
    assert not loaded.model.training
    assert loaded.tokenizer("the red star")["input_ids"] == tokenizer("the red star")["input_ids"]


def _plain(config):
    return {name: value for name, value in vars(config).items() if value is not None}


@pytest.mark.parametrize("name", ["model.safetensors", "config.yaml", "tokenizer"])
def test_missing_part_is_named(saved, name):
    part = saved / name
    shutil.rmtree(part) if part.is_dir() else part.unlink()
    with pytest.raises(InputError, match=f"has no {name}"):
        load_checkpoint(saved)


def test_weights_of_another_shape_are_refused_by_name(saved):
    config = yaml.safe_load((saved / "config.yaml").read_text())
    config["model"]["decoder_dim"] = 32
    (saved / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(InputError, match=r"decoder\.inlet\.\w+ has shape \(16.*but the config builds \(32"):
        load_checkpoint(saved)


def test_missing_and_extra_weights_are_named(saved):
    weights = load_file(saved / "model.safetensors")
    bias = weights.pop("decoder.head.bias")
    save_file(weights, saved / "model.safetensors")
    with pytest.raises(InputError, match=r"lacks 1 of \d+ weights \(decoder\.head\.bias\)"):
        load_checkpoint(saved)
    save_file({**weights, "decoder.head.bias": bias, "odd.weight": bias.clone()}, saved / "model.safetensors")
    with pytest.raises(InputError, match=r"has 1 that the config has no place for \(odd\.weight\)"):
        load_checkpoint(saved)


def test_truncated_weights_are_refused(saved):
    whole = (saved / "model.safetensors").read_bytes()
    (saved / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"model\.safetensors: cannot be read"):
        load_checkpoint(saved)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("model: {raito: 0.3}", r"config\.yaml: unknown key raito, did you mean ratio\?"),
        ("model: {ratio: many}", "ratio"),
        ("model: [1]", "holds a list, expected a mapping"),
        ("model: {", "is not YAML"),
        ("{}", "holds a NoneType"),
    ],
)
def test_broken_config_is_refused_in_one_line(saved, line, says):
    (saved / "config.yaml").write_text(line)
    with pytest.raises(InputError, match=says) as caught:
        load_checkpoint(saved)
    assert "\n" not in str(caught.value)


def test_config_with_ratio_out_of_range_is_refused_as_input(saved):
    config = yaml.safe_load((saved / "config.yaml").read_text())
    config["model"]["ratio"] = 30
    (saved / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(InputError, match=r"ratio must be in \(0, 1\], got 30"):
        load_checkpoint(saved)


def test_unknown_device_is_refused():
    with pytest.raises(InputError, match="device abacus: cannot be used"):
        pick_device("abacus")


def test_weights_that_are_not_finite_are_refused(saved):
    weights = load_file(saved / "model.safetensors")
    weights["decoder.head.bias"] *= float("nan")
    save_file(weights, saved / "model.safetensors")
    with pytest.raises(InputError, match=r"decoder\.head\.bias is not finite everywhere"):
        load_checkpoint(saved)


@pytest.mark.parametrize("damage", ["emptied", "without its vocabulary", "garbage", "larger"])
def test_damaged_tokenizer_is_refused(saved, damage):
    tokenizer = saved / "tokenizer"
    if damage == "larger":
        build_tokenizer([f"word{i}" for i in range(500)]).save_pretrained(tokenizer)
    elif damage == "garbage":
        (tokenizer / "tokenizer.json").write_text("{}")
    else:
        for path in tokenizer.iterdir():
            if damage == "emptied" or path.name in ("tokenizer.json", "vocab.txt"):
                path.unlink()
    with pytest.raises(InputError, match="tokenizer"):
        load_checkpoint(saved)


def test_run_from_local_text_weights_loads_without_them(another, tmp_path):
    shape = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 20}
    bert = BertModel(BertConfig(vocab_size=150, **shape))
    bert.save_pretrained(tmp_path / "bert")
    build_tokenizer(["red star"]).save_pretrained(tmp_path / "bert")
    config = another(learning_rate=1e-9)
    out = train(replace(config, model=replace(config.model, text_weights=tmp_path / "bert")))
    shutil.rmtree(tmp_path / "bert")
    loaded = load_checkpoint(out).model.text_encoder
    assert (loaded.vocab_size, loaded.bert.config.num_hidden_layers) == (150, 2)
    trained, given = loaded.bert.embeddings.word_embeddings.weight, bert.embeddings.word_embeddings.weight
    torch.testing.assert_close(trained, given, rtol=0, atol=1e-6)


def test_text_weights_without_a_vocabulary_are_refused(another, tmp_path):
    shape = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 20}
    BertModel(BertConfig(vocab_size=150, **shape)).save_pretrained(tmp_path / "bert")
    config = another()
    with pytest.raises(InputError, match=r"has neither vocab\.txt nor tokenizer\.json"):
        train(replace(config, model=replace(config.model, text_weights=tmp_path / "bert")))


def test_vocabulary_larger_than_the_text_weights_is_refused(another, tmp_path):
    shape = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 20}
    BertModel(BertConfig(vocab_size=90, **shape)).save_pretrained(tmp_path / "bert")
    build_tokenizer(["red star"]).save_pretrained(tmp_path / "bert")
    config = another()
    with pytest.raises(InputError, match=r"tokenizer has \d+ entries, but the model has vocab_size 90"):
        train(replace(config, model=replace(config.model, text_weights=tmp_path / "bert")))
