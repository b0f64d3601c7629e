"""masked_softmax_aggregation against Eq. 5 and against the properties Eq. 5 implies."""

import math
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from metris_blocks.ops import masked_softmax_aggregation, top_r_mask
from metris_blocks.ops.masks import masked_softmax
from tests.conftest import (
    BACKENDS_ON_CPU,
    TOLERANCE,
    assert_compiles_once,
    assert_equal,
    assert_within_budget,
    cases,
    with_gradients,
)
from tests.support.paper import eq5_aggregate
from tests.support.strategies import distinct_scores, masks, normal, seeds, sizes, surrounded, wide

with_each_backend = pytest.mark.parametrize("backend", BACKENDS_ON_CPU)
SIZES = sizes("b l n c")
TEMPERATURES = st.floats(0.05, 5.0)


def inputs(backend, seed, b, l, n, c):
    dtype = wide(backend)
    return distinct_scores(seed, b, l, n, dtype), normal(seed, b, n, c, dtype=dtype)


def need(backend, dtype):
    """Skip what no triton kernel knows."""
    if backend == "triton" and dtype == torch.float64:
        pytest.skip("the triton kernels know no float64")


# ------------------------------------------------------------------------------------------------- equation


@with_each_backend
@given(st.data(), SIZES, seeds, TEMPERATURES, st.booleans())
def test_equals_paper_equation_with_its_gradients(backend, data, size, seed, temperature, divide_by_count):
    b, l, n, _ = size
    mask = data.draw(masks(b, l, n))
    options = {"temperature": temperature, "divide_by_count": divide_by_count}
    leaves = [x.requires_grad_() for x in inputs(backend, seed, *size)]
    cotangent = normal(seed + 1, b, l, size[-1])
    results = []
    for aggregate in (partial(masked_softmax_aggregation, backend=backend), eq5_aggregate):
        out = aggregate(leaves[0], mask, leaves[1], **options)
        grads = (
            torch.autograd.grad(out, leaves, cotangent.to(out.dtype), allow_unused=True) if mask.any() else ()
        )
        results.append([out.detach(), *grads])
    for actual, paper in zip(*results, strict=True):
        assert_equal(actual, paper, largest=1 / temperature)


@with_each_backend
def test_defaults_are_the_equation_as_printed(backend):
    scores, visual = inputs(backend, 0, 1, 2, 9, 3)
    mask = top_r_mask(scores, 0.5)
    assert_equal(
        masked_softmax_aggregation(scores, mask, visual, backend=backend), eq5_aggregate(scores, mask, visual)
    )


# ----------------------------------------------------------------------------------------------- properties


@with_each_backend
@given(st.data(), SIZES, seeds)
def test_tokens_outside_the_mask_have_no_influence(backend, data, size, seed):
    b, l, n, _ = size
    scores, visual = inputs(backend, seed, *size)
    mask = data.draw(masks(b, l, n))
    plain = masked_softmax_aggregation(scores, mask, visual, backend=backend)
    for hidden in (50.0, math.inf, -math.inf, math.nan):
        shifted = torch.where(mask, scores, hidden)
        assert masked_softmax_aggregation(shifted, mask, visual, backend=backend).equal(plain)


@with_each_backend
@given(st.data(), SIZES, seeds, st.floats(-3, 3))
def test_shift_of_scores_changes_nothing(backend, data, size, seed, shift):
    b, l, n, _ = size
    scores, visual = inputs(backend, seed, *size)
    mask = data.draw(masks(b, l, n))
    assert_equal(
        masked_softmax_aggregation(scores + shift, mask, visual, backend=backend),
        masked_softmax_aggregation(scores, mask, visual, backend=backend),
    )


@with_each_backend
@given(st.data(), SIZES, seeds)
def test_plain_average_stays_among_the_curated_tokens(backend, data, size, seed):
    b, l, n, _ = size
    scores, visual = inputs(backend, seed, *size)
    mask = data.draw(masks(b, l, n))
    out = masked_softmax_aggregation(scores, mask, visual, divide_by_count=False, backend=backend)
    spread = visual[:, None].expand(-1, l, -1, -1)
    for bound, fill, sign in (("amax", -math.inf, 1), ("amin", math.inf, -1)):
        extreme = getattr(spread.masked_fill(~mask[..., None], fill), bound)(dim=2)
        assert (sign * (extreme - out) >= -10 * TOLERANCE[out.dtype])[mask.any(dim=-1)].all()


@with_each_backend
@given(st.data(), SIZES, seeds)
def test_the_paper_divides_the_average_by_the_count(backend, data, size, seed):
    b, l, n, _ = size
    scores, visual = inputs(backend, seed, *size)
    mask = data.draw(masks(b, l, n))
    printed, plain = (
        masked_softmax_aggregation(scores, mask, visual, divide_by_count=d, backend=backend)
        for d in (True, False)
    )
    assert_equal(printed * mask.sum(dim=-1, keepdim=True), plain)


@with_each_backend
@given(SIZES, seeds)
def test_permuting_visual_tokens_changes_nothing(backend, size, seed):
    scores, visual = inputs(backend, seed, *size)
    mask = top_r_mask(scores, 0.5)
    order = torch.randperm(size[2], generator=torch.Generator().manual_seed(seed))
    assert_equal(
        masked_softmax_aggregation(scores[..., order], mask[..., order], visual[:, order], backend=backend),
        masked_softmax_aggregation(scores, mask, visual, backend=backend),
    )


@with_each_backend
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_empty_row_is_zero_with_zero_gradient(backend, dtype):
    need(backend, dtype)
    scores, visual = (x.to(dtype).requires_grad_() for x in inputs(backend, 0, 2, 2, 3, 4))
    mask = torch.tensor([[[True, False, True], [False] * 3], [[False] * 3] * 2])
    out = masked_softmax_aggregation(scores, mask, visual, backend=backend)
    out.square().sum().backward()
    empty = ~mask.any(dim=-1)
    assert out[empty].eq(0).all() and scores.grad[empty].eq(0).all() and visual.grad[1].eq(0).all()
    assert scores.grad.isfinite().all() and visual.grad.isfinite().all() and visual.grad[0, 0].ne(0).any()


@with_each_backend
@pytest.mark.parametrize("hidden", [math.nan, math.inf])
def test_what_a_token_nobody_curates_holds_reaches_nothing(backend, hidden):
    scores, visual = inputs(backend, 0, 2, 3, 5, 4)
    mask = top_r_mask(scores, 0.4) & (torch.arange(5) != 3)
    results = []
    for fill in (0.0, hidden):
        s, v = scores.clone(), visual.clone()
        s[..., 3], v[:, 3] = fill, fill
        s, v = s.requires_grad_(), v.requires_grad_()
        out = masked_softmax_aggregation(s, mask, v, backend=backend)
        results.append((out, *torch.autograd.grad(out.square().sum(), (s, v))))
    for clean, poisoned in zip(*results, strict=True):
        assert clean.isfinite().all() and poisoned.equal(clean)
    assert results[1][2][:, 3].eq(0).all()


@with_each_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n", [7, 225, 3600])
@pytest.mark.parametrize("divide_by_count", [False, True])
def test_16_bit_stays_within_the_error_of_textbook_code(backend, dtype, n, divide_by_count):
    scores = normal(0, 2, 3, n, dtype=torch.float32).tanh()
    mask = top_r_mask(scores, 0.3)
    visual = normal(1, 2, n, 8, dtype=dtype) + 1
    options = {"divide_by_count": divide_by_count}
    weights = scores.masked_fill(~mask, -math.inf).softmax(dim=-1).to(dtype)
    textbook = weights @ visual / (mask.sum(dim=-1, keepdim=True) if divide_by_count else 1)
    reference = masked_softmax_aggregation(scores.double(), mask, visual.double(), **options)
    out = masked_softmax_aggregation(scores, mask, visual, **options, backend=backend)
    assert out.dtype == dtype
    assert_within_budget(out, textbook, reference)


@with_each_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n", [225, 3600])
def test_16_bit_average_of_equal_tokens_is_that_token_over_the_count(backend, dtype, n):
    # Equal scores round alike, so that errors add up: 1/N_p² is no number of float16 at n = 3600.
    mask = top_r_mask(torch.zeros(1, 1, n), 0.3)
    out = masked_softmax_aggregation(
        torch.zeros(1, 1, n), mask, torch.ones(1, n, 2, dtype=dtype), backend=backend
    )
    # Three roundings: the weight, the sum, the quotient; each errs by eps / 2 at most.
    assert (out.double() * mask.sum() - 1).abs().max() <= 1.5 * torch.finfo(dtype).eps * 1.01


@with_each_backend
def test_autocast_keeps_the_dtype_of_visual_and_the_precision_of_the_weights(backend):
    scores, visual = (x.float() for x in inputs(backend, 0, 2, 3, 225, 8))
    mask = top_r_mask(scores, 0.3)
    reference = masked_softmax_aggregation(scores.double(), mask, visual.double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = masked_softmax_aggregation(scores, mask, visual, backend=backend)
    assert out.dtype == torch.float32
    textbook = scores.masked_fill(~mask, -math.inf).softmax(dim=-1).bfloat16() @ visual.bfloat16()
    assert_within_budget(out.bfloat16(), textbook / mask.sum(dim=-1, keepdim=True), reference)


@given(st.data(), sizes("b l n"), seeds)
def test_weights_sum_to_one_or_zero(data, size, seed):
    mask = data.draw(masks(*size))
    weights = masked_softmax(100 * normal(seed, *size), mask)
    assert_equal(weights.sum(dim=-1), mask.any(dim=-1).double())
    assert weights[~mask].eq(0).all()


@with_each_backend
def test_same_result_twice(backend):
    tensors = inputs(backend, 0, 2, 3, 225, 16)
    mask = top_r_mask(tensors[0], 0.3)
    run = lambda scores, visual: masked_softmax_aggregation(scores, mask, visual, backend=backend)
    cotangent = torch.ones(2, 3, 16, dtype=tensors[0].dtype)
    first, second = (with_gradients(run, tensors, cotangent) for _ in range(2))
    assert all(x.equal(y) for x, y in zip(first, second, strict=True))


@with_each_backend
@pytest.mark.parametrize("size", [(2, 3, 7, 8), (1, 17, 33, 40)], ids=str)
def test_nothing_is_read_beyond_the_tensors(backend, size):
    tensors = [x.float() for x in inputs(backend, 0, *size)]
    mask = top_r_mask(tensors[0], 0.3)
    results = []
    for place in (torch.clone, surrounded):
        scores, visual = (place(x).requires_grad_() for x in tensors)
        out = masked_softmax_aggregation(scores, place(mask), visual, backend=backend)
        grads = torch.autograd.grad(out, (scores, visual), place(torch.ones_like(out)))
        results.append([out.detach(), *grads])
    for alone, among_nan in zip(*results, strict=True):
        assert alone.isfinite().all() and among_nan.equal(alone)


@with_each_backend
def test_assume_finite_changes_nothing_where_it_is_true(backend):
    scores, visual = inputs(backend, 0, 2, 3, 9, 4)
    mask = top_r_mask(scores, 0.3)
    careful, trusting = (
        masked_softmax_aggregation(scores, mask, visual, assume_finite=known, backend=backend)
        for known in (False, True)
    )
    assert_equal(trusting, careful)


@pytest.mark.parametrize(
    ("device", "backend", "size", "dtype"),
    cases(
        [(2, 3, 1, 4), (1, 1, 31, 3), (2, 21, 225, 48), (1, 33, 130, 100)],
        [torch.float32, torch.float16, torch.bfloat16],
        backends=["eager", "triton"],
    ),
)
def test_values_and_gradients_equal_float64(device, backend, size, dtype):
    b, l, n, c = size
    scores = distinct_scores(0, b, l, n, torch.float32).to(device)
    visual = normal(1, b, n, c, dtype=dtype).to(device)
    mask = top_r_mask(scores, 0.3)
    mask[0, 0] = False
    cotangent = normal(2, b, l, c, dtype=dtype).to(device)
    run = lambda scores, visual: masked_softmax_aggregation(
        scores, mask, visual, temperature=0.5, backend=backend
    )
    weigh = lambda scores: (scores / 0.5).masked_fill(~mask, -math.inf).softmax(dim=-1).nan_to_num(0)
    count = mask.sum(dim=-1, keepdim=True).clamp_min(1)
    textbook = lambda scores, visual: weigh(scores).to(visual.dtype) @ visual / count
    actual = with_gradients(run, (scores, visual), cotangent)
    plain = with_gradients(textbook, (scores, visual), cotangent)
    reference = with_gradients(textbook, (scores.double(), visual.double()), cotangent.double())
    for one, other, exact in zip(actual, plain, reference, strict=True):
        one, other, exact = (x.nan_to_num(0) for x in (one, other, exact))
        assert one.dtype == other.dtype
        if dtype == torch.float32:
            assert_equal(one, exact)
        else:
            assert_within_budget(one, other, exact)


@pytest.mark.parametrize("size", [(0, 3, 5, 4), (2, 0, 5, 4), (2, 3, 0, 4)], ids=str)
@with_each_backend
def test_empty_sizes_give_empty_results(backend, size):
    b, l, n, c = size
    scores, visual = torch.zeros(b, l, n, requires_grad=True), torch.ones(b, n, c, requires_grad=True)
    mask = torch.ones(b, l, n, dtype=torch.bool)
    out = masked_softmax_aggregation(scores, mask, visual, backend=backend)
    assert out.shape == (b, l, c) and out.eq(0).all()
    assert all(x.eq(0).all() for x in torch.autograd.grad(out.sum(), (scores, visual)))


# ------------------------------------------------------------------------------------------------- gradient


@pytest.mark.parametrize("divide_by_count", [False, True])
def test_gradients(divide_by_count):
    scores, visual = inputs("eager", 0, 2, 3, 4, 2)
    mask = top_r_mask(scores, 0.5)
    mask[0, 1] = False
    aggregate = lambda s, v: masked_softmax_aggregation(
        s, mask, v, temperature=0.5, divide_by_count=divide_by_count
    )
    leaves = scores.requires_grad_(), visual.requires_grad_()
    assert torch.autograd.gradcheck(aggregate, leaves)
    assert torch.autograd.gradgradcheck(aggregate, leaves)


# -------------------------------------------------------------------------------------------------- compile


@with_each_backend
def test_compiles_once_for_all_sizes(backend):
    sized = []
    for size in ((2, 3, 5, 8), (4, 6, 9, 16)):
        scores, visual = inputs(backend, 0, *size)
        mask = top_r_mask(scores, 0.5)
        mask[0, 0] = False
        sized.append(((scores.requires_grad_(), mask, visual.requires_grad_()), {"backend": backend}))
    assert_compiles_once(masked_softmax_aggregation, sized)


# ------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("scores", "mask", "visual", "says"),
    [
        ((2, 3, 4), (2, 3, 5), (2, 4, 8), "dynamic_mask 'b l n' has n=5, but scores has n=4"),
        ((2, 3, 4), (2, 3, 4), (2, 9, 8), "visual 'b n c' has n=9, but scores has n=4"),
        ((2, 3, 4), (2, 3, 4), (1, 4, 8), "visual 'b n c' has b=1, but scores has b=2"),
        ((3, 4), (3, 4), (4, 8), r"scores has shape \(3, 4\), expected axes 'b l n'"),
    ],
)
def test_refuses_shapes_that_disagree(scores, mask, visual, says):
    mask = torch.ones(mask, dtype=torch.bool)
    with pytest.raises(ValueError, match=f"masked_softmax_aggregation: {says}"):
        masked_softmax_aggregation(torch.zeros(scores), mask, torch.zeros(visual))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.float32])
def test_refuses_masks_that_are_not_bool(dtype):
    mask = torch.zeros(1, 1, 2, dtype=dtype)
    with pytest.raises(
        TypeError, match=f"masked_softmax_aggregation: dynamic_mask must be bool .* got {dtype}"
    ):
        masked_softmax_aggregation(torch.zeros(1, 1, 2), mask, torch.zeros(1, 2, 3))


def test_refuses_unknown_backends():
    says = "masked_softmax_aggregation: backend must be 'auto' or one of eager, triton, got 'sdpa'"
    mask = torch.ones(1, 1, 2, dtype=torch.bool)
    with pytest.raises(ValueError, match=says):
        masked_softmax_aggregation(torch.zeros(1, 1, 2), mask, torch.zeros(1, 2, 3), backend="sdpa")


@pytest.mark.parametrize("temperature", [0, -1.5, math.nan])
def test_refuses_a_temperature_that_is_not_positive(temperature):
    mask = torch.ones(1, 1, 2, dtype=torch.bool)
    says = f"masked_softmax_aggregation: temperature must be > 0, got {temperature:g}"
    with pytest.raises(ValueError, match=says):
        masked_softmax_aggregation(torch.zeros(1, 1, 2), mask, torch.zeros(1, 2, 3), temperature=temperature)
