"""VisualRelationshipSelfAttention against Eq. 7 with its own weights."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from metris_blocks import VisualRelationshipSelfAttention
from tests.conftest import assert_compiles_once, assert_equal
from tests.support import paper
from tests.support.strategies import normal, paddings, seeds, sizes

HEADS = 2
BACKENDS = ["auto", "eager", "sdpa"]


def block(d=4, **options):
    torch.manual_seed(0)
    return VisualRelationshipSelfAttention(d, num_heads=HEADS, mlp_ratio=1.5, **options).double()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("norm", ["pre", "none"])
@given(data=st.data(), size=sizes("b l"), seed=seeds)
def test_equals_paper_equation_and_zeros_padded_rows(backend, norm, data, size, seed):
    refined, mask = normal(seed, *size, 4), data.draw(st.none() | paddings(*size))
    relationship = block(norm=norm, backend=backend)
    expected = paper.attention_layer(
        paper.without_padding(refined, mask),
        None,
        mask,
        paper.below(relationship.state_dict(), "layer"),
        HEADS,
    )
    assert_equal(relationship(refined, mask), paper.without_padding(expected, mask))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("norm", ["pre", "none"])
@pytest.mark.parametrize("held", [math.nan, math.inf, 1e30])
def test_what_padding_holds_changes_nothing(backend, norm, held):
    relationship, refined = block(norm=norm, backend=backend), normal(0, 3, 5, 4)
    mask = torch.arange(5) < torch.tensor([[5], [2], [0]])
    results = []
    for fill in (0.0, held):
        leaf = refined.masked_fill(~mask[..., None], fill).requires_grad_()
        out = relationship(leaf, mask)
        results.append((out, *torch.autograd.grad(out.square().sum(), [leaf, *relationship.parameters()])))
    for clean, poisoned in zip(*results, strict=True):
        assert clean.isfinite().all() and poisoned.equal(clean)
    assert results[1][0][~mask].eq(0).all() and results[1][1][~mask].eq(0).all()


def test_padding_further_changes_nothing():
    relationship, refined = block(), normal(0, 2, 5, 4)
    mask = torch.arange(5) < torch.tensor([[5], [2]])
    longer = torch.nn.functional.pad(refined, (0, 0, 0, 3), value=math.nan)
    out = relationship(longer, torch.nn.functional.pad(mask, (0, 3), value=False))
    assert_equal(out[:, :5], relationship(refined, mask))


@given(sizes("b l"), seeds)
def test_words_in_another_order_give_the_same_words(size, seed):
    refined = normal(seed, *size, 4)
    order = torch.randperm(size[1], generator=torch.Generator().manual_seed(seed))
    assert_equal(block()(refined[:, order]), block()(refined)[:, order])


def test_gradient_reaches_every_parameter():
    relationship = block()
    relationship(normal(0, 2, 5, 4)).square().sum().backward()
    assert all(p.grad.abs().max() > 1e-8 for p in relationship.parameters())


def test_one_word_leaves_nothing_to_choose():
    # The softmax of one logit is 1 whatever the logit: queries and keys get no gradient.
    relationship = block()
    relationship(normal(0, 2, 1, 4)).square().sum().backward()
    silent = {name for name, p in relationship.named_parameters() if p.grad.abs().max() < 1e-12}
    assert silent == {f"layer.attention.{name}" for name in ("q_proj.weight", "q_proj.bias", "k_proj.weight")}


def test_compiles_once_for_all_sizes():
    # Forward alone: the backward of this layer is compiled in test_extractor.py.
    cases = []
    for b, l in ((2, 3), (5, 7)):
        mask = torch.arange(l) < l - torch.arange(b)[:, None] % l
        cases.append(((normal(0, b, l, 4), mask), {}))
    assert_compiles_once(block().requires_grad_(False), cases)


@pytest.mark.parametrize(
    ("mask", "error", "says"),
    [
        (torch.ones(2, 6, dtype=torch.bool), ValueError, "language_mask 'b l' has l=6, but refined has l=5"),
        (torch.ones(2, 5), TypeError, "language_mask must be bool .*, got torch.float32"),
    ],
)
def test_refuses_a_wrong_mask(mask, error, says):
    with pytest.raises(error, match=f"VisualRelationshipSelfAttention: {says}"):
        block()(normal(0, 2, 5, 4), mask)


@pytest.mark.parametrize("mask", [None, torch.ones(1, 2).bool()])
def test_refuses_a_width_other_than_its_own(mask):
    says = r"VisualRelationshipSelfAttention: refined has d=5, expected dim=4; tokens are \(b, l, d\)"
    with pytest.raises(ValueError, match=says):
        VisualRelationshipSelfAttention(4, num_heads=2)(torch.zeros(1, 2, 5), mask)
