"""How much does Eq. 4 cost, the area average of a full-size mask included?"""

import pytest
import torch

from metris_blocks import PixelContrastiveLoss

N, IMAGE = 225, 480


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward-backward"])
@pytest.mark.parametrize("b", [1, 8])
@pytest.mark.benchmark(group="contrastive")
def bench_contrastive(benchmark, b, backward):
    loss_of = PixelContrastiveLoss().requires_grad_(backward)
    scores = (torch.rand(b, N) * 2 - 1).requires_grad_(backward)
    mask = torch.rand(b, IMAGE, IMAGE) < 0.2

    def run():
        loss = loss_of(scores, mask)
        return torch.autograd.grad(loss, (scores, loss_of.log_temperature)) if backward else loss

    benchmark(run)
