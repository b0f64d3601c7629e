"""How much does Eq. 5 cost, and how much of it is Repeat(F_v, L)?"""

from functools import partial

import pytest

from benchmarks import baselines
from benchmarks.cases import DTYPES, RATIO, Case, L, compiled, draw, rows
from metris_blocks.ops import masked_softmax_aggregation, top_r_mask
from metris_blocks.ops.backends import triton


@pytest.mark.benchmark(group="aggregation")
@rows("literal", "compiled", "matmul", "triton", "auto")
def bench_aggregation(row, device, size, dtype):
    b, n, c = size.b, size.n, size.c
    scores = draw(b, L, n, device=device, dtype=DTYPES["float32"])
    visual = draw(b, n, c, device=device, dtype=DTYPES[dtype])
    mask = top_r_mask(scores, RATIO)

    def with_mask(function, scores, visual, **options):
        return function(scores, mask, visual, **options)

    def build():
        why = "; ".join(triton.reasons(visual, scores))
        literal = partial(with_mask, baselines.literal_aggregation)
        return {
            "literal": literal,
            "compiled": compiled(literal, size, device),
            "matmul": partial(with_mask, baselines.matmul_aggregation),
            "triton": why or partial(with_mask, masked_softmax_aggregation, backend="triton"),
            "auto": partial(with_mask, masked_softmax_aggregation),
        }

    nbytes = 5.0 * b * L * n + visual.element_size() * b * (n + L) * c
    case = Case([scores, visual], build, flop=2.0 * b * L * n * c, nbytes=nbytes)
    row(case)
