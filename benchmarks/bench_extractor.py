"""How much does the whole visual expression extractor (Eq. 1-7) cost, beside the equations written out?"""

import pytest

from benchmarks import baselines
from benchmarks.cases import (
    DTYPES,
    HEADS,
    JOINT,
    RATIO,
    SIZES,
    Case,
    D,
    L,
    Size,
    attention_flop,
    compiled,
    draw,
    rows,
)
from metris_blocks import VisualExpressionExtractor

# The size that issues and notes speak of, beside the common ones.
TRAINING = Size("stage4", 8, 225, 1024)


@pytest.mark.benchmark(group="extractor")
@rows("literal", "compiled", "sdpa", "triton", "auto", "auto compiled", sizes=[*SIZES, TRAINING])
def bench_extractor(row, device, size, dtype):
    b, n, c = size.b, size.n, size.c
    module = VisualExpressionExtractor(c, D, D, joint_dim=JOINT, num_heads=HEADS, ratio=RATIO)
    module = module.to(device, DTYPES[dtype])
    leaves = [draw(b, *shape, device=device, dtype=DTYPES[dtype]) for shape in ((n, c), (L, D))]

    def build(module):
        ways = baselines.extractor_ways(module)
        triton = baselines.on_triton(module, leaves)
        return ways | {
            "compiled": compiled(ways["literal"], size, device),
            "triton": triton if isinstance(triton, str) else lambda v, t: triton(v, t).tokens,
            "auto compiled": compiled(ways["auto"], size, device),
        }

    weights = sum(p.numel() for p in module.parameters())
    words = 2.0 * L * (D * JOINT + c * D + 22 * D * D) + attention_flop(L, L, D)
    pixels = 2.0 * n * c * (JOINT + 2 * D) + 2.0 * L * n * (JOINT + c) + attention_flop(L, n, D)
    nbytes = leaves[0].element_size() * (b * (n * c + 2 * L * D) + weights)
    # Scores that tie within rounding may choose another token, one of about r · n; here none do in float32.
    slack = 0.0 if dtype == "float32" and n == 225 else 0.02
    case = Case(leaves, build, modules=[module], flop=b * (words + pixels), nbytes=nbytes, slack=slack)
    row(case)
