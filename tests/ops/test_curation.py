"""cosine_relevance and top_r_mask against Eq. 2-3 and against what "the top r, exactly" implies."""

import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from metris_blocks.ops import cosine_relevance, top_r_mask
from tests.conftest import assert_compiles_once, assert_equal
from tests.paper import eq2_curate, eq2_relevance, eq3_dynamic_mask, number_curated
from tests.strategies import distinct_scores, normal, paddings, ratios, seeds, sizes, tied_scores

# ------------------------------------------------------------------------------------------------- equation


@given(sizes("b l n j"), seeds)
def test_relevance_equals_paper_equation(size, seed):
    b, l, n, j = size
    visual, language = normal(seed, b, n, j), normal(seed + 1, b, l, j)
    assert_equal(cosine_relevance(visual, language), eq2_relevance(visual, language))


@given(st.data(), sizes("b l n", largest=7), ratios)
def test_mask_equals_paper_equation_where_scores_tie(data, size, ratio):
    b, l, n = size
    scores = data.draw(tied_scores(b, l, n))
    visual_mask = data.draw(st.none() | paddings(b, n))
    curated = eq3_dynamic_mask(eq2_curate(scores, ratio, visual_mask), n)
    assert top_r_mask(scores, ratio, visual_mask=visual_mask).equal(curated)


@pytest.mark.parametrize(
    ("n", "ratio", "count"), [(225, 0.3, 68), (225, 1.0, 225), (1, 0.3, 1), (3, 0.01, 1)]
)
def test_mask_counts_the_printed_cases(n, ratio, count):
    scores = distinct_scores(0, 2, 3, n)
    everything = torch.ones(2, n, dtype=torch.bool)
    for visual_mask in (None, everything):
        assert top_r_mask(scores, ratio, visual_mask=visual_mask).sum(dim=-1).eq(count).all()


# ----------------------------------------------------------------------------------------------- properties


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@given(data=st.data(), size=sizes("b l n", largest=30), ratio=ratios, seed=seeds)
def test_every_row_keeps_exactly_n_p(dtype, data, size, ratio, seed):
    b, l, n = size
    scores = normal(seed, b, l, n).to(dtype)
    visual_mask = data.draw(paddings(b, n))
    kept = top_r_mask(scores, ratio, visual_mask=visual_mask)
    expected = [[number_curated(int(row.sum()), ratio)] * l for row in visual_mask]
    assert kept.sum(dim=-1).tolist() == expected
    assert top_r_mask(scores, ratio).sum(dim=-1).eq(number_curated(n, ratio)).all()


@pytest.mark.parametrize("n", [15, 50, 225, 900])
@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.7])
def test_count_is_exact_for_every_number_of_real_tokens(n, ratio):
    visual_mask = torch.arange(n) < torch.arange(n + 1)[:, None]
    count = top_r_mask(torch.zeros(n + 1, 1, n), ratio, visual_mask=visual_mask).sum(dim=-1).flatten()
    assert count.tolist() == [number_curated(valid, ratio) for valid in range(n + 1)]


@given(sizes("b l n", largest=30), ratios)
@example((1, 1, 225), 0.3)
def test_equal_scores_are_kept_from_the_lowest_index(size, ratio):
    b, l, n = size
    first = torch.arange(n) < number_curated(n, ratio)
    assert top_r_mask(torch.full((b, l, n), 0.25), ratio).equal(first.expand(b, l, n))


@given(st.lists(st.sampled_from([-0.0, 0.0]), min_size=1, max_size=40), ratios)
def test_both_zeros_tie(zeros, ratio):
    first = torch.arange(len(zeros)) < number_curated(len(zeros), ratio)
    assert top_r_mask(torch.tensor([[zeros]]), ratio).flatten().equal(first)


@pytest.mark.parametrize("padded_score", [0.0, 1e38, math.inf, -math.inf, math.nan])
@given(data=st.data(), size=sizes("b l n", largest=9), ratio=ratios)
def test_padding_is_never_chosen_and_changes_nothing(padded_score, data, size, ratio):
    b, l, n = size
    scores = data.draw(tied_scores(b, l, n))
    visual_mask = data.draw(paddings(b, n))
    hidden = scores.masked_fill(~visual_mask[:, None], padded_score)
    kept = top_r_mask(hidden, ratio, visual_mask=visual_mask)
    assert not (kept & ~visual_mask[:, None]).any()
    assert kept.equal(top_r_mask(scores, ratio, visual_mask=visual_mask))


@given(st.data(), sizes("b l n more", largest=9), ratios)
def test_extending_the_padding_changes_nothing(data, size, ratio):
    b, l, n, more = size
    scores = data.draw(tied_scores(b, l, n))
    longer = torch.cat([scores, torch.full((b, l, more), math.inf, dtype=torch.float64)], dim=-1)
    visual_mask = torch.arange(n + more).expand(b, -1) < n
    kept = top_r_mask(longer, ratio, visual_mask=visual_mask)
    assert kept[..., :n].equal(top_r_mask(scores, ratio)) and not kept[..., n:].any()


@given(st.data(), sizes("b l n", largest=9), ratios, ratios)
def test_larger_ratio_keeps_a_superset(data, size, one, other):
    scores = data.draw(tied_scores(*size))
    fewer, more = (top_r_mask(scores, ratio) for ratio in sorted((one, other)))
    assert (more | ~fewer).all()


@given(sizes("b l n", largest=12), ratios, seeds)
def test_permuting_tokens_permutes_the_mask(size, ratio, seed):
    scores = distinct_scores(seed, *size)
    order = torch.randperm(size[-1], generator=torch.Generator().manual_seed(seed))
    assert top_r_mask(scores[..., order], ratio).equal(top_r_mask(scores, ratio)[..., order])


@given(st.data(), sizes("b l n", largest=9))
def test_ratio_one_keeps_every_real_token(data, size):
    b, l, n = size
    scores, visual_mask = data.draw(tied_scores(b, l, n)), data.draw(paddings(b, n))
    assert top_r_mask(scores, 1.0).all()
    assert top_r_mask(scores, 1.0, visual_mask=visual_mask).equal(visual_mask[:, None].expand(b, l, n))


@given(sizes("b l n", largest=12), ratios, seeds)
def test_mask_keeps_the_best_and_is_the_same_twice(size, ratio, seed):
    scores = distinct_scores(seed, *size)
    kept = top_r_mask(scores, ratio)
    worst_kept = scores.masked_fill(~kept, math.inf).amin(dim=-1)
    best_left = scores.masked_fill(kept, -math.inf).amax(dim=-1)
    assert (worst_kept > best_left).all()
    assert kept.equal(top_r_mask(scores, ratio))


@given(sizes("b l n j"), seeds, st.floats(1e-6, 1e6), st.floats(1e-6, 1e6))
def test_relevance_is_a_cosine(size, seed, one, other):
    b, l, n, j = size
    visual, language = normal(seed, b, n, j), normal(seed + 1, b, l, j)
    scores = cosine_relevance(visual, language)
    assert scores.abs().max() <= 1 + 1e-12
    assert_equal(cosine_relevance(one * visual, other * language), scores)
    assert_equal(cosine_relevance(-visual, language), -scores)
    itself = cosine_relevance(visual, visual).diagonal(dim1=1, dim2=2)
    assert_equal(itself, torch.ones_like(itself))


def test_zero_vector_scores_zero_with_finite_gradient():
    visual, language = torch.zeros(1, 2, 4), normal(0, 1, 3, 4, dtype=torch.float32).requires_grad_()
    scores = cosine_relevance(visual.requires_grad_(), language)
    scores.sum().backward()
    assert scores.eq(0).all() and visual.grad.isfinite().all() and language.grad.eq(0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_scores_are_wide_and_the_same_under_autocast(dtype):
    visual, language = normal(0, 2, 225, 32, dtype=dtype), normal(1, 2, 7, 32, dtype=dtype)
    plain = cosine_relevance(visual, language)
    assert plain.dtype == torch.promote_types(dtype, torch.float32)
    assert_equal(plain[..., :9], eq2_relevance(visual[:, :9], language))
    for autocast in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype=autocast):
            assert cosine_relevance(visual, language).equal(plain)


# ------------------------------------------------------------------------------------------------- gradient


def test_relevance_gradients():
    inputs = normal(0, 2, 3, 4).requires_grad_(), normal(1, 2, 2, 4).requires_grad_()
    assert torch.autograd.gradcheck(cosine_relevance, inputs)
    assert torch.autograd.gradgradcheck(cosine_relevance, inputs)


def test_mask_takes_no_gradient_and_leaves_the_scores_alone():
    scores = torch.tensor([[[-0.0, 0.5, 0.25]]], requires_grad=True)
    kept = top_r_mask(scores, 0.5)
    assert not kept.requires_grad and scores.signbit().any()


# -------------------------------------------------------------------------------------------------- compile


def test_relevance_compiles_once_for_all_sizes():
    assert_compiles_once(
        cosine_relevance,
        [
            ((normal(0, b, n, j).requires_grad_(), normal(1, b, l, j).requires_grad_()), {})
            for b, l, n, j in ((2, 3, 5, 8), (4, 6, 9, 16))
        ],
    )


@pytest.mark.parametrize("padded", [False, True])
def test_mask_compiles_once_for_all_sizes(padded):
    cases = []
    for b, l, n in ((2, 3, 225), (4, 6, 50), (5, 7, 31)):
        visual_mask = (torch.arange(n) < n - torch.arange(b)[:, None]) if padded else None
        cases.append(((distinct_scores(0, b, l, n), 0.3), {"visual_mask": visual_mask}))
    assert_compiles_once(top_r_mask, cases)


# ------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("visual", "language", "says"),
    [
        ((2, 4, 8), (3, 5, 8), "cosine_relevance: language 'b l j' has b=3, but visual has b=2"),
        ((2, 4, 8), (2, 5, 9), "cosine_relevance: language 'b l j' has j=9, but visual has j=8"),
        ((4, 8), (5, 8), r"cosine_relevance: visual has shape \(4, 8\), expected axes 'b n j'"),
    ],
)
def test_relevance_refuses_shapes_that_disagree(visual, language, says):
    with pytest.raises(ValueError, match=says):
        cosine_relevance(torch.zeros(visual), torch.zeros(language))


@pytest.mark.parametrize(
    ("ratio", "says"),
    [
        (30, r"top_r_mask: ratio must be in \(0, 1\], got 30; the paper's r = 30 means per cent, here 0.3"),
        (0, r"top_r_mask: ratio must be in \(0, 1\], got 0$"),
        (-0.3, r"top_r_mask: ratio must be in \(0, 1\], got -0.3$"),
        (math.nan, r"top_r_mask: ratio must be in \(0, 1\], got nan$"),
        (300, r"top_r_mask: ratio must be in \(0, 1\], got 300$"),
    ],
)
def test_mask_refuses_what_is_not_a_share(ratio, says):
    with pytest.raises(ValueError, match=says):
        top_r_mask(torch.zeros(1, 1, 4), ratio)


def test_mask_refuses_shapes_that_disagree():
    real = torch.ones(2, 5, dtype=torch.bool)
    with pytest.raises(ValueError, match="top_r_mask: visual_mask 'b n' has n=5, but scores has n=4"):
        top_r_mask(torch.zeros(2, 3, 4), 0.3, visual_mask=real)
    with pytest.raises(ValueError, match=r"top_r_mask: scores has shape \(3, 4\), expected axes 'b l n'"):
        top_r_mask(torch.zeros(3, 4), 0.3)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.float32])
def test_mask_refuses_masks_that_are_not_bool(dtype):
    with pytest.raises(TypeError, match=f"top_r_mask: visual_mask must be bool .*, got {dtype}"):
        top_r_mask(torch.zeros(2, 3, 4), 0.3, visual_mask=torch.ones(2, 4, dtype=dtype))
