"""MaskedSoftmaxAggregation: Eq. 5, then its projection."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from metris_blocks import MaskedSoftmaxAggregation
from tests.conftest import assert_compiles_once, assert_equal
from tests.support import paper
from tests.support.strategies import distinct_scores, masks, normal, seeds, sizes


def block(c=5, d=4, **options):
    torch.manual_seed(0)
    return MaskedSoftmaxAggregation(c, d, **options).double()


@given(st.data(), sizes("b l n"), seeds, st.floats(0.1, 3), st.booleans())
def test_equals_paper_equation_then_a_projection(data, size, seed, temperature, divide_by_count):
    mask = data.draw(masks(*size))
    scores, visual = distinct_scores(seed, *size), normal(seed, size[0], size[2], 5)
    options = {"temperature": temperature, "divide_by_count": divide_by_count}
    aggregation = block(**options)
    aggregated = paper.eq5_aggregate(scores, mask, visual, **options)
    expected = paper.linear(aggregated, paper.below(aggregation.state_dict(), "proj"))
    assert_equal(aggregation(scores, mask, visual), expected)


def test_defaults_are_the_equation_as_printed():
    scores, visual = distinct_scores(0, 1, 2, 6), normal(0, 1, 6, 5)
    aggregated = paper.eq5_aggregate(scores, scores > 0, visual)
    expected = paper.linear(aggregated, paper.below(block().state_dict(), "proj"))
    assert_equal(block()(scores, scores > 0, visual), expected)


def test_gradient_reaches_scores_visual_and_every_parameter():
    aggregation = block()
    scores, visual = distinct_scores(0, 2, 3, 6).requires_grad_(), normal(0, 2, 6, 5).requires_grad_()
    out = aggregation(scores, scores > -0.5, visual)
    grads = torch.autograd.grad(out.square().sum(), [scores, visual, *aggregation.parameters()])
    assert all(grad.ne(0).any() for grad in grads)


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
def test_finite_under_autocast(autocast):
    aggregation = block(64, 8).float()
    scores, visual = distinct_scores(0, 2, 3, 225).float(), normal(0, 2, 225, 64).float()
    scores.requires_grad_()
    with torch.autocast("cpu", dtype=autocast):
        out = aggregation(scores, scores > 0.4, visual)
    out.float().square().sum().backward()
    assert out.isfinite().all() and scores.grad.isfinite().all() and scores.grad.ne(0).any()


def test_compiles_once_for_all_sizes():
    cases = []
    for b, l, n in ((2, 3, 7), (6, 8, 10)):
        scores, visual = distinct_scores(0, b, l, n), normal(0, b, n, 5)
        cases.append(((scores.requires_grad_(), scores > 0.5, visual.requires_grad_()), {}))
    assert_compiles_once(block(), cases)


@pytest.mark.parametrize("temperature", [0, -1, math.nan])
def test_refuses_a_temperature_that_is_not_positive(temperature):
    says = f"MaskedSoftmaxAggregation: temperature must be > 0, got {temperature:g}"
    with pytest.raises(ValueError, match=says):
        MaskedSoftmaxAggregation(5, 4, temperature=temperature)


def test_refuses_shapes_that_disagree():
    with pytest.raises(ValueError, match="dynamic_mask 'b l n' has n=7, but scores has n=6"):
        block()(torch.zeros(1, 2, 6), torch.ones(1, 2, 7, dtype=torch.bool), torch.zeros(1, 6, 5))


def test_refuses_a_width_other_than_its_own():
    says = r"MaskedSoftmaxAggregation: visual has c=49, expected visual_dim=64; tokens are \(b, n, c\)"
    with pytest.raises(ValueError, match=says):
        MaskedSoftmaxAggregation(64, 32)(
            torch.zeros(1, 2, 64), torch.ones(1, 2, 64).bool(), torch.zeros(1, 64, 49)
        )
