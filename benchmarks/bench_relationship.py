"""How much does Eq. 7 cost among the words of an expression?"""

import pytest
import torch

from metris_blocks import VisualRelationshipSelfAttention

L, D = 21, 768


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward-backward"])
@pytest.mark.parametrize("b", [1, 8])
@pytest.mark.benchmark(group="relationship")
def bench_relationship(benchmark, b, backward):
    relationship = VisualRelationshipSelfAttention(D).requires_grad_(backward)
    refined, language_mask = torch.randn(b, L, D), (torch.arange(L) < 15).expand(b, L)

    def run():
        out = relationship(refined, language_mask)
        return torch.autograd.grad(out.sum(), list(relationship.parameters())) if backward else out

    benchmark(run)
