"""GlobalCue: the last word, the mean or a weighting of the real words, whatever padding there is."""

import math
from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from metris_blocks import GlobalCue
from metris_blocks.cue import Cue
from tests.conftest import assert_compiles_once, assert_equal
from tests.support.strategies import normal, paddings, seeds, sizes

KINDS = [kind for kind in get_args(Cue) if kind != "first"]


def cue_by_loop(kind, query, words):
    """The cue of one sentence without padding, (l, d) -> (d)."""
    if not len(words):
        return torch.zeros(words.shape[1], dtype=words.dtype)
    if kind == "last":
        return words[-1]
    logits = [
        0.0 if kind == "mean" else float(word @ query.detach()) / math.sqrt(len(word)) for word in words
    ]
    weights = torch.tensor(logits, dtype=torch.float64).softmax(0)
    return sum(weight * word for weight, word in zip(weights, words, strict=True))


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data(), size=sizes("b l"), seed=seeds)
def test_cue_is_that_of_the_real_words(kind, data, size, seed):
    cue = GlobalCue(5, kind).double()
    if kind == "learned":
        assert_equal(cue(normal(seed, *size, 5))[0], GlobalCue(5, "mean")(normal(seed, *size, 5))[0])
        cue.query.data = normal(seed + 1, 5)
    language, mask = normal(seed, *size, 5), data.draw(paddings(*size))
    found, found_mask = cue(language.masked_fill(~mask[..., None], math.nan), mask)
    for i, real in enumerate(mask):
        assert_equal(found[i, 0], cue_by_loop(kind, getattr(cue, "query", None), language[i, real]).detach())
    assert found[:, 1:].equal(language.masked_fill(~mask[..., None], 0))
    assert found_mask[:, 1:].equal(mask) and found_mask[:, 0].equal(mask.any(dim=1))


@pytest.mark.parametrize("kind", KINDS)
def test_compiles_once_for_all_sizes(kind):
    cases = []
    for b, l in ((3, 4), (5, 7)):
        language = normal(0, b, l, 5).requires_grad_()
        cases.append(((language, torch.arange(l) < l - torch.arange(b)[:, None] % 3), {}))
    assert_compiles_once(GlobalCue(5, kind).double(), cases)


def test_refuses_an_unknown_kind():
    for kind in ("cls", "first"):
        with pytest.raises(
            ValueError, match=r"global_cue must be one of \['first', 'last', 'mean', 'learned'\]"
        ):
            GlobalCue(5, kind)


def test_refuses_what_does_not_fit():
    cue, words = GlobalCue(5, "mean"), torch.zeros(2, 3, 5)
    with pytest.raises(
        ValueError, match=r"GlobalCue: language has d=4, expected language_dim=5; .*\(b, l, d\)"
    ):
        cue(torch.zeros(2, 3, 4))
    with pytest.raises(ValueError, match="GlobalCue: language_mask 'b l' has l=4, but language has l=3"):
        cue(words, torch.ones(2, 4).bool())
    with pytest.raises(TypeError, match="GlobalCue: language_mask must be bool"):
        cue(words, torch.ones(2, 3))
