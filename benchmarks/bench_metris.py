"""How much does the whole model cost: one sentence, several about one image, and a training step on them?"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

import reference_model
from benchmarks.baselines import on_backend
from benchmarks.cases import DTYPES, Case, Size, draw, rows
from reference_model.cost import multiply_adds
from reference_model.model.build import build_metris
from reference_model.model.config import ModelConfig
from reference_model.model.loss import MetrisLoss
from reference_model.model.metris import METRIS

SENTENCES, WORDS = 5, 20
# On a CPU the small model: the paper's takes seconds an image there (`metris profile`).
PRESET, N, C = ("metris_swin_b", 225, 1024) if torch.cuda.is_available() else ("metris_tiny", 36, 128)


def drawn(device: str, dtype: str, k: int) -> tuple[METRIS, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Build the model and draw one image with ``k`` sentences."""
    # The defaults are the paper's setting; a preset holds what differs.
    preset = Path(reference_model.__file__).parent / f"presets/{PRESET}.yaml"
    config = replace(ModelConfig(**yaml.safe_load(preset.read_text()).get("model", {})), pretrained=False)
    model = build_metris(config).to(device, DTYPES[dtype]).eval()
    side = config.image_size
    image = draw(1, 3, side, side, device=device, dtype=DTYPES[dtype])
    token_ids = torch.randint(5, 90, (k, WORDS), device=device)
    return model, image, token_ids, torch.ones_like(token_ids).bool()


def measured(row, build, model, image, token_ids, real) -> None:
    with torch.inference_mode():
        flop = 2.0 * len(token_ids) * multiply_adds(model, image.detach(), token_ids[:1], real[:1])[""]
    nbytes = image.element_size() * float(sum(p.numel() for p in model.parameters()))
    # A score that ties within rounding may choose another token, in bfloat16 often.
    slack = 0.0 if image.dtype == torch.float32 else 0.02
    row(Case([image], build, modules=[model], flop=flop, nbytes=nbytes, slack=slack))


@pytest.mark.benchmark(group="metris: one sentence")
@rows("literal", "auto", sizes=[Size(PRESET, 1, N, C)])
def bench_metris(row, device, size, dtype):
    """The literal way is eager attention over projected keys and values, in every block."""
    model, image, token_ids, real = drawn(device, dtype, 1)

    def build(model):
        written = on_backend(model, "eager")
        return {
            "literal": lambda image: written(image, token_ids, real).logits,
            "auto": lambda image: model(image, token_ids, real).logits,
        }

    measured(row, build, model, image, token_ids, real)


@pytest.mark.benchmark(group="metris: several sentences on one image")
@rows("literal", "auto", sizes=[Size(PRESET, SENTENCES, N, C)])
def bench_expressions(row, device, size, dtype):
    """The literal way runs the image encoder for every sentence, as the peers do; "auto" once."""
    model, image, token_ids, real = drawn(device, dtype, SENTENCES)

    def build(model):
        shared = torch.zeros(SENTENCES, dtype=torch.long, device=device)

        def encoded_anew(image):
            each = [model(image, token_ids[i : i + 1], real[i : i + 1]).logits for i in range(SENTENCES)]
            return torch.cat(each)

        return {
            "literal": encoded_anew,
            "auto": lambda image: model(image, token_ids, real, shared).logits,
        }

    measured(row, build, model, image, token_ids, real)


@pytest.mark.benchmark(group="metris: loss of several sentences on one image")
@rows("literal", "auto", sizes=[Size(PRESET, SENTENCES, N, C)])
def bench_training(row, device, size, dtype):
    """A training step but for the optimiser is forward + backward; "literal" repeats the image."""
    model, image, token_ids, real = drawn(device, dtype, SENTENCES)
    target = (torch.rand(SENTENCES, *image.shape[-2:], device=device) < 0.2).float()

    def build(model):
        loss = MetrisLoss(contrastive_weight=0.1, temperature=0.07).to(device)
        shared = torch.zeros(SENTENCES, dtype=torch.long, device=device)
        repeated = lambda image: model(image.expand(SENTENCES, -1, -1, -1), token_ids, real)
        return {
            "literal": lambda image: loss(repeated(image), target).total,
            "auto": lambda image: loss(model(image, token_ids, real, shared), target).total,
        }

    measured(row, build, model, image, token_ids, real)
