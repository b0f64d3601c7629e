"""Which backend of masked attention is fastest at the sizes the reference model runs?"""

import pytest
import torch

from metris_blocks.ops import explain_backends, masked_attention

N, L, C, D, HEADS = 225, 21, 1024, 768, 8


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward-backward"])
@pytest.mark.parametrize("backend", ["eager", "sdpa", "xformers", "triton"])
@pytest.mark.parametrize("b", [1, 8])
@pytest.mark.benchmark(group="attention on projected tokens")
def bench_masked_attention(benchmark, b, backend, backward):
    leaves = [torch.randn(b, s, HEADS, D // HEADS, requires_grad=backward) for s in (L, N, N)]
    mask = torch.rand(b, L, N) < 0.3
    if why := explain_backends(*leaves, mask)[backend]:
        pytest.skip(f"{backend}: {'; '.join(why)}")

    def run():
        out = masked_attention(*leaves, mask, backend=backend)
        return torch.autograd.grad(out.sum(), leaves) if backward else out

    benchmark(run)
