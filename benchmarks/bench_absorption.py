"""What does it save not to project n tokens to keys and values, beside what torch's own module costs?"""

from functools import partial

import pytest

from benchmarks import baselines
from benchmarks.cases import DTYPES, HEADS, RATIO, Case, D, L, attention_flop, compiled, draw, rows
from metris_blocks.layers import MultiHeadAttention
from metris_blocks.ops import absorbed_attention, top_r_mask


def absorbed(module, x, context, mask):
    out = absorbed_attention(
        x,
        context,
        mask,
        module.q_proj.weight,
        module.k_proj.weight,
        module.v_proj.weight,
        num_heads=module.num_heads,
        query_bias=module.q_proj.bias,
        value_bias=module.v_proj.bias,
    )
    return module.out_proj(out)


@pytest.mark.benchmark(group="attention with its projections")
@rows("literal", "compiled", "torch.nn.MultiheadAttention", "sdpa", "absorbed", "auto")
def bench_absorption(row, device, size, dtype):
    b, n, c = size.b, size.n, size.c
    module = MultiHeadAttention(D, c, num_heads=HEADS).to(device, DTYPES[dtype])
    leaves = [draw(b, *shape, device=device, dtype=DTYPES[dtype]) for shape in ((L, D), (n, c))]
    mask = top_r_mask(draw(b, L, n, device=device, dtype=DTYPES["float32"], grad=False), RATIO)

    def build(module):
        literal = lambda x, v: baselines.projected(module, x, v, mask, baselines.literal_attention)
        return {
            "literal": literal,
            "compiled": compiled(literal, size, device),
            "torch.nn.MultiheadAttention": partial(baselines.torch_multihead, module, mask=mask),
            "sdpa": lambda x, v: baselines.projected(module, x, v, mask, baselines.sdpa_attention),
            "absorbed": partial(absorbed, module, mask=mask),
            "auto": partial(module, mask=mask),
        }

    weights = sum(p.numel() for p in module.parameters())
    case = Case(
        leaves,
        build,
        modules=[module],
        flop=b * (4.0 * L * D * D + 4.0 * n * c * D + attention_flop(L, n, D)),
        nbytes=leaves[0].element_size() * (b * (2 * L * D + n * c) + weights) + mask.numel(),
    )
    row(case)
