"""absorbed_attention against projecting and attending: the same function, reassociated."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from metris_blocks.layers import MultiHeadAttention
from metris_blocks.ops import absorbed_attention, masked_attention
from metris_blocks.ops.absorption import absorbs
from tests.conftest import assert_compiles_once, assert_equal, assert_within_budget, with_gradients
from tests.support.strategies import mask_of, masks, normal, paddings, seeds, sizes

with_each_mask = pytest.mark.parametrize("kind", ["b l n", "b n", "none"])


def weights_of(seed, d, c, o, *, query_bias=True, value_bias=True):
    weights = [normal(seed + i, o, width) for i, width in enumerate((d, c, c))]
    return weights, normal(seed + 3, o) if query_bias else None, normal(seed + 4, o) if value_bias else None


def project_and_attend(tokens, visual, mask, query_weight, key_weight, value_weight, **options):
    """What `absorbed_attention` replaces."""
    heads, scale = options["num_heads"], options.get("scale")
    biases = options.get("query_bias"), None, options.get("value_bias")
    projected = [
        torch.nn.functional.linear(x, weight, bias).unflatten(-1, (heads, -1))
        for x, weight, bias in zip(
            (tokens, visual, visual), (query_weight, key_weight, value_weight), biases, strict=True
        )
    ]
    return masked_attention(*projected, mask, scale=scale, backend="eager").flatten(2)


# ------------------------------------------------------------------------------------------------- equation


@given(st.data(), sizes("b l n d c e"), st.integers(1, 3), seeds, st.booleans(), st.booleans())
def test_equals_projecting_in_values_and_gradients(data, size, heads, seed, query_bias, value_bias):
    b, l, n, d, c, e = size
    weights, bias_q, bias_v = weights_of(seed, d, c, heads * e, query_bias=query_bias, value_bias=value_bias)
    mask = data.draw(st.one_of(st.none(), masks(b, l, n), paddings(b, n)))
    given_biases = {"query_bias": bias_q, "value_bias": bias_v}
    biases = {name: bias for name, bias in given_biases.items() if bias is not None}
    scale = data.draw(st.sampled_from([None, 0.3]))

    def call(function):
        def run(tokens, visual, *rest):
            named = dict(zip(biases, rest[3:], strict=True))
            return function(tokens, visual, mask, *rest[:3], num_heads=heads, scale=scale, **named)

        leaves = (normal(seed + 7, b, l, d), normal(seed + 8, b, n, c), *weights, *biases.values())
        return with_gradients(run, leaves, normal(seed + 9, b, l, heads * e))

    for absorbed, projected in zip(call(absorbed_attention), call(project_and_attend), strict=True):
        largest = max(1.0, float(projected.abs().max()))
        torch.testing.assert_close(absorbed, projected, rtol=0, atol=1e-12 * largest)


# ----------------------------------------------------------------------------------------------- properties


@pytest.mark.parametrize(("l", "n", "c", "o", "heads"), [(21, 225, 1024, 768, 8), (42, 900, 48, 32, 4)])
def test_rule_counts_the_multiply_adds_of_both_ways(l, n, c, o, heads):
    counts = []
    for backend in ("auto", "sdpa"):
        attention = MultiHeadAttention(o, c, num_heads=heads, backend=backend).requires_grad_(False)
        with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
            attention(torch.zeros(1, l, o), torch.zeros(1, n, c))
        counts.append(counter.get_total_flops())
    assert absorbs(l, n, c, o, heads) == (counts[0] < counts[1])
    assert counts[0] <= counts[1]


@pytest.mark.parametrize("kind", ["b l n", "none"])
def test_frozen_visual_tokens_change_no_other_gradient(kind):
    b, l, n, d, c = 2, 3, 7, 4, 5
    weights, _, _ = weights_of(0, d, c, 6)
    tokens, visual, mask = normal(7, b, l, d), normal(8, b, n, c), mask_of(kind, 9, b, l, n)
    cotangent = normal(9, b, l, 6)
    run = lambda visual, tokens, *weights: absorbed_attention(tokens, visual, mask, *weights, num_heads=2)
    whole = with_gradients(run, (visual, tokens, *weights), cotangent)
    frozen = with_gradients(lambda *leaves: run(visual, *leaves), (tokens, *weights), cotangent)
    assert all(x.equal(y) for x, y in zip(frozen, [whole[0], *whole[2:]], strict=True))


def test_function_transforms_see_through():
    b, l, n, d, c = 3, 2, 5, 4, 6
    weights, _, _ = weights_of(0, d, c, 8)
    tokens, visual, mask = normal(7, b, l, d), normal(8, b, n, c), mask_of("b l n", 9, b, l, n)

    def one(tokens, visual, mask, key_weight):
        batch = tokens[None], visual[None], mask[None]
        return absorbed_attention(*batch, weights[0], key_weight, weights[2], num_heads=2)[0].square().sum()

    per_sample = torch.func.vmap(torch.func.grad(one, argnums=(1, 3)), (0, 0, 0, None))
    visual_grads, weight_grads = per_sample(tokens, visual, mask, weights[1])
    for i in range(b):
        leaves = visual[i].clone().requires_grad_(), weights[1].clone().requires_grad_()
        expected = torch.autograd.grad(one(tokens[i], leaves[0], mask[i], leaves[1]), leaves)
        assert_equal(visual_grads[i], expected[0], largest=100)
        assert_equal(weight_grads[i], expected[1], largest=100)


@pytest.mark.parametrize("kind", ["b l n", "b n"])
def test_assume_finite_changes_nothing_where_it_is_true(kind):
    b, l, n, d, c = 2, 3, 7, 4, 5
    weights, _, bias_v = weights_of(0, d, c, 6)
    leaves = normal(7, b, l, d), normal(8, b, n, c), *weights
    mask = mask_of(kind, 9, b, l, n)
    results = [
        with_gradients(
            lambda tokens, visual, *weights, known=known: absorbed_attention(
                tokens, visual, mask, *weights, num_heads=2, value_bias=bias_v, assume_finite=known
            ),
            leaves,
            normal(9, b, l, 6),
        )
        for known in (False, True)
    ]
    for careful, trusting in zip(*results, strict=True):
        assert_equal(trusting, careful)


@pytest.mark.parametrize("held", [math.nan, math.inf])
@pytest.mark.parametrize("kind", ["b l n", "b n"])
def test_hides_what_nobody_attends_to_and_empties_empty_rows(held, kind):
    b, l, n, d, c, heads = 2, 3, 7, 4, 5, 2
    mask = mask_of(kind, 9, b, l, n)
    mask[1, ..., 2] = False
    unseen = ~(mask.any(dim=1) if kind == "b l n" else mask)
    empty = ~(mask.any(dim=-1) if kind == "b l n" else mask.any(dim=-1, keepdim=True).expand(b, l))
    weights, bias_q, bias_v = weights_of(0, d, c, 8)
    run = lambda tokens, visual, w_q, w_k, w_v, b_q, b_v: absorbed_attention(
        tokens, visual, mask, w_q, w_k, w_v, num_heads=heads, query_bias=b_q, value_bias=b_v
    )
    results = []
    for fill in (0.0, held):
        tokens = normal(7, b, l, d).masked_fill(empty[..., None], fill)
        visual = normal(8, b, n, c).masked_fill(unseen[..., None], fill)
        leaves = (tokens, visual, *weights, bias_q, bias_v)
        results.append(with_gradients(run, leaves, torch.ones(b, l, 8, dtype=torch.float64)))
    for clean, poisoned in zip(*results, strict=True):
        assert clean.isfinite().all() and poisoned.equal(clean)
    out, tokens_grad, visual_grad, *_ = results[1]
    assert out[empty].eq(0).all() and tokens_grad[empty].eq(0).all() and visual_grad[unseen].eq(0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_stays_near_the_error_of_projecting(dtype):
    b, l, n, d, c, heads = 2, 21, 225, 32, 64, 4
    weights, bias_q, bias_v = weights_of(0, d, c, 32)
    tensors = [normal(7, b, l, d), normal(8, b, n, c), *(w / math.sqrt(w.shape[1]) for w in weights)]
    mask = mask_of("b l n", 9, b, l, n)
    options = {"num_heads": heads, "query_bias": bias_q, "value_bias": bias_v}
    low = [x.to(dtype) for x in tensors]
    low_options = {"num_heads": heads, "query_bias": bias_q.to(dtype), "value_bias": bias_v.to(dtype)}
    reference = project_and_attend(*tensors[:2], mask, *tensors[2:], **options)
    plain = project_and_attend(*low[:2], mask, *low[2:], **low_options)
    out = absorbed_attention(*low[:2], mask, *low[2:], **low_options)
    assert_within_budget(out, plain, reference)


# -------------------------------------------------------------------------------------------------- gradient


@with_each_mask
def test_gradients(kind):
    b, l, n, d, c = 1, 2, 3, 2, 3
    mask = mask_of(kind, 3, b, l, n)
    weights, bias_q, bias_v = weights_of(0, d, c, 4)
    attend = lambda tokens, visual, w_q, w_k, w_v, b_q, b_v: absorbed_attention(
        tokens, visual, mask, w_q, w_k, w_v, num_heads=2, query_bias=b_q, value_bias=b_v
    )
    leaves = [normal(7, b, l, d), normal(8, b, n, c), *weights, bias_q, bias_v]
    leaves = [x.requires_grad_() for x in leaves]
    assert torch.autograd.gradcheck(attend, leaves)
    assert torch.autograd.gradgradcheck(attend, leaves)


# --------------------------------------------------------------------------------------------------- compile


def test_compiles_once_for_all_sizes():
    cases = []
    for b, l, n, d, c in ((2, 3, 7, 4, 5), (5, 6, 9, 8, 10)):
        weights, bias_q, bias_v = weights_of(0, d, c, 12)
        leaves = [normal(7, b, l, d), normal(8, b, n, c), *weights]
        tokens, visual, *weights = (x.requires_grad_() for x in leaves)
        options = {"num_heads": 2, "query_bias": bias_q, "value_bias": bias_v.requires_grad_()}
        cases.append(((tokens, visual, mask_of("b l n", 9, b, l, n), *weights), options))
    assert_compiles_once(absorbed_attention, cases)


# -------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("shapes", "num_heads", "says"),
    [
        (((2, 3, 4), (2, 5, 6), (8, 4), (8, 7), (8, 6)), 2, "key_weight 'o c' has c=7, but visual has c=6"),
        (
            ((2, 3, 4), (2, 5, 6), (8, 5), (8, 6), (8, 6)),
            2,
            "query_weight 'o d' has d=5, but query_tokens has d=4",
        ),
        (
            ((2, 3, 4), (2, 5, 6), (8, 4), (8, 6), (9, 6)),
            2,
            "value_weight 'o c' has o=9, but query_weight has o=8",
        ),
        (
            ((2, 3, 4), (3, 5, 6), (8, 4), (8, 6), (8, 6)),
            2,
            "visual 'b n c' has b=3, but query_tokens has b=2",
        ),
        (((2, 3, 4), (2, 5, 6), (8, 4), (8, 6), (8, 6)), 3, "query_weight 'o d' has o=8, .* num_heads=3"),
    ],
)
def test_refuses_shapes_that_disagree(shapes, num_heads, says):
    tokens, visual, *weights = (torch.zeros(shape) for shape in shapes)
    with pytest.raises(ValueError, match=f"absorbed_attention: {says}"):
        absorbed_attention(tokens, visual, None, *weights, num_heads=num_heads)


def test_refuses_a_wrong_mask_and_a_wrong_bias():
    shapes = (1, 2, 4), (1, 3, 6), (8, 4), (8, 6), (8, 6)
    tokens, visual, *weights = (torch.zeros(shape) for shape in shapes)
    run = lambda mask=None, **biases: absorbed_attention(
        tokens, visual, mask, *weights, num_heads=2, **biases
    )
    with pytest.raises(TypeError, match=r"absorbed_attention: mask must be bool .*, got torch.float32"):
        run(torch.zeros(1, 2, 3))
    with pytest.raises(ValueError, match="absorbed_attention: mask 'b n' has n=4, but visual has n=3"):
        run(torch.ones(1, 4, dtype=torch.bool))
    with pytest.raises(
        ValueError, match="absorbed_attention: value_bias 'o' has o=7, but query_weight has o=8"
    ):
        run(value_bias=torch.zeros(7))
