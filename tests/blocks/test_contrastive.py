"""PixelContrastiveLoss: Eq. 4 with its own temperature, on masks of any resolution."""

import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from metris_blocks import PixelContrastiveLoss
from tests.conftest import assert_compiles_once, assert_equal
from tests.support import paper
from tests.support.strategies import normal, seeds, sizes

TAU = 0.5


def block(temperature=TAU):
    loss = PixelContrastiveLoss(temperature=temperature).double()
    # The constructor keeps log τ in float32; these tests compare in float64.
    loss.log_temperature.data.fill_(math.log(temperature))
    return loss


def soft_mask(seed, b, h, w):
    return (normal(seed, b, h, w) + 0.5).clamp(0, 1)


@given(sizes("b rows columns"), sizes("tall wide", largest=4), seeds, st.booleans())
def test_equals_paper_equation_on_whole_cells(grid, cell, seed, given_grid):
    b, rows, columns = grid
    # A cell is square unless the grid is given: only then does the mask's aspect tell the grid.
    tall, wide = cell if given_grid else (cell[0], cell[0])
    mask = soft_mask(seed, b, rows * tall, columns * wide)
    scores = normal(seed + 1, b, rows * columns).tanh()
    target = paper.area_average(mask, rows, columns)
    loss = block()(scores, mask, grid=(rows, columns) if given_grid else None)
    assert_equal(loss, paper.eq4_contrastive(scores, target, TAU), largest=math.exp(1 / TAU))


@given(sizes("b rows columns h w", largest=6), seeds)
def test_cell_that_cuts_pixels_averages_those_it_touches(size, seed):
    b, rows, columns, h, w = size
    mask, scores = soft_mask(seed, b, h, w), normal(seed + 1, b, rows * columns).tanh()
    target = paper.area_average(mask, rows, columns)
    loss = block()(scores, mask, grid=(rows, columns))
    assert_equal(loss, paper.eq4_contrastive(scores, target, TAU), largest=math.exp(1 / TAU))


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [(480, 480, 15, 15), (64, 96, 4, 6), (30, 20, 3, 2)], ids=str)
def test_hard_masks_of_any_dtype_are_one_mask(dtype, size):
    h, w, rows, columns = size
    mask = soft_mask(0, 2, h, w).round()
    scores = normal(1, 2, rows * columns).tanh()
    loss, expected = (block()(scores, m) for m in (mask.to(dtype), mask))
    # Sums over a cell of 1024 pixels are exact in float32; only its mean is rounded there.
    assert (loss - expected).detach().abs() < torch.finfo(torch.float32).eps


def test_target_is_read_row_by_row():
    mask = torch.zeros(1, 4, 6)
    mask[0, :2, 4:] = 1
    scores = torch.full((1, 6), -1.0)
    scores[0, 2] = 1.0
    right = block(0.1)(scores, mask, grid=(2, 3))
    assert right < 1e-3
    assert all(block(0.1)(scores.roll(k, dims=1), mask, grid=(2, 3)) > 1 for k in range(1, 6))


@given(seeds)
@example(0)
def test_padded_tokens_do_not_count(seed):
    mask, scores = soft_mask(seed, 2, 6, 6), normal(seed + 1, 2, 9).tanh()
    visual_mask = torch.arange(9) < torch.tensor([[9], [4]])
    poisoned = scores.masked_fill(~visual_mask, math.nan)
    target = paper.area_average(mask, 3, 3)
    expected = paper.eq4_contrastive(scores, target, TAU, visual_mask)
    assert_equal(block()(poisoned, mask, visual_mask=visual_mask), expected, largest=math.exp(1 / TAU))


@pytest.mark.parametrize("temperature", [0.01, 0.07, 3.0])
def test_temperature_is_learned_as_its_logarithm(temperature):
    loss_of = block(temperature)
    assert [name for name, _ in loss_of.named_parameters()] == ["log_temperature"]
    scores, mask = normal(0, 1, 4).tanh(), soft_mask(1, 1, 4, 4)
    loss_of(scores, mask).backward()
    tau = loss_of.log_temperature.detach().exp().requires_grad_()
    paper.eq4_contrastive(scores, paper.area_average(mask, 2, 2), tau).backward()
    # The literal 1 - σ of the oracle loses digits as e^(1/τ) does; compare where it keeps some.
    if temperature > 0.05:
        assert_equal(loss_of.log_temperature.grad, tau.grad * tau.detach(), largest=math.exp(1 / temperature))
    assert loss_of.log_temperature.grad.isfinite() and loss_of.log_temperature.grad != 0
    start = PixelContrastiveLoss(temperature=temperature).log_temperature.detach().exp()
    assert_equal(start, torch.tensor(temperature, dtype=torch.float64))


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
def test_same_under_autocast(autocast):
    loss_of = block(0.07).float()
    scores, mask = normal(0, 2, 225).tanh().float(), soft_mask(1, 2, 480, 480).float()
    plain = loss_of(scores, mask)
    with torch.autocast("cpu", dtype=autocast):
        assert loss_of(scores, mask).equal(plain)


def test_compiles_once_for_all_batches_of_a_resolution():
    # The grid that the aspect tells is a constant of the graph: another resolution compiles again.
    cases = []
    for b in (2, 5):
        cases.append(((normal(0, b, 12).tanh().requires_grad_(), soft_mask(1, b, 24, 32)), {}))
    assert_compiles_once(block(), cases)


@pytest.mark.parametrize(
    ("n", "h", "w", "grid"),
    [(7, 10, 10, None), (12, 100, 100, None), (6, 64, 64, None), (9, 10, 10, (2, 4)), (300, 480, 480, None)],
)
def test_refuses_a_grid_that_does_not_fit(n, h, w, grid):
    says = (
        rf"PixelContrastiveLoss: scores 'b n' has n={n}, but the grid \d+ x \d+ \(mask: {h} x {w}\) has \d+"
    )
    with pytest.raises(ValueError, match=says):
        block()(torch.zeros(1, n), torch.zeros(1, h, w), grid=grid)


@pytest.mark.parametrize(
    ("n", "h", "w", "rows"),
    [(225, 480, 480, 15), (300, 480, 640, 15), (280, 427, 640, 14), (20, 100, 130, 4), (225, 473, 473, 15)],
)
def test_grid_follows_the_aspect_of_the_mask(n, h, w, rows):
    scores, mask = normal(0, 1, n).tanh(), soft_mask(1, 1, h, w)
    inferred, told = (block()(scores, mask, grid=grid) for grid in (None, (rows, n // rows)))
    assert inferred.equal(told)


@pytest.mark.parametrize("temperature", [0, -1, math.nan])
def test_refuses_a_temperature_that_is_not_positive(temperature):
    says = f"PixelContrastiveLoss: temperature must be > 0, got {temperature:g}"
    with pytest.raises(ValueError, match=says):
        PixelContrastiveLoss(temperature=temperature)


def test_refuses_wrong_shapes_and_masks():
    scores, mask = torch.zeros(2, 9), torch.zeros(2, 6, 6)
    with pytest.raises(ValueError, match="PixelContrastiveLoss: mask 'b h w' has b=3, but scores has b=2"):
        block()(scores, torch.zeros(3, 6, 6))
    with pytest.raises(ValueError, match=r"PixelContrastiveLoss: mask has shape \(2, 1, 6, 6\)"):
        block()(scores, mask[:, None])
    with pytest.raises(
        ValueError, match="PixelContrastiveLoss: visual_mask 'b n' has n=8, but scores has n=9"
    ):
        block()(scores, mask, visual_mask=torch.ones(2, 8, dtype=torch.bool))
    with pytest.raises(
        TypeError, match=r"PixelContrastiveLoss: visual_mask must be bool .*, got torch.uint8"
    ):
        block()(scores, mask, visual_mask=torch.ones(2, 9, dtype=torch.uint8))
