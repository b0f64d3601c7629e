"""How much does Eq. 6 cost, with keys and values absorbed ("auto") and projected?"""

import pytest

from benchmarks import baselines
from benchmarks.cases import DTYPES, RATIO, Case, D, L, attention_flop, draw, rows
from metris_blocks import DynamicMaskCrossAttention
from metris_blocks.ops import top_r_mask

MLP = 4


@pytest.mark.benchmark(group="refinement")
@rows("literal", "sdpa", "triton", "auto")
def bench_refinement(row, device, size, dtype):
    b, n, c = size.b, size.n, size.c
    module = DynamicMaskCrossAttention(D, c, mlp_ratio=MLP).to(device, DTYPES[dtype])
    leaves = [draw(b, *shape, device=device, dtype=DTYPES[dtype]) for shape in ((L, D), (n, c))]
    mask = top_r_mask(draw(b, L, n, device=device, dtype=DTYPES["float32"], grad=False), RATIO)

    def build(module):
        def written(attend):
            return lambda x, v: baselines.layer(module.layer, x, v, mask, attend)

        ways = {
            "literal": written(baselines.literal_attention),
            "sdpa": written(baselines.sdpa_attention),
            "auto": lambda x, v: module(x, v, mask),
        }
        return ways | {"triton": baselines.on_triton(module, leaves, mask)}

    weights = sum(p.numel() for p in module.parameters())
    flop = 4.0 * L * D * D * (1 + MLP) + 4.0 * n * c * D + attention_flop(L, n, D)
    nbytes = leaves[0].element_size() * (b * (2 * L * D + n * c) + weights) + mask.numel()
    case = Case(leaves, build, modules=[module], flop=b * flop, nbytes=nbytes)
    row(case)
