"""How much do Eq. 1-3 cost at the sizes the reference model runs, and how much of it is the selection?"""

import pytest
import torch

from metris_blocks import RelevanceCuration
from metris_blocks.ops import top_r_mask

N, L, C, D, J = 225, 21, 1024, 768, 256


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward-backward"])
@pytest.mark.parametrize("b", [1, 8])
@pytest.mark.benchmark(group="curation")
def bench_curation(benchmark, b, backward):
    curation = RelevanceCuration(C, D, J).requires_grad_(backward)
    visual, language = torch.randn(b, N, C), torch.randn(b, L, D)

    def run():
        scores, _ = curation(visual, language)
        return torch.autograd.grad(scores.sum(), list(curation.parameters())) if backward else scores

    benchmark(run)


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("b", [1, 8])
@pytest.mark.benchmark(group="curation: top-r alone")
def bench_top_r_mask(benchmark, b, padded):
    scores = torch.rand(b, L, N)
    visual_mask = torch.rand(b, N) < 0.8 if padded else None
    benchmark(top_r_mask, scores, 0.3, visual_mask=visual_mask)
