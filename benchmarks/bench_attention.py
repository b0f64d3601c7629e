"""Which kernel of masked attention is fastest on tokens that are projected already?"""

from functools import partial

import pytest
from einops import rearrange

from benchmarks import baselines
from benchmarks.cases import DTYPES, HEADS, RATIO, Case, D, L, attention_flop, compiled, draw, rows
from metris_blocks.ops import explain_backends, masked_attention, top_r_mask

OURS = ("eager", "sdpa", "xformers", "triton", "auto")


@pytest.mark.benchmark(group="attention")
@rows("literal", "flex", "compiled", *OURS)
def bench_attention(row, device, size, dtype):
    b, n = size.b, size.n
    tensors = [draw(b, s, HEADS, D // HEADS, device=device, dtype=DTYPES[dtype]) for s in (L, n, n)]
    mask = top_r_mask(draw(b, L, n, device=device, dtype=DTYPES["float32"], grad=False), RATIO)

    def through(attend, query, key, value):
        q, k, v = (rearrange(x, "b s heads e -> b heads s e") for x in (query, key, value))
        return rearrange(attend(q, k, v, mask), "b heads l e -> b l heads e")

    def build():
        refusals = explain_backends(*tensors, mask) | {"auto": []}
        literal = partial(through, baselines.literal_attention)
        flex = partial(through, baselines.flex_attention)
        return {
            "literal": literal,
            "flex": compiled(flex, size, device) if device == "cuda" else "device=cpu (no backward there)",
            "compiled": compiled(literal, size, device),
        } | {
            name: "; ".join(refusals[name]) or partial(masked_attention, mask=mask, backend=name)
            for name in OURS
        }

    bytes_per_number = tensors[0].element_size()
    case = Case(
        tensors,
        build,
        flop=b * attention_flop(L, n, D),
        nbytes=bytes_per_number * 2 * b * (L + n) * D + mask.numel(),
    )
    row(case)
