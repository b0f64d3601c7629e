"""RelevanceCuration against Eq. 1-3 with its own weights, and what padding may not do."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from metris_blocks import RelevanceCuration
from metris_blocks.ops import cosine_relevance, top_r_mask
from tests.conftest import assert_compiles_once, assert_equal
from tests.support import paper
from tests.support.strategies import normal, paddings, ratios, seeds, sizes

SIZES = sizes("b l n")


def block(ratio=0.3, c=5, d=4, j=6):
    torch.manual_seed(0)
    return RelevanceCuration(c, d, j, ratio=ratio).double()


def inputs(seed, b, l, n, c=5, d=4):
    return normal(seed, b, n, c), normal(seed + 1, b, l, d)


@given(st.data(), SIZES, seeds, ratios)
def test_equals_paper_equations(data, size, seed, ratio):
    b, l, n = size
    curation = block(ratio)
    masks = {
        "visual_mask": data.draw(st.none() | paddings(b, n)),
        "language_mask": data.draw(st.none() | paddings(b, l)),
    }
    out = curation(*inputs(seed, *size), **masks)
    scores, mask = paper.curate(*inputs(seed, *size), curation.state_dict(), ratio, **masks)
    assert_equal(out.scores, scores)
    assert out.dynamic_mask.equal(mask)


@pytest.mark.parametrize("held", [0.0, math.nan, math.inf, 1e30])
def test_what_padding_holds_changes_nothing(held):
    curation, (visual, language) = block(), inputs(0, 3, 4, 9)
    visual_mask = torch.arange(9) < torch.tensor([[9], [5], [0]])
    language_mask = torch.arange(4) < torch.tensor([[4], [2], [3]])
    results = []
    for fill in (1.0, held):
        leaves = [
            visual.masked_fill(~visual_mask[..., None], fill).requires_grad_(),
            language.masked_fill(~language_mask[..., None], fill).requires_grad_(),
        ]
        out = curation(*leaves, visual_mask=visual_mask, language_mask=language_mask)
        grads = torch.autograd.grad(out.scores.square().sum(), [*leaves, *curation.parameters()])
        results.append((*out, *grads))
    for clean, poisoned in zip(*results, strict=True):
        assert clean.isfinite().all() and poisoned.equal(clean)
    scores, mask, visual_grad, language_grad, *_ = results[1]
    assert scores[~language_mask].eq(0).all() and scores.mT[~visual_mask].eq(0).all()
    assert not mask[~language_mask].any() and not mask.mT[~visual_mask].any()
    assert visual_grad[~visual_mask].eq(0).all() and language_grad[~language_mask].eq(0).all()


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
def test_scores_stay_float32_under_autocast_and_decide_the_mask(autocast):
    curation = block().float()
    visual, language = (x.float() for x in inputs(0, 2, 4, 225))
    with torch.autocast("cpu", dtype=autocast):
        scores, mask = curation(visual, language)
    assert scores.dtype == torch.float32 and mask.sum(dim=-1).eq(68).all()
    # A score of 16 bits would survive the cast to 16 bits and back; of 1800 scores in 32 bits, few do.
    assert (scores.to(autocast).float() == scores).float().mean() < 0.5
    assert mask.equal(paper.eq3_dynamic_mask(paper.eq2_curate(scores, 0.3), 225))


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
def test_autocast_moves_the_selection_only_as_rounding_of_the_inputs_explains(autocast):
    tensors = inputs(0, 2, 4, 225)
    project = lambda curation: (curation.visual_proj, curation.language_proj)
    exact = [proj(x) for proj, x in zip(project(block()), tensors, strict=True)]
    curation = block().float()
    with torch.autocast("cpu", dtype=autocast):
        rounded = [proj(x.float()) for proj, x in zip(project(curation), tensors, strict=True)]
        kept = curation(*(x.float() for x in tensors)).dynamic_mask
    assert all(x.dtype == autocast for x in rounded)
    # Exactly the top r of the rounded tokens: the scores themselves are not rounded, nor tied by it.
    assert kept.equal(top_r_mask(cosine_relevance(*(x.double() for x in rounded)), 0.3))
    # A token moved by a share of its length turns by that angle at most: scores farther from the edge than
    # both angles, theirs and those of the tokens at the edge, stay on their side.
    scores = cosine_relevance(*exact)
    mask = top_r_mask(scores, 0.3)
    worst_kept = scores.masked_fill(~mask, math.inf).amin(dim=-1, keepdim=True)
    best_left = scores.masked_fill(mask, -math.inf).amax(dim=-1, keepdim=True)
    moved = sum(
        ((x.double() - y).norm(dim=-1) / y.norm(dim=-1)).amax() for x, y in zip(rounded, exact, strict=True)
    )
    certain = torch.where(mask, scores - best_left, worst_kept - scores) > 4 * moved
    assert (kept == mask)[certain].all() and certain.double().mean() > 0.5


def test_larger_ratio_curates_a_superset_with_the_same_weights():
    small, large = block(0.2), block(0.6)
    large.load_state_dict(small.state_dict())
    fewer, more = (curation(*inputs(0, 2, 3, 9)).dynamic_mask for curation in (small, large))
    assert (more | ~fewer).all() and more.sum() > fewer.sum()


def test_compiles_once_for_all_sizes():
    curation = block()
    # The mask has no gradient; the scores have.
    scores_of = lambda *args, **kwargs: curation(*args, **kwargs).scores
    cases = []
    for b, l, n in ((2, 3, 7), (6, 8, 10)):
        masks = {"visual_mask": torch.arange(n) < n - torch.arange(b)[:, None]}
        masks["language_mask"] = torch.arange(l).expand(b, l) < l - 1
        cases.append((tuple(x.requires_grad_() for x in inputs(0, b, l, n)), masks))
    assert_compiles_once(scores_of, cases)


def test_ratio_in_per_cent_is_refused_with_the_share():
    says = (
        r"RelevanceCuration: ratio must be in \(0, 1\], got 30; the paper's r = 30 means per cent, here 0.3"
    )
    with pytest.raises(ValueError, match=says):
        RelevanceCuration(5, 4, 6, ratio=30)


@pytest.mark.parametrize(
    ("masks", "error", "says"),
    [
        ({"visual_mask": (2, 8)}, ValueError, "visual_mask 'b n' has n=8, but visual has n=9"),
        ({"language_mask": (2, 9)}, ValueError, "language_mask 'b l' has l=9, but language has l=4"),
        ({"language_mask": (3, 4)}, ValueError, "language_mask 'b l' has b=3, but visual has b=2"),
    ],
)
def test_refuses_masks_of_the_wrong_shape(masks, error, says):
    masks = {name: torch.ones(shape, dtype=torch.bool) for name, shape in masks.items()}
    with pytest.raises(error, match=f"RelevanceCuration: {says}"):
        block()(*inputs(0, 2, 4, 9), **masks)


@pytest.mark.parametrize("name", ["visual_mask", "language_mask"])
def test_refuses_masks_that_are_not_bool(name):
    mask = torch.ones(2, 9 if name == "visual_mask" else 4)
    with pytest.raises(TypeError, match=f"RelevanceCuration: {name} must be bool .*, got torch.float32"):
        block()(*inputs(0, 2, 4, 9), **{name: mask})


def test_refuses_widths_other_than_its_own():
    says = r"RelevanceCuration: visual has c=49, expected visual_dim=64; tokens are \(b, n, c\)"
    curation = RelevanceCuration(64, 32)
    with pytest.raises(ValueError, match=says):
        curation(torch.zeros(1, 64, 49), torch.zeros(1, 2, 32))
    with pytest.raises(ValueError, match=r"language has d=31, expected language_dim=32"):
        curation(torch.zeros(1, 49, 64), torch.zeros(1, 2, 31))
