"""LanguageEnhancer: cross-attention layers of the form of Eq. 6, against the oracle with its own weights."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from metris_blocks import LanguageEnhancer
from tests.conftest import assert_compiles_once, assert_equal
from tests.support import paper
from tests.support.strategies import normal, paddings, seeds, sizes

HEADS = 2
BACKENDS = ["auto", "eager", "sdpa"]


def block(d=4, c=6, depth=2, **options):
    torch.manual_seed(0)
    return LanguageEnhancer(d, c, depth=depth, num_heads=HEADS, mlp_ratio=1.5, **options).double()


def inputs(seed, b, l, n, d=4, c=6):
    return normal(seed, b, l, d), normal(seed + 1, b, n, c)


@pytest.mark.parametrize("backend", BACKENDS)
@given(
    data=st.data(),
    size=sizes("b l n", largest=3),
    seed=seeds,
    depth=st.integers(0, 2),
    norm=st.sampled_from(["pre", "none"]),
)
def test_equals_stacked_paper_layers(backend, data, size, seed, depth, norm):
    b, l, n = size
    enhancer = block(depth=depth, norm=norm, backend=backend)
    masks = {
        "visual_mask": data.draw(st.none() | paddings(b, n)),
        "language_mask": data.draw(st.none() | paddings(b, l)),
    }
    expected = paper.enhance(*inputs(seed, *size), enhancer.state_dict(), HEADS, **masks)
    assert_equal(enhancer(*inputs(seed, *size), **masks), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("held", [math.nan, math.inf, 1e30])
@pytest.mark.parametrize("n", [6, 40])
def test_what_padding_holds_changes_nothing(backend, held, n):
    enhancer, (language, visual) = block(backend=backend), inputs(0, 3, 4, n)
    visual_mask = torch.arange(n) < torch.tensor([[n], [3], [0]])
    language_mask = torch.arange(4) < torch.tensor([[4], [2], [3]])
    results = []
    for fill in (0.0, held):
        leaves = [
            language.masked_fill(~language_mask[..., None], fill).requires_grad_(),
            visual.masked_fill(~visual_mask[..., None], fill).requires_grad_(),
        ]
        out = enhancer(*leaves, visual_mask=visual_mask, language_mask=language_mask)
        results.append((out, *torch.autograd.grad(out.square().sum(), [*leaves, *enhancer.parameters()])))
    for clean, poisoned in zip(*results, strict=True):
        assert clean.isfinite().all() and poisoned.equal(clean)
    out, language_grad, visual_grad, *_ = results[1]
    assert out[~language_mask].eq(0).all() and language_grad[~language_mask].eq(0).all()
    assert visual_grad[~visual_mask].eq(0).all()


def test_order_of_visual_tokens_does_not_matter():
    language, visual = inputs(0, 2, 3, 9)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    assert_equal(block()(language, visual[:, order]), block()(language, visual))


def test_gradient_reaches_every_parameter():
    enhancer = block()
    enhancer(*inputs(0, 2, 3, 7)).square().sum().backward()
    assert all(p.grad.abs().max() > 1e-8 for p in enhancer.parameters())


def test_compiles_once_for_all_sizes():
    # Forward alone: the backward of this layer is compiled in test_extractor.py.
    cases = []
    for b, l, n in ((2, 3, 7), (5, 6, 9)):
        masks = {"visual_mask": torch.arange(n) < n - torch.arange(b)[:, None]}
        masks["language_mask"] = torch.arange(l).expand(b, l) < l - 1
        cases.append((inputs(0, b, l, n), masks))
    assert_compiles_once(block(depth=1).requires_grad_(False), cases)


def test_refuses_a_negative_depth():
    with pytest.raises(ValueError, match="LanguageEnhancer: depth must be >= 0, got -1"):
        LanguageEnhancer(4, 6, depth=-1)


@pytest.mark.parametrize(
    ("masks", "error", "says"),
    [
        (
            {"visual_mask": torch.ones(2, 8).bool()},
            ValueError,
            "visual_mask 'b n' has n=8, but visual has n=7",
        ),
        ({"visual_mask": torch.ones(2, 7)}, TypeError, "visual_mask must be bool .*, got torch.float32"),
        (
            {"language_mask": torch.ones(2, 4).bool()},
            ValueError,
            "language_mask 'b l' has l=4, but language has",
        ),
        ({"language_mask": torch.ones(2, 3)}, TypeError, "language_mask must be bool .*, got torch.float32"),
    ],
)
def test_refuses_a_wrong_mask(masks, error, says):
    with pytest.raises(error, match=f"LanguageEnhancer: {says}"):
        block()(*inputs(0, 2, 3, 7), **masks)


def test_refuses_batches_that_disagree():
    with pytest.raises(ValueError, match="LanguageEnhancer: visual 'b n c' has b=3, but language has b=2"):
        block()(normal(0, 2, 3, 4), normal(1, 3, 7, 6))


def test_refuses_widths_other_than_its_own():
    with pytest.raises(ValueError, match=r"LanguageEnhancer: language has d=5, expected language_dim=4; "):
        block()(torch.zeros(1, 2, 5), torch.zeros(1, 3, 6))
    with pytest.raises(ValueError, match=r"LanguageEnhancer: visual has c=5, expected visual_dim=6; "):
        block()(torch.zeros(1, 2, 4), torch.zeros(1, 3, 5))
