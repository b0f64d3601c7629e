"""GuidanceSet: parts side by side, and what takes no part reaches nothing."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from metris_blocks import GuidanceSet
from metris_blocks.ops import masked_attention
from tests.conftest import assert_compiles_once, assert_equal
from tests.support.strategies import normal, paddings, seeds, sizes


@st.composite
def parts(draw, b, d):
    """One to three parts, some without a mask; padding holds NaN."""
    made = []
    for i, s in enumerate(draw(st.lists(st.integers(0, 4), min_size=1, max_size=3))):
        mask = draw(st.none() | paddings(b, s)) if s else None
        tokens = normal(draw(seeds) + i, b, s, d)
        made.append((tokens if mask is None else tokens.masked_fill(~mask[..., None], math.nan), mask))
    return made


@given(data=st.data(), size=sizes("b d"))
def test_real_tokens_come_in_order_and_the_rest_is_zero(data, size):
    b, d = size
    given_parts = data.draw(parts(b, d))
    tokens, mask = GuidanceSet.join(*given_parts)
    assert tokens.shape == (*mask.shape, d) and tokens[~mask].eq(0).all()
    for i in range(b):
        real = [t[i] if m is None else t[i, m[i]] for t, m in given_parts]
        assert tokens[i, mask[i]].equal(torch.cat(real))


@given(data=st.data(), size=sizes("b d"), seed=seeds)
def test_attending_to_a_set_is_attending_to_what_takes_part(data, size, seed):
    b, d = size
    given_parts = data.draw(parts(b, d))
    tokens, mask = GuidanceSet.join(*given_parts)
    query, heads = normal(seed, b, 3, 1, d), tokens[:, :, None]
    out = masked_attention(query, heads, heads, mask)
    for i in range(b):
        real = torch.cat([t[i] if m is None else t[i, m[i]] for t, m in given_parts])[None, :, None]
        alone = masked_attention(query[i : i + 1], real, real) if real.numel() else torch.zeros(1, 3, 1, d)
        assert_equal(out[i : i + 1], alone.double())


def test_what_padding_holds_has_no_gradient():
    mask = torch.tensor([[True, False], [False, False]])
    words = normal(0, 2, 2, 3).masked_fill(~mask[..., None], math.inf).requires_grad_()
    others = normal(1, 2, 4, 3).requires_grad_()
    GuidanceSet.join((words, mask), (others, None)).tokens.square().sum().backward()
    assert words.grad[~mask].eq(0).all() and words.grad[mask].ne(0).all() and others.grad.ne(0).all()


def test_compiles_once_for_all_sizes():
    cases = []
    for b, l, s in ((2, 3, 5), (4, 6, 7)):
        mask = torch.arange(l) < l - torch.arange(b)[:, None] % 3
        cases.append(((normal(0, b, l, 8).requires_grad_(), mask, normal(1, b, s, 8).requires_grad_()), {}))
    join = lambda words, mask, others: GuidanceSet.join((words, mask), (others, None))
    assert_compiles_once(join, cases)


def test_refuses_what_does_not_fit():
    words, mask = torch.zeros(2, 3, 8), torch.ones(2, 3).bool()
    with pytest.raises(ValueError, match=r"GuidanceSet\.join: part_1 'b s1 d' has d=4, but part_0 has d=8"):
        GuidanceSet.join((words, mask), (torch.zeros(2, 5, 4), None))
    with pytest.raises(ValueError, match="part_1 'b s1 d' has b=1, but part_0 has b=2"):
        GuidanceSet.join((words, None), (torch.zeros(1, 5, 8), None))
    with pytest.raises(ValueError, match="mask_0 'b s0' has s0=4, but part_0 has s0=3"):
        GuidanceSet.join((words, torch.ones(2, 4).bool()))
    with pytest.raises(TypeError, match="mask_0 must be bool"):
        GuidanceSet.join((words, mask.long()))
    with pytest.raises(ValueError, match="at least one part"):
        GuidanceSet.join()
