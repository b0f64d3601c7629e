"""pixel_contrastive_loss against Eq. 4 and against the properties Eq. 4 implies."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from metris_blocks.ops import pixel_contrastive_loss
from tests.conftest import assert_compiles_once, assert_equal
from tests.support.paper import eq4_contrastive, eq4_pixel_losses
from tests.support.strategies import normal, paddings, seeds, sizes

TEMPERATURES = st.floats(0.05, 5.0)


def inputs(seed, b, n):
    """Scores in (-1, 1); targets of 0, of 1 and between."""
    return normal(seed, b, n).tanh(), (normal(seed + 1, b, n) + 0.5).clamp(0, 1)


# ------------------------------------------------------------------------------------------------- equation


@given(st.data(), sizes("b n"), seeds, TEMPERATURES)
def test_equals_paper_equation_with_its_gradients(data, size, seed, temperature):
    scores, target = inputs(seed, *size)
    valid = data.draw(st.none() | paddings(*size))
    tau = torch.tensor(temperature, dtype=torch.float64, requires_grad=True)
    results = []
    for loss_of in (pixel_contrastive_loss, eq4_contrastive):
        leaf = scores.clone().requires_grad_()
        loss = loss_of(leaf, target, tau, valid=valid)
        counted = valid is None or bool(valid.any())
        results.append([loss, *(torch.autograd.grad(loss, (leaf, tau)) if counted else ())])
    for actual, paper in zip(*results, strict=True):
        # The literal 1 - σ cancels: its digits are lost to the size of 1/σ', e^(1/τ) at most.
        assert_equal(actual, paper, largest=math.exp(1 / temperature) / temperature**2)


@given(sizes("b n"), seeds)
def test_each_cell_is_one_case_of_the_equation(size, seed):
    scores, target = inputs(seed, *size)
    losses = pixel_contrastive_loss(scores, target.round(), 0.5, reduction="none")
    assert_equal(losses, eq4_pixel_losses(scores, target.round(), 0.5), largest=math.exp(2))


# ----------------------------------------------------------------------------------------------- properties


@given(st.data(), sizes("b n"), seeds)
def test_reductions_are_one_loss(data, size, seed):
    scores, target = inputs(seed, *size)
    valid = data.draw(paddings(*size))
    losses, total, mean = (
        pixel_contrastive_loss(scores, target, 0.1, valid=valid, reduction=r) for r in ("none", "sum", "mean")
    )
    assert losses[~valid].eq(0).all()
    assert_equal(total, losses.sum(), largest=10)
    assert_equal(mean * valid.sum(), total, largest=10)
    assert valid.any() or mean == 0


@given(sizes("b n"), seeds, TEMPERATURES)
def test_loss_rewards_relevance_where_the_target_is(size, seed, temperature):
    scores, target = inputs(seed, *size)
    target = target.round()
    towards = torch.where(target == 1, scores + 0.1, scores - 0.1)
    nearer, here = (
        pixel_contrastive_loss(s, target, temperature, reduction="none") for s in (towards, scores)
    )
    assert (nearer < here).all()


@given(sizes("b n"), seeds)
def test_target_and_background_are_mirror_images(size, seed):
    scores, target = inputs(seed, *size)
    mirrored = pixel_contrastive_loss(-scores, 1 - target, 0.2)
    assert_equal(mirrored, pixel_contrastive_loss(scores, target, 0.2), largest=5)


def test_calling_a_cell_target_or_background_differs_by_its_logit():
    # -log(1 - σ(x)) + log σ(x) = x, and beyond 20 too, where PyTorch's softplus(x) would be x.
    scores = torch.linspace(-60, 60, 241, dtype=torch.float64)[None]
    background, target = (
        pixel_contrastive_loss(scores, torch.full_like(scores, share), 1.0, reduction="none")
        for share in (0.0, 1.0)
    )
    assert_equal(background - target, scores)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("temperature", [1e-30, 0.07, 1.0, 1e30])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_finite_for_any_finite_input(dtype, temperature, reduction):
    largest = torch.finfo(dtype).max
    scores = torch.tensor([[1e38, -1e38, 1.0, -1.0, 0.0, 1e-38]], dtype=torch.float64).clamp(
        -largest, largest
    )
    scores = scores.to(dtype).repeat(3, 1).requires_grad_()
    target = torch.tensor([[0.0], [0.5], [1.0]]).expand(3, 6)
    for tau in (temperature, torch.tensor(temperature)):
        loss = pixel_contrastive_loss(scores, target, tau, reduction=reduction)
        assert loss.isfinite().all() and (loss >= 0).all()
        assert loss.dtype == torch.promote_types(dtype, torch.float32)


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
def test_same_under_autocast(autocast):
    scores, target = (x.float() for x in inputs(0, 3, 9))
    plain = pixel_contrastive_loss(scores, target, torch.tensor(0.07))
    with torch.autocast("cpu", dtype=autocast):
        again = pixel_contrastive_loss(scores, target, torch.tensor(0.07))
    assert again.equal(plain) and again.dtype == torch.float32


def test_what_a_cell_that_does_not_count_holds_reaches_nothing():
    scores, target = inputs(0, 2, 5)
    valid = torch.tensor([[True, True, False, True, False], [False] * 5])
    tau = torch.tensor(0.07, dtype=torch.float64, requires_grad=True)
    results = []
    for fill in (0.0, math.nan, math.inf):
        leaf = scores.masked_fill(~valid, fill).requires_grad_()
        loss = pixel_contrastive_loss(leaf, target.masked_fill(~valid, fill), tau, valid=valid)
        results.append((loss, *torch.autograd.grad(loss, (leaf, tau))))
    for clean, *poisoned in zip(*results, strict=True):
        assert clean.isfinite().all() and all(other.equal(clean) for other in poisoned)
    assert results[1][1][~valid].eq(0).all()


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float16])
def test_hard_targets_of_any_dtype_are_one_target(dtype):
    scores, target = inputs(0, 2, 9)
    target = target.round()
    assert pixel_contrastive_loss(scores, target.to(dtype), 0.1).equal(
        pixel_contrastive_loss(scores, target, 0.1)
    )


def test_same_result_twice():
    scores, target = inputs(0, 8, 225)
    first, second = (pixel_contrastive_loss(scores, target, 0.07) for _ in range(2))
    assert first.equal(second)


# ------------------------------------------------------------------------------------------------- gradient


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_gradients(reduction):
    scores, target = inputs(0, 2, 4)
    valid = torch.tensor([[True, True, False, True], [False, True, True, True]])
    tau = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    loss = lambda s, t: pixel_contrastive_loss(s, target, t, valid=valid, reduction=reduction)
    assert torch.autograd.gradcheck(loss, (scores.requires_grad_(), tau))
    assert torch.autograd.gradgradcheck(loss, (scores, tau))


# -------------------------------------------------------------------------------------------------- compile


@pytest.mark.parametrize("padded", [False, True])
def test_compiles_once_for_all_sizes(padded):
    cases = []
    for b, n in ((2, 5), (4, 9)):
        scores, target = inputs(0, b, n)
        tau = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
        valid = scores > -0.2 if padded else None
        cases.append(((scores.requires_grad_(), target, tau), {"valid": valid}))
    assert_compiles_once(pixel_contrastive_loss, cases)


# ------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("scores", "target", "valid", "says"),
    [
        ((2, 4), (2, 5), (2, 4), "target 'b n' has n=5, but scores has n=4"),
        ((2, 4), (3, 4), (2, 4), "target 'b n' has b=3, but scores has b=2"),
        ((2, 4), (2, 4), (2, 6), "valid 'b n' has n=6, but scores has n=4"),
        ((4,), (4,), (4,), r"scores has shape \(4,\), expected axes 'b n'"),
    ],
)
def test_refuses_shapes_that_disagree(scores, target, valid, says):
    valid = torch.ones(valid, dtype=torch.bool)
    with pytest.raises(ValueError, match=f"pixel_contrastive_loss: {says}"):
        pixel_contrastive_loss(torch.zeros(scores), torch.zeros(target), 0.1, valid=valid)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.float32])
def test_refuses_masks_that_are_not_bool(dtype):
    with pytest.raises(TypeError, match=f"pixel_contrastive_loss: valid must be bool .* got {dtype}"):
        pixel_contrastive_loss(torch.zeros(1, 2), torch.zeros(1, 2), 0.1, valid=torch.ones(1, 2, dtype=dtype))


def test_refuses_an_unknown_reduction():
    with pytest.raises(ValueError, match=r"pixel_contrastive_loss: reduction must be .*, got 'avg'"):
        pixel_contrastive_loss(torch.zeros(1, 2), torch.zeros(1, 2), 0.1, reduction="avg")
