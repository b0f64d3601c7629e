"""How much does it cost to let the words look at the image before they choose from it?"""

import pytest
import torch

from metris_blocks import LanguageEnhancer

N, L, C, D = 225, 21, 1024, 768


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward-backward"])
@pytest.mark.parametrize("backend", ["auto", "sdpa"])
@pytest.mark.parametrize("b", [1, 8])
@pytest.mark.benchmark(group="enhancement")
def bench_enhancement(benchmark, b, backend, backward):
    enhancer = LanguageEnhancer(D, C, backend=backend).requires_grad_(backward)
    language, visual = torch.randn(b, L, D), torch.randn(b, N, C)

    def run():
        out = enhancer(language, visual)
        return torch.autograd.grad(out.sum(), list(enhancer.parameters())) if backward else out

    benchmark(run)
