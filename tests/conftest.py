"""One thread, one hypothesis profile, one table of tolerances, one way to compare compiled with eager."""

import os
from collections.abc import Callable, Iterable, Sequence
from itertools import combinations, product
from typing import Any

import pytest
import torch
from hypothesis import Phase, settings
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from metris_blocks.ops import explain_backends
from metris_blocks.ops.backends import triton

torch.set_num_threads(1)
# Tests fork processes that train. A backward pass whose engine starts after a fake tensor was made (compile
# and export make them) counts a fake CUDA device, starts a thread for it, and forbids autograd in every fork.
torch.ones((), requires_grad=True).backward()
settings.register_profile(
    "house",
    deadline=None,
    # Triton's interpreter takes a tenth of a second where the others take a thousandth.
    max_examples=5 if triton.INTERPRETED else 40,
    phases=[phase for phase in Phase if not (triton.INTERPRETED and phase in (Phase.shrink, Phase.explain))],
    derandomize=bool(os.environ.get("CI")),
    print_blob=True,
)
settings.load_profile("house")

# No test here chains more roundings than this on the way to one number: the longest, the extractor, passes
# about thirty sums of at most eight terms. A chain of k roundings errs by k · eps, relative to the largest
# number on the way (Higham, Accuracy and Stability, lemma 3.1).
ROUNDINGS = 512
TOLERANCE = {dtype: ROUNDINGS * torch.finfo(dtype).eps for dtype in (torch.float64, torch.float32)}


_tiny = torch.zeros(1, 1, 1, 8)
# What cannot run here is no test: triton runs on the CPU in its interpreter alone, xformers never.
ON_CPU = ["auto", *(name for name, why in explain_backends(_tiny, _tiny, _tiny).items() if not why)]
# Of the ops around attention.
BACKENDS_ON_CPU = [name for name in ("eager", "triton") if name in ON_CPU]


def places(*backends: str) -> list[tuple[str, str]]:
    """Pair each backend with each device that it may run on; on the CPU with those that do run."""
    on_cpu = [("cpu", name) for name in backends if name in ON_CPU]
    return [*on_cpu, *(("cuda", name) for name in backends)]


def cases(*axes: Sequence[Any], backends: Sequence[str]) -> list[Any]:
    """Choose few rows (device, backend, *values) in which each two values of two axes meet at least once.

    The kernels of xformers and triton know no float64, which is left out. Rows of a GPU are marked so.
    """

    def pairs(row: tuple[Any, ...]) -> set[Any]:
        places = list(enumerate(row))
        return {*places, *combinations(places, 2)}

    kernels = ("xformers", "triton")
    rows = [
        row
        for row in product(places(*backends), *axes)
        if not (row[0][1] in kernels and any(value is torch.float64 for value in row))
    ]
    left, chosen = set().union(*map(pairs, rows)), []
    while left:
        chosen.append(max(rows, key=lambda row: len(left & pairs(row))))
        left -= pairs(chosen[-1])
    return [
        pytest.param(*place, *values, marks=[pytest.mark.cuda] * (place[0] == "cuda"))
        for place, *values in chosen
    ]


def assert_equal(actual: Tensor, reference: Tensor, *, largest: float = 1.0) -> None:
    """Refuse ``actual`` (float64 or float32) where it leaves the float64 reference by more than rounding.

    ``largest`` is the largest number on the way to the result, where that is neither it nor about 1.
    """
    assert actual.shape == reference.shape
    largest = max(largest, float(reference.detach().abs().max()) if reference.numel() else 0.0)
    atol = TOLERANCE[actual.dtype] * largest
    torch.testing.assert_close(actual.double(), reference.double(), rtol=0, atol=atol)


def budget(eager_lowprec: Tensor, reference64: Tensor) -> float:
    """The error a 16-bit result may have: twice that of textbook code in its dtype, and its own rounding."""
    error = (eager_lowprec.double() - reference64).abs().max()
    rounding = torch.finfo(eager_lowprec.dtype).eps * reference64.abs().max()
    return float(2 * error + rounding)


def assert_within_budget(actual: Tensor, eager_lowprec: Tensor, reference64: Tensor) -> None:
    """Refuse ``actual`` where it is further from the float64 reference than textbook code would be."""
    assert actual.dtype == eager_lowprec.dtype
    atol = budget(eager_lowprec, reference64)
    torch.testing.assert_close(actual.double(), reference64, rtol=0, atol=atol)


def with_gradients(
    function: Callable[..., Tensor], leaves: Iterable[Tensor], cotangent: Tensor
) -> list[Tensor]:
    """Give the value of ``function`` at ``leaves``, and its gradients to all of them under ``cotangent``."""
    leaves = [x.detach().clone().requires_grad_() for x in leaves]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, cotangent)]


def assert_compiles_once(
    function: Callable[..., Any], cases: Iterable[tuple[tuple[Any, ...], dict[str, Any]]]
) -> None:
    """Compile ``function`` without a graph break; refuse a compilation after the first case.

    Values and, where something requires grad, the gradients of all inputs and parameters equal eager's.
    """
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, backend=counter, dynamic=True)
    parameters = []
    if isinstance(function, torch.nn.Module):
        parameters = [p for p in function.parameters() if p.requires_grad]
    frames = []
    for args, kwargs in cases:
        leaves = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.requires_grad]
        leaves += parameters
        pairs = zip(*(_run(f, args, kwargs, leaves) for f in (compiled, function)), strict=True)
        for actual, eager in pairs:
            assert actual.equal(eager) if actual.dtype == torch.bool else assert_equal(actual, eager) is None
        frames.append(counter.frame_count)
    assert len(frames) > 1 and len(set(frames)) == 1


def _run(function: Any, args: Any, kwargs: Any, leaves: list[Tensor]) -> list[Tensor]:
    out = function(*args, **kwargs)
    outs = [out] if isinstance(out, Tensor) else list(out)
    if not leaves:
        return outs
    total = sum(x.square().sum() for x in outs if x.requires_grad)
    return [*(x.detach() for x in outs), *torch.autograd.grad(total, leaves)]
