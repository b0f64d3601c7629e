"""DynamicMaskCrossAttention against Eq. 6 with its own weights."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from metris_blocks import DynamicMaskCrossAttention
from tests.conftest import assert_compiles_once, assert_equal
from tests.support import paper
from tests.support.strategies import masks, normal, seeds, sizes

HEADS = 2
BACKENDS = ["auto", "eager", "sdpa"]


def block(d=4, c=6, **options):
    torch.manual_seed(0)
    return DynamicMaskCrossAttention(d, c, num_heads=HEADS, mlp_ratio=1.5, **options).double()


def inputs(seed, b, l, n, d=4, c=6):
    return normal(seed, b, l, d), normal(seed + 1, b, n, c)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("norm", ["pre", "none"])
@given(data=st.data(), size=sizes("b l n", largest=4), seed=seeds)
def test_equals_paper_equation(backend, norm, data, size, seed):
    mask = data.draw(masks(*size))
    refinement = block(norm=norm, backend=backend)
    aggregated, visual = inputs(seed, *size)
    expected = paper.attention_layer(
        aggregated, visual, mask, paper.below(refinement.state_dict(), "layer"), HEADS
    )
    assert_equal(refinement(aggregated, visual, mask), expected)


def test_norm_none_has_no_parameter_beyond_the_equation():
    names = {name.split(".")[1] for name in block(norm="none").state_dict()}
    assert names == {"attention", "mlp"}


@pytest.mark.parametrize("backend", BACKENDS)
def test_word_sees_only_what_is_curated_for_it(backend):
    refinement = block(backend=backend)
    aggregated, visual = inputs(0, 1, 2, 9)
    mask = torch.zeros(1, 2, 9, dtype=torch.bool)
    mask[0, 0, :4] = mask[0, 1, 4:8] = True
    changed = visual.clone()
    changed[0, :4] += 1
    before, after = (refinement(aggregated, v, mask) for v in (visual, changed))
    assert after[0, 1].equal(before[0, 1]) and not after[0, 0].equal(before[0, 0])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("n", [9, 40])
@pytest.mark.parametrize("held", [math.nan, math.inf])
def test_what_a_token_nobody_curates_holds_reaches_nothing(backend, n, held):
    refinement = block(backend=backend)
    aggregated, visual = inputs(0, 2, 2, n)
    mask = torch.rand(2, 2, n, generator=torch.Generator().manual_seed(0)) < 0.5
    mask[..., 3] = False
    results = []
    for fill in (0.0, held):
        hidden = visual.clone()
        hidden[:, 3] = fill
        leaves = [aggregated.clone().requires_grad_(), hidden.requires_grad_()]
        out = refinement(*leaves, mask)
        results.append((out, *torch.autograd.grad(out.square().sum(), [*leaves, *refinement.parameters()])))
    for clean, poisoned in zip(*results, strict=True):
        assert clean.isfinite().all() and poisoned.equal(clean)


def test_gradient_reaches_every_parameter():
    refinement = block()
    aggregated, visual = inputs(0, 2, 3, 7)
    refinement(aggregated, visual, normal(9, 2, 3, 7) > 0).square().sum().backward()
    assert all(p.grad.abs().max() > 1e-8 for p in refinement.parameters())


def test_one_curated_token_leaves_nothing_to_choose():
    # The softmax of one logit is 1 whatever the logit: queries, keys, the norm before them get no gradient.
    refinement = block()
    aggregated, visual = inputs(0, 2, 3, 7)
    refinement(aggregated, visual, torch.arange(7).expand(2, 3, 7) == 2).square().sum().backward()
    silent = {name for name, p in refinement.named_parameters() if p.grad.abs().max() < 1e-12}
    queries = {"attention_norm.weight", "attention_norm.bias", "attention.q_proj.weight"}
    assert silent == {
        f"layer.{name}" for name in queries | {"attention.q_proj.bias", "attention.k_proj.weight"}
    }


def test_compiles_once_for_all_sizes():
    # Forward alone: the backward of this layer is compiled in test_extractor.py.
    cases = []
    for b, l, n in ((2, 3, 7), (5, 6, 9)):
        cases.append(((*inputs(0, b, l, n), normal(9, b, l, n) > 0), {}))
    assert_compiles_once(block().requires_grad_(False), cases)


@pytest.mark.parametrize(
    ("visual", "mask", "says"),
    [
        ((2, 7, 6), (2, 3, 8), "dynamic_mask 'b l n' has n=8, but visual has n=7"),
        ((2, 7, 6), (2, 4, 7), "dynamic_mask 'b l n' has l=4, but aggregated has l=3"),
        ((1, 7, 6), (2, 3, 7), "visual 'b n c' has b=1, but aggregated has b=2"),
        ((2, 7, 6), (2, 7), r"dynamic_mask has shape \(2, 7\), expected axes 'b l n'"),
    ],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_refuses_shapes_that_disagree(backend, visual, mask, says):
    visual, mask = torch.zeros(visual).double(), torch.ones(mask, dtype=torch.bool)
    with pytest.raises(ValueError, match=f"DynamicMaskCrossAttention: {says}"):
        block(backend=backend)(torch.zeros(2, 3, 4).double(), visual, mask)


def test_refuses_masks_that_are_not_bool():
    says = "DynamicMaskCrossAttention: dynamic_mask must be bool .*, got torch.float32"
    with pytest.raises(TypeError, match=says):
        block()(*inputs(0, 2, 3, 7), torch.ones(2, 3, 7))


def test_refuses_widths_other_than_its_own():
    says = r"aggregated has d=5, expected dim=4; tokens are \(b, l, d\)"
    mask = torch.ones(1, 2, 3).bool()
    with pytest.raises(ValueError, match=says):
        block()(torch.zeros(1, 2, 5), torch.zeros(1, 3, 6), mask)
    says = r"visual has c=3, expected visual_dim=6; tokens are \(b, n, c\)"
    with pytest.raises(ValueError, match=says):
        block()(torch.zeros(1, 2, 4), torch.zeros(1, 6, 3), mask)
