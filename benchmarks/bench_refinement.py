"""How much does Eq. 6 cost, with keys and values absorbed ("auto") and projected (a named backend)?"""

import pytest
import torch

from metris_blocks import DynamicMaskCrossAttention

N, L, C, D = 225, 21, 1024, 768


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward-backward"])
@pytest.mark.parametrize("backend", ["auto", "eager", "sdpa"])
@pytest.mark.parametrize("b", [1, 8])
@pytest.mark.benchmark(group="refinement")
def bench_refinement(benchmark, b, backend, backward):
    refinement = DynamicMaskCrossAttention(D, C, backend=backend).requires_grad_(backward)
    aggregated, visual, mask = torch.randn(b, L, D), torch.randn(b, N, C), torch.rand(b, L, N) < 0.3

    def run():
        out = refinement(aggregated, visual, mask)
        return torch.autograd.grad(out.sum(), list(refinement.parameters())) if backward else out

    benchmark(run)
