"""How much does the whole visual expression extractor (Eq. 1-7) cost?"""

import pytest
import torch

from metris_blocks import VisualExpressionExtractor

N, L, C, D = 225, 21, 1024, 768


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward-backward"])
@pytest.mark.parametrize("backend", ["auto", "sdpa"])
@pytest.mark.parametrize("b", [1, 8])
@pytest.mark.benchmark(group="extractor")
def bench_extractor(benchmark, b, backend, backward):
    extractor = VisualExpressionExtractor(C, D, D, backend=backend).requires_grad_(backward)
    visual, language = torch.randn(b, N, C), torch.randn(b, L, D)
    language_mask = (torch.arange(L) < 15).expand(b, L)

    def run():
        tokens = extractor(visual, language, language_mask=language_mask).tokens
        return torch.autograd.grad(tokens.sum(), list(extractor.parameters())) if backward else tokens

    benchmark(run)
