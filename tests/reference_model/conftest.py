"""A data set of a few scenes and a network of a few thousand parameters, shared by the tests of the model."""

import shutil
from pathlib import Path

import pytest
import torch

from reference_model.checkpoints.checkpoint import CONFIG, load_checkpoint, save_weights
from reference_model.configs import to_yaml
from reference_model.data.config import DataConfig
from reference_model.data.images import open_image
from reference_model.model.build import build_metris
from reference_model.model.config import ModelConfig
from reference_model.synthetic.config import GenerateConfig
from reference_model.synthetic.generate import generate
from reference_model.training.config import OptimConfig, TrainConfig
from reference_model.training.train import train
from reference_model.viewing.explain import encode, explain
from tests.support.options import replace

SMALL = ModelConfig(
    image_encoder="convnext_atto",
    image_encoder_options={"depths": [1, 1, 1, 1], "dims": [8, 12, 16, 24], "output_stride": 16},
    image_size=64,
    text_encoder_options={
        "hidden_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 24,
    },
    vocab_size=120,
    guidance_dim=24,
    joint_dim=12,
    enhancer_depth=1,
    num_heads=2,
    mlp_ratio=1.0,
    decoder_dim=16,
)


@pytest.fixture(scope="session")
def small() -> ModelConfig:
    return SMALL


@pytest.fixture(scope="session")
def scenes(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("scenes") / "data"
    return generate(GenerateConfig(root=root, size=64, train=16, val=6, test=4, seed=3))


@pytest.fixture(scope="session")
def run_config(scenes, tmp_path_factory) -> TrainConfig:
    out = tmp_path_factory.mktemp("runs") / "run"
    return TrainConfig(
        data=DataConfig(root=scenes),
        out=out,
        model=SMALL,
        steps=4,
        batch_size=4,
        sentences_per_image=2,
        optim=OptimConfig(learning_rate=1e-3),
        evaluate_every=0,
    )


@pytest.fixture(scope="session")
def run(run_config) -> Path:
    """A finished run of four steps: a checkpoint."""
    return train(run_config)


@pytest.fixture(scope="session")
def bold_run(run, scenes, tmp_path_factory) -> Path:
    """The run with its last bias moved, so that half of the pixels are inside a mask and IoUs differ."""
    folder = shutil.copytree(run, tmp_path_factory.mktemp("bold") / "bold")
    checkpoint = load_checkpoint(folder)
    image = open_image(min((scenes / "images" / "train2014").glob("*.jpg")))
    (found,) = explain(checkpoint, encode(checkpoint, image), ["star"])
    with torch.no_grad():
        checkpoint.model.decoder.head.bias -= found.logits.median()
    save_weights(folder, checkpoint.model)
    return folder


@pytest.fixture(scope="session")
def variant(run, run_config, tmp_path_factory):
    """Give the run with another network: name, changes of its config -> a checkpoint of fresh weights."""

    def made(name: str, **changes) -> Path:
        folder = shutil.copytree(run, tmp_path_factory.mktemp("variants") / name)
        config = load_checkpoint(run).config
        config = replace(run_config, out=folder, model=replace(config, **changes))
        (folder / CONFIG).write_text(to_yaml(config))
        torch.manual_seed(0)
        save_weights(folder, build_metris(config.model))
        return folder

    return made


@pytest.fixture
def another(run_config, tmp_path):
    """The config of a further run, with changes."""
    return lambda **changes: replace(run_config, **{"out": tmp_path / "run"} | changes)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
