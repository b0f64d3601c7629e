"""How much does it save not to project n tokens to keys and values?"""

import pytest
import torch

from metris_blocks.ops import absorbed_attention, masked_attention

N, L, C, D, HEADS = 225, 21, 1024, 768, 8


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward-backward"])
@pytest.mark.parametrize("absorbed", [True, False], ids=["absorbed", "projected"])
@pytest.mark.parametrize("b", [1, 8])
@pytest.mark.benchmark(group="attention with its projections")
def bench_projected_attention(benchmark, b, absorbed, backward):
    weights = [torch.randn(D, width, requires_grad=backward) / width**0.5 for width in (D, C, C)]
    tokens, visual = torch.randn(b, L, D), torch.randn(b, N, C)
    mask = torch.rand(b, L, N) < 0.3

    def attend():
        if absorbed:
            return absorbed_attention(tokens, visual, mask, *weights, num_heads=HEADS)
        pairs = zip((tokens, visual, visual), weights, strict=True)
        projected = [torch.nn.functional.linear(x, w).unflatten(-1, (HEADS, -1)) for x, w in pairs]
        return masked_attention(*projected, mask).flatten(2)

    def run():
        out = attend()
        return torch.autograd.grad(out.sum(), weights) if backward else out

    benchmark(run)
