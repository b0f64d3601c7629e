"""How much do Eq. 2-3 cost: cosine scores, and the exact selection of the top r?"""

from functools import partial

import pytest

from benchmarks import baselines
from benchmarks.cases import DTYPES, JOINT, RATIO, Case, L, compiled, draw, rows
from metris_blocks.ops import cosine_relevance, top_r_mask
from metris_blocks.ops.backends import triton


@pytest.mark.benchmark(group="curation: scores")
@rows("literal", "compiled", "triton", "auto")
def bench_relevance(row, device, size, dtype):
    b, n = size.b, size.n
    leaves = [draw(b, s, JOINT, device=device, dtype=DTYPES[dtype]) for s in (n, L)]

    def build():
        why = "; ".join(triton.reasons(*leaves))
        return {
            "literal": baselines.literal_relevance,
            "compiled": compiled(baselines.literal_relevance, size, device),
            "triton": why or partial(cosine_relevance, backend="triton"),
            "auto": cosine_relevance,
        }

    nbytes = leaves[0].element_size() * b * (n + L) * JOINT + 4.0 * b * L * n
    case = Case(leaves, build, flop=2.0 * b * (L * n + n + L) * JOINT, nbytes=nbytes)
    row(case)


@pytest.mark.benchmark(group="curation: selection")
@rows("literal", "triton", "auto")
def bench_selection(row, device, size, dtype):
    b, n = size.b, size.n
    # As many distinct scores as float32 holds: torch.topk, the literal way, leaves ties open.
    ranks = draw(b, L, n, device=device, dtype=DTYPES["float32"], grad=False).argsort(dim=-1)
    scores = ranks.float() / n

    def build():
        why = "; ".join(triton.reasons(scores))
        return {
            "literal": lambda scores: baselines.literal_selection(scores, RATIO).float(),
            "triton": why or (lambda scores: top_r_mask(scores, RATIO, backend="triton").float()),
            "auto": lambda scores: top_r_mask(scores, RATIO).float(),
        }

    case = Case([scores], build, flop=float(b * L * n), nbytes=5.0 * b * L * n)
    row(case)
