"""cosine_relevance and top_r_mask against Eq. 2-3 and against what "the top r, exactly" implies."""

import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from metris_blocks.ops import cosine_relevance, top_r_mask
from tests.conftest import (
    BACKENDS_ON_CPU,
    TOLERANCE,
    assert_compiles_once,
    assert_equal,
    cases,
    with_gradients,
)
from tests.support.paper import eq2_curate, eq2_relevance, eq3_dynamic_mask, number_curated
from tests.support.strategies import (
    distinct_scores,
    normal,
    paddings,
    ratios,
    seeds,
    sizes,
    surrounded,
    tied_scores,
    wide,
)

with_each_backend = pytest.mark.parametrize("backend", BACKENDS_ON_CPU)
SIXTEEN_BIT = [torch.float16, torch.bfloat16]


def rows(n):
    """Draw b, l and up to n scores a row; few rows, since Triton's interpreter takes its time for each."""
    return st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, n))


def need(backend, dtype):
    """Skip what no triton kernel knows."""
    if backend == "triton" and dtype == torch.float64:
        pytest.skip("the triton kernels know no float64")


# ------------------------------------------------------------------------------------------------- equation


@with_each_backend
@given(sizes("b l n j"), seeds)
def test_relevance_equals_paper_equation(backend, size, seed):
    b, l, n, j = size
    visual, language = (
        normal(seed, b, n, j, dtype=wide(backend)),
        normal(seed + 1, b, l, j, dtype=wide(backend)),
    )
    assert_equal(cosine_relevance(visual, language, backend=backend), eq2_relevance(visual, language))


@with_each_backend
@given(st.data(), rows(7), ratios)
def test_mask_equals_paper_equation_where_scores_tie(backend, data, size, ratio):
    b, l, n = size
    scores = data.draw(tied_scores(b, l, n, wide(backend)))
    visual_mask = data.draw(st.none() | paddings(b, n))
    curated = eq3_dynamic_mask(eq2_curate(scores, ratio, visual_mask), n)
    assert top_r_mask(scores, ratio, visual_mask=visual_mask, backend=backend).equal(curated)


@with_each_backend
@pytest.mark.parametrize(
    ("n", "ratio", "count"), [(225, 0.3, 68), (225, 1.0, 225), (1, 0.3, 1), (3, 0.01, 1)]
)
def test_mask_counts_the_printed_cases(backend, n, ratio, count):
    scores = distinct_scores(0, 2, 3, n, wide(backend))
    everything = torch.ones(2, n, dtype=torch.bool)
    for visual_mask in (None, everything):
        assert top_r_mask(scores, ratio, visual_mask=visual_mask, backend=backend).sum(dim=-1).eq(count).all()


# ----------------------------------------------------------------------------------------------- properties


@with_each_backend
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@given(data=st.data(), size=rows(60), ratio=ratios, seed=seeds)
def test_every_row_keeps_exactly_n_p(backend, dtype, data, size, ratio, seed):
    need(backend, dtype)
    b, l, n = size
    scores = normal(seed, b, l, n).to(dtype)
    visual_mask = data.draw(paddings(b, n))
    kept = top_r_mask(scores, ratio, visual_mask=visual_mask, backend=backend)
    expected = [[number_curated(int(row.sum()), ratio)] * l for row in visual_mask]
    assert kept.sum(dim=-1).tolist() == expected
    assert top_r_mask(scores, ratio, backend=backend).sum(dim=-1).eq(number_curated(n, ratio)).all()


@with_each_backend
@pytest.mark.parametrize("n", [15, 50, 225])
@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.7])
def test_count_is_exact_for_every_number_of_real_tokens(backend, n, ratio):
    if backend == "triton" and n > 15:
        pytest.skip("one launch of many rows: too long for Triton's interpreter")
    visual_mask = torch.arange(n) < torch.arange(n + 1)[:, None]
    count = (
        top_r_mask(torch.zeros(n + 1, 1, n), ratio, visual_mask=visual_mask, backend=backend)
        .sum(dim=-1)
        .flatten()
    )
    assert count.tolist() == [number_curated(valid, ratio) for valid in range(n + 1)]


@with_each_backend
@given(size=rows(60), ratio=ratios)
@example(size=(1, 1, 225), ratio=0.3)
def test_equal_scores_are_kept_from_the_lowest_index(backend, size, ratio):
    b, l, n = size
    first = torch.arange(n) < number_curated(n, ratio)
    assert top_r_mask(torch.full((b, l, n), 0.25), ratio, backend=backend).equal(first.expand(b, l, n))


@with_each_backend
@given(st.lists(st.sampled_from([-0.0, 0.0]), min_size=1, max_size=40), ratios)
def test_both_zeros_tie(backend, zeros, ratio):
    first = torch.arange(len(zeros)) < number_curated(len(zeros), ratio)
    assert top_r_mask(torch.tensor([[zeros]]), ratio, backend=backend).flatten().equal(first)


@with_each_backend
@pytest.mark.parametrize("padded_score", [0.0, 1e38, math.inf, -math.inf, math.nan])
@given(data=st.data(), size=rows(9), ratio=ratios)
def test_padding_is_never_chosen_and_changes_nothing(backend, padded_score, data, size, ratio):
    b, l, n = size
    scores = data.draw(tied_scores(b, l, n, wide(backend)))
    visual_mask = data.draw(paddings(b, n))
    hidden = scores.masked_fill(~visual_mask[:, None], padded_score)
    kept = top_r_mask(hidden, ratio, visual_mask=visual_mask, backend=backend)
    assert not (kept & ~visual_mask[:, None]).any()
    assert kept.equal(top_r_mask(scores, ratio, visual_mask=visual_mask, backend=backend))


@with_each_backend
@given(st.data(), rows(9), st.integers(1, 9), ratios)
def test_extending_the_padding_changes_nothing(backend, data, size, more, ratio):
    b, l, n = size
    scores = data.draw(tied_scores(b, l, n, wide(backend)))
    longer = torch.cat([scores, torch.full((b, l, more), math.inf, dtype=wide(backend))], dim=-1)
    visual_mask = torch.arange(n + more).expand(b, -1) < n
    kept = top_r_mask(longer, ratio, visual_mask=visual_mask, backend=backend)
    assert kept[..., :n].equal(top_r_mask(scores, ratio, backend=backend)) and not kept[..., n:].any()


@with_each_backend
@given(st.data(), rows(9), ratios, ratios)
def test_larger_ratio_keeps_a_superset(backend, data, size, one, other):
    scores = data.draw(tied_scores(*size, wide(backend)))
    fewer, more = (top_r_mask(scores, ratio, backend=backend) for ratio in sorted((one, other)))
    assert (more | ~fewer).all()


@with_each_backend
@given(rows(12), ratios, seeds)
def test_permuting_tokens_permutes_the_mask(backend, size, ratio, seed):
    scores = distinct_scores(seed, *size, wide(backend))
    order = torch.randperm(size[-1], generator=torch.Generator().manual_seed(seed))
    assert top_r_mask(scores[..., order], ratio, backend=backend).equal(
        top_r_mask(scores, ratio, backend=backend)[..., order]
    )


@with_each_backend
@given(st.data(), rows(9))
def test_ratio_one_keeps_every_real_token(backend, data, size):
    b, l, n = size
    scores, visual_mask = data.draw(tied_scores(b, l, n, wide(backend))), data.draw(paddings(b, n))
    assert top_r_mask(scores, 1.0, backend=backend).all()
    assert top_r_mask(scores, 1.0, visual_mask=visual_mask, backend=backend).equal(
        visual_mask[:, None].expand(b, l, n)
    )


@with_each_backend
@given(rows(12), ratios, seeds)
def test_mask_keeps_the_best_and_is_the_same_twice(backend, size, ratio, seed):
    scores = distinct_scores(seed, *size, wide(backend))
    kept = top_r_mask(scores, ratio, backend=backend)
    worst_kept = scores.masked_fill(~kept, math.inf).amin(dim=-1)
    best_left = scores.masked_fill(kept, -math.inf).amax(dim=-1)
    assert (worst_kept > best_left).all()
    assert kept.equal(top_r_mask(scores, ratio, backend=backend))


@with_each_backend
@given(sizes("b l n j"), seeds, st.floats(1e-6, 1e6), st.floats(1e-6, 1e6))
def test_relevance_is_a_cosine(backend, size, seed, one, other):
    b, l, n, j = size
    visual, language = (
        normal(seed, b, n, j, dtype=wide(backend)),
        normal(seed + 1, b, l, j, dtype=wide(backend)),
    )
    scores = cosine_relevance(visual, language, backend=backend)
    assert scores.abs().max() <= 1 + TOLERANCE[scores.dtype]
    assert_equal(cosine_relevance(one * visual, other * language, backend=backend), scores)
    assert_equal(cosine_relevance(-visual, language, backend=backend), -scores)
    itself = cosine_relevance(visual, visual, backend=backend).diagonal(dim1=1, dim2=2)
    assert_equal(itself, torch.ones_like(itself))


@with_each_backend
def test_zero_vector_scores_zero_with_finite_gradient(backend):
    visual, language = torch.zeros(1, 2, 4), normal(0, 1, 3, 4, dtype=torch.float32).requires_grad_()
    scores = cosine_relevance(visual.requires_grad_(), language, backend=backend)
    scores.sum().backward()
    assert scores.eq(0).all() and visual.grad.isfinite().all() and language.grad.eq(0).all()


@with_each_backend
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_scores_are_wide_and_the_same_under_autocast(backend, dtype):
    need(backend, dtype)
    visual, language = normal(0, 2, 225, 32, dtype=dtype), normal(1, 2, 7, 32, dtype=dtype)
    plain = cosine_relevance(visual, language, backend=backend)
    assert plain.dtype == torch.promote_types(dtype, torch.float32)
    assert_equal(plain[..., :9], eq2_relevance(visual[:, :9], language))
    for autocast in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype=autocast):
            assert cosine_relevance(visual, language, backend=backend).equal(plain)


@with_each_backend
@pytest.mark.parametrize("size", [(2, 3, 7, 8), (1, 17, 33, 40)], ids=str)
def test_nothing_is_read_beyond_the_tensors(backend, size):
    b, l, n, j = size
    tensors = [normal(i, b, s, j, dtype=torch.float32) for i, s in enumerate((n, l))]
    results = []
    for place in (torch.clone, surrounded):
        leaves = [place(x).requires_grad_() for x in tensors]
        scores = cosine_relevance(*leaves, backend=backend)
        grads = torch.autograd.grad(scores, leaves, place(torch.ones(b, l, n)))
        scores = scores.detach()
        mask = top_r_mask(place(scores), 0.3, backend=backend)
        real = place(torch.arange(n).expand(b, n) < n - 2)
        results.append(
            [scores, *grads, mask, top_r_mask(place(scores), 0.3, visual_mask=real, backend=backend)]
        )
    for alone, among_nan in zip(*results, strict=True):
        assert alone.isfinite().all() and among_nan.equal(alone)


@pytest.mark.parametrize(
    ("device", "backend", "size", "dtype"),
    cases(
        [(2, 3, 1, 4), (1, 1, 31, 3), (2, 21, 225, 48), (1, 33, 130, 100)],
        [torch.float32, *SIXTEEN_BIT],
        backends=["eager", "triton"],
    ),
)
def test_values_and_gradients_equal_float64(device, backend, size, dtype):
    b, l, n, j = size
    tensors = [normal(i, b, s, j, dtype=dtype).to(device) for i, s in enumerate((n, l))]
    cotangent = normal(2, b, l, n, dtype=torch.float32).to(device)
    run = lambda *leaves: cosine_relevance(*leaves, backend=backend)
    actual = with_gradients(run, tensors, cotangent)
    reference = with_gradients(cosine_relevance, [x.double() for x in tensors], cotangent.double())
    assert actual[0].dtype == torch.float32
    assert_equal(actual[0], reference[0])
    for one, other in zip(actual[1:], reference[1:], strict=True):
        assert one.dtype == dtype
        # Computed in float32, rounded once: to the nearest, or towards zero by the interpreter.
        largest = float(other.abs().max())
        atol = largest * (TOLERANCE[torch.float32] + (torch.finfo(dtype).eps if dtype in SIXTEEN_BIT else 0))
        torch.testing.assert_close(one.double(), other, rtol=0, atol=atol)


@pytest.mark.parametrize(
    ("device", "backend", "n", "dtype"),
    cases([1, 31, 225, 1000, 16384], [torch.float32, *SIXTEEN_BIT], backends=["eager", "triton"]),
)
def test_selection_is_the_same_everywhere(device, backend, n, dtype):
    b, l = (1, 1) if n > 1000 else (2, 3)
    scores = normal(0, b, l, n, dtype=dtype)
    scores[..., ::5] = 0.25
    scores[..., 1::7] = math.nan
    # NaN of any sign and payload is one NaN.
    bits = scores.view(torch.int32 if dtype == torch.float32 else torch.int16)
    bits[..., 1::14] |= torch.iinfo(bits.dtype).min
    bits[..., 1::21] += 1
    scores[..., 2::11] = -math.inf
    scores[..., 3::13] = math.inf
    # NaN ranks above every number, which no comparison tells the oracle.
    ranked = scores.double().nan_to_num(math.inf, 1e300, -1e300)
    real = torch.rand(b, n, generator=torch.Generator().manual_seed(1)) < 0.7
    for ratio in (0.05, 0.3, 0.9):
        for visual_mask in (None, real):
            curated = eq3_dynamic_mask(eq2_curate(ranked, ratio, visual_mask), n)
            moved = None if visual_mask is None else visual_mask.to(device)
            kept = top_r_mask(scores.to(device), ratio, visual_mask=moved, backend=backend)
            assert kept.cpu().equal(curated)


@pytest.mark.parametrize("size", [(0, 3, 5), (2, 0, 5), (2, 3, 0)], ids=str)
@with_each_backend
def test_empty_sizes_give_empty_results(backend, size):
    b, l, n = size
    leaves = torch.zeros(b, n, 4, requires_grad=True), torch.zeros(b, l, 4, requires_grad=True)
    scores = cosine_relevance(*leaves, backend=backend)
    assert scores.shape == size and top_r_mask(scores, 0.3, backend=backend).shape == size
    assert all(x.eq(0).all() for x in torch.autograd.grad(scores.sum(), leaves))


def test_largest_row_of_the_triton_kernel_is_named():
    says = r"top_r_mask: backend 'triton' cannot run: .*n=16385 \(at most 16384\).*Use backend='auto'"
    with pytest.raises(NotImplementedError, match=says):
        top_r_mask(torch.zeros(1, 1, 16385), 0.3, backend="triton")


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


@with_each_backend
def test_relevance_compiles_once_for_all_sizes(backend):
    sized = []
    for b, l, n, j in ((2, 3, 5, 8), (4, 6, 9, 16)):
        leaves = (normal(i, b, s, j, dtype=wide(backend)).requires_grad_() for i, s in enumerate((n, l)))
        sized.append((tuple(leaves), {"backend": backend}))
    assert_compiles_once(cosine_relevance, sized)


@pytest.mark.parametrize("padded", [False, True])
@with_each_backend
def test_mask_compiles_once_for_all_sizes(backend, padded):
    sized = []
    for b, l, n in ((2, 3, 225), (4, 6, 50), (5, 7, 31)):
        visual_mask = (torch.arange(n) < n - torch.arange(b)[:, None]) if padded else None
        options = {"visual_mask": visual_mask, "backend": backend}
        sized.append(((distinct_scores(0, b, l, n, wide(backend)), 0.3), options))
    assert_compiles_once(top_r_mask, sized)


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


@pytest.mark.parametrize("backend", ["sdpa", "flash"])
def test_refuses_unknown_backends(backend):
    says = f"backend must be 'auto' or one of eager, triton, got '{backend}'"
    with pytest.raises(ValueError, match=f"cosine_relevance: {says}"):
        cosine_relevance(torch.zeros(1, 3, 2), torch.zeros(1, 2, 2), backend=backend)
    with pytest.raises(ValueError, match=f"top_r_mask: {says}"):
        top_r_mask(torch.zeros(1, 2, 3), 0.3, backend=backend)


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
