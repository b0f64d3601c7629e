"""How much does it cost to let the words look at the image before they choose from it?"""

import pytest

from benchmarks import baselines
from benchmarks.cases import DTYPES, Case, D, L, attention_flop, draw, rows
from metris_blocks import LanguageEnhancer

MLP = 4


@pytest.mark.benchmark(group="enhancement")
@rows("literal", "sdpa", "triton", "auto")
def bench_enhancement(row, device, size, dtype):
    b, n, c = size.b, size.n, size.c
    module = LanguageEnhancer(D, c, depth=1, mlp_ratio=MLP).to(device, DTYPES[dtype])
    leaves = [draw(b, *shape, device=device, dtype=DTYPES[dtype]) for shape in ((L, D), (n, c))]

    def build(module):
        def written(attend):
            return lambda x, v: baselines.layer(module.layers[0], x, v, None, attend)

        ways = {
            "literal": written(baselines.literal_attention),
            "sdpa": written(baselines.sdpa_attention),
            "auto": module,
        }
        return ways | {"triton": baselines.on_triton(module, leaves)}

    weights = sum(p.numel() for p in module.parameters())
    flop = 4.0 * L * D * D * (1 + MLP) + 4.0 * n * c * D + attention_flop(L, n, D)
    nbytes = leaves[0].element_size() * (b * (2 * L * D + n * c) + weights)
    case = Case(leaves, build, modules=[module], flop=b * flop, nbytes=nbytes)
    row(case)
