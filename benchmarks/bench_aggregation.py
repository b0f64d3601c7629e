"""How much does Eq. 5 cost at the sizes the reference model runs?"""

import pytest
import torch

from metris_blocks.ops import masked_softmax_aggregation, top_r_mask

N, L, C = 225, 21, 1024


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward-backward"])
@pytest.mark.parametrize("b", [1, 8])
@pytest.mark.benchmark(group="aggregation")
def bench_aggregation(benchmark, b, backward):
    scores = torch.rand(b, L, N).requires_grad_(backward)
    visual = torch.randn(b, N, C, requires_grad=backward)
    mask = top_r_mask(scores, 0.3)

    def run():
        out = masked_softmax_aggregation(scores, mask, visual)
        return torch.autograd.grad(out.sum(), (scores, visual)) if backward else out

    benchmark(run)
