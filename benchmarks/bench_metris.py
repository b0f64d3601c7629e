"""How much does the whole model cost: several sentences on one image, and a training step on them?

"literal" runs the image encoder for every sentence, as the peers do; "auto" once.
"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

import reference_model
from benchmarks.cases import DTYPES, Case, Size, draw, rows
from reference_model.model.config import ModelConfig
from reference_model.model.metris import build_metris

SENTENCES, WORDS = 5, 20
# On a CPU the small model: the paper's takes seconds an image there (`metris profile`).
PRESET = "metris_swin_b" if torch.cuda.is_available() else "metris_tiny"


@pytest.mark.benchmark(group="metris: sentences on one image")
@rows("literal", "auto", sizes=[Size(PRESET, 1, 225, 1024)])
def bench_metris(row, device, size, dtype):
    # The defaults are the paper's setting; a preset holds what differs.
    differences = yaml.safe_load(
        (Path(reference_model.__file__).parent / f"presets/{PRESET}.yaml").read_text()
    )
    config = replace(ModelConfig(**differences.get("model", {})), pretrained=False)
    model = build_metris(config).to(device, DTYPES[dtype]).eval()
    side = config.image_size
    image = draw(1, 3, side, side, device=device, dtype=DTYPES[dtype])
    token_ids = torch.randint(5, 90, (SENTENCES, WORDS), device=device)
    real = torch.ones(SENTENCES, WORDS, dtype=torch.bool, device=device)

    def build(model):
        def encoded_once(image):
            features = model.encode_image(image)
            shared = torch.zeros(SENTENCES, dtype=torch.long, device=image.device)
            return model.refer(features.select(shared), token_ids, real).logits

        def encoded_anew(image):
            each = [model(image, token_ids[i : i + 1], real[i : i + 1]).logits for i in range(SENTENCES)]
            return torch.cat(each)

        return {"literal": encoded_anew, "auto": encoded_once}

    weights = sum(p.numel() for p in model.parameters())
    case = Case([image], build, modules=[model], flop=0.0, nbytes=image.element_size() * float(weights))
    row(case)
