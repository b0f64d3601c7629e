"""How much does Eq. 4 cost, the area average of a full-size mask included?"""

import pytest
import torch
from torch.nn import functional as F

from benchmarks.cases import DTYPES, SIZES, Case, draw, rows
from metris_blocks import PixelContrastiveLoss

IMAGE = 480


@pytest.mark.benchmark(group="contrastive")
@rows("literal", "auto", sizes=[size for size in SIZES if size.stage == "stage4"])
def bench_contrastive(row, device, size, dtype):
    module = PixelContrastiveLoss().to(device)
    scores = draw(size.b, size.n, device=device, dtype=DTYPES[dtype])
    mask = torch.rand(size.b, IMAGE, IMAGE, device=device) < 0.2

    def build(module):
        def literal(scores):
            pooled = F.adaptive_avg_pool2d(mask.to(module.log_temperature.dtype), (15, 15)).flatten(1)
            logits = scores / module.log_temperature.exp()
            loss = pooled * logits.sigmoid().log() + (1 - pooled) * (1 - logits.sigmoid()).log()
            return -loss.mean()

        return {"literal": literal, "auto": lambda scores: module(scores, mask)}

    case = Case([scores / 20], build, modules=[module], flop=float(mask.numel()), nbytes=float(mask.numel()))
    row(case)
