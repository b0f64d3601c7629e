"""What every row of the benchmarks has in common: sizes, ways to compute one thing, and what is true."""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

L, D, JOINT, HEADS, RATIO = 21, 768, 256, 8, 0.3


@dataclass(frozen=True)
class Size:
    """Batch, visual tokens and their channels; the words are always 21."""

    stage: str
    b: int
    n: int
    c: int

    def __str__(self) -> str:
        return f"{self.stage}-b{self.b}"


# Swin-B at 480 px; n of stage 4 is 15 x 15.
STAGES = [("stage4", 225, 1024), ("stage3", 900, 512), ("stage2", 3600, 256), ("stage1", 14400, 128)]
SIZES = [Size(stage, b, n, c) for b in (1, 16) for stage, n, c in STAGES]
MODES = ["forward", "backward", "forward+backward", "graph"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

Way = Callable[..., Tensor]


class Case:
    """One thing to compute, in several ways.

    Args:
        leaves: Inputs; those that require grad are differentiated.
        build: Takes the modules and gives, for each provider, a function of the leaves, or the reason why it
            cannot run here. "literal" is the equation as printed: in float64 it is the truth.
        flop: Floating-point operations of the forward, as the paper writes it.
        nbytes: Bytes that no way can avoid to move in the forward: inputs, weights, result.
        modules: What holds the weights.
        slack: Share of the largest number by which a result may miss the truth beyond rounding.
    """

    def __init__(
        self,
        leaves: Sequence[Tensor],
        build: Callable[..., dict[str, Way | str]],
        *,
        flop: float,
        nbytes: float,
        modules: Sequence[nn.Module] = (),
        slack: float = 0.0,
    ) -> None:
        self.leaves, self.build, self.modules = leaves, build, modules
        self.flop, self.nbytes, self.slack = flop, nbytes, slack
        self.ways = build(*modules)

    def differentiable(self) -> bool:
        return any(x.requires_grad for x in self.leaves)

    def truth(self, mode: str) -> list[Tensor]:
        """Give the results in float64: the value, or the gradients of all leaves and parameters."""
        leaves = [
            x.detach().double().requires_grad_(x.requires_grad) if x.is_floating_point() else x
            for x in self.leaves
        ]
        modules = [copy.deepcopy(module).double() for module in self.modules]
        return Case(leaves, self.build, flop=0, nbytes=0, modules=modules).results("literal", mode)

    def results(self, provider: str, mode: str) -> list[Tensor]:
        prepare, run = self.steps(provider, mode)
        prepare()
        out = run()
        return [x.detach() for x in ([out] if isinstance(out, Tensor) else out)]

    def steps(self, provider: str, mode: str) -> tuple[Callable[[], object], Callable[[], object]]:
        """Give what comes before the timed part, and the timed part."""
        way = self.ways[provider]
        assert not isinstance(way, str)
        parameters = [p for module in self.modules for p in module.parameters()]
        wrt = [x for x in (*self.leaves, *parameters) if x.requires_grad]
        held: list[Tensor] = []

        def forward() -> Tensor:
            with torch.inference_mode():
                return way(*self.leaves)

        def prepare() -> None:
            held[:] = [way(*self.leaves)]

        def backward() -> tuple[Tensor, ...]:
            return torch.autograd.grad(held[0], wrt, torch.ones_like(held[0]))

        def both() -> tuple[Tensor, ...]:
            out = way(*self.leaves)
            return torch.autograd.grad(out, wrt, torch.ones_like(out))

        if mode == "backward":
            return prepare, backward
        return (lambda: None), both if mode == "forward+backward" else forward


def rows(*providers: str, sizes: Sequence[Size] = SIZES) -> Callable[[Any], Any]:
    """Parametrise a benchmark: provider x mode x size x dtype."""

    def parametrised(function: Any) -> Any:
        for name, values in (
            ("provider", providers),
            ("mode", MODES),
            ("size", sizes),
            ("dtype", list(DTYPES)),
        ):
            function = pytest.mark.parametrize(name, values, ids=str, indirect=True)(function)
        return function

    return parametrised


def compiled(function: Way, size: Size, device: str) -> Way | str:
    """Compile ``function``, or say why not."""
    if size.n > 225 or (device == "cpu" and size.b > 1):
        return "compiled for few sizes only: all rows have ten minutes"
    return torch.compile(function, dynamic=False)


def errors(actual: list[Tensor], truth: list[Tensor]) -> Iterator[float]:
    """Largest error of each tensor as a share of the largest true number."""
    for one, exact in zip(actual, truth, strict=True):
        largest = exact.abs().max().clamp_min(1e-12)
        error = (one.double() - exact).abs().max() / largest
        yield math.inf if error.isnan() else float(error)


class Truth:
    """The results of a case in float64, and how far the literal code in its own dtype is from them."""

    def __init__(self, case: Case, mode: str) -> None:
        self.results = case.truth(mode)
        self.literal = list(errors(case.results("literal", mode), self.results))


def require_truth(case: Case, provider: str, mode: str, truth: Truth | None = None) -> None:
    """Refuse a wrong way: twice the error of the literal code in its dtype, and rounding, are allowed.

    Args:
        case: What is computed.
        provider: By which way.
        mode: As in `MODES`.
        truth: Of this case and mode, where it is known already.

    Raises:
        AssertionError: Names the provider, its error and what was allowed.
    """
    truth = truth or Truth(case, mode)
    actual = case.results(provider, mode)
    for one, other, x in zip(errors(actual, truth.results), truth.literal, actual, strict=True):
        allowed = 2 * other + 64 * torch.finfo(x.dtype).eps + case.slack
        assert one <= allowed, f"{provider} is wrong: error {one:.2g}, allowed {allowed:.2g}"


def draw(*shape: int, device: str, dtype: torch.dtype, grad: bool = True) -> Tensor:
    """Draw a standard normal tensor in float32 and round it to ``dtype``."""
    return torch.randn(*shape, device=device).to(dtype).requires_grad_(grad)


def attention_flop(l: int, n: int, width: int) -> float:
    """Count the two products of attention, l queries on n keys, all heads together ``width`` wide."""
    return 4.0 * l * n * width
