"""How much does Eq. 7 cost among the words of an expression?"""

import pytest

from benchmarks import baselines
from benchmarks.cases import DTYPES, SIZES, Case, D, L, attention_flop, draw, rows
from metris_blocks import VisualRelationshipSelfAttention

MLP = 4


@pytest.mark.benchmark(group="relationship")
@rows("literal", "sdpa", "triton", "auto", sizes=[size for size in SIZES if size.stage == "stage4"])
def bench_relationship(row, device, size, dtype):
    module = VisualRelationshipSelfAttention(D, mlp_ratio=MLP).to(device, DTYPES[dtype])
    leaves = [draw(size.b, L, D, device=device, dtype=DTYPES[dtype])]

    def build(module):
        def written(attend):
            return lambda x: baselines.layer(module.layer, x, None, None, attend)

        ways = {
            "literal": written(baselines.literal_attention),
            "sdpa": written(baselines.sdpa_attention),
            "auto": module,
        }
        return ways | {"triton": baselines.on_triton(module, leaves)}

    weights = sum(p.numel() for p in module.parameters())
    flop = 4.0 * L * D * D * (2 + MLP) + attention_flop(L, L, D)
    nbytes = leaves[0].element_size() * (size.b * 2 * L * D + weights)
    case = Case(leaves, build, modules=[module], flop=size.b * flop, nbytes=nbytes)
    row(case)
