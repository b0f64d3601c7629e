"""Every block and the selection, outside Python: exported programs and ONNX give what eager gives."""

import io
from collections.abc import Callable
from importlib.util import find_spec
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

import metris_blocks
from metris_blocks import (
    DynamicMaskCrossAttention,
    GlobalCue,
    GuidanceSet,
    LanguageEnhancer,
    MaskedSoftmaxAggregation,
    PixelContrastiveLoss,
    RelevanceCuration,
    VisualExpressionExtractor,
    VisualRelationshipSelfAttention,
)
from metris_blocks.ops import top_r_mask
from tests.conftest import assert_equal

ONNX = all(find_spec(name) for name in ("onnxruntime", "onnxscript"))

C, D, GRID = 12, 8, (4, 5)
N = GRID[0] * GRID[1]
# The traced sizes are none of the ones that programs are run with; 8 and 16 fill whole vectors of a kernel.
TRACED, RUN = (5, 7), [(1, 3), (3, 8), (2, 16), (5, 17)]


def masked(b: int, l: int) -> dict[str, Tensor]:
    return {"language_mask": torch.arange(l) < l - torch.arange(b)[:, None] % 3}


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def scored(b: int, l: int) -> tuple[Tensor, Tensor]:
    scores = drawn(b, l, N) / 3
    return scores, top_r_mask(scores, 0.3) & masked(b, l)["language_mask"][..., None]


class Case(NamedTuple):
    module: Callable[[], nn.Module]
    inputs: Callable[[int, int], dict[str, Tensor]]


def tokens(b: int, l: int) -> dict[str, Tensor]:
    visual_mask = {"visual_mask": torch.arange(N) < N - torch.arange(b)[:, None] % 4}
    return {"visual": drawn(b, N, C), "language": drawn(b, l, D)} | visual_mask | masked(b, l)


def enhanced(b: int, l: int) -> dict[str, Tensor]:
    both = tokens(b, l)
    return {name: both[name] for name in ("language", "visual", "language_mask")}


def aggregated(b: int, l: int) -> dict[str, Tensor]:
    scores, dynamic_mask = scored(b, l)
    return {"scores": scores, "dynamic_mask": dynamic_mask, "visual": drawn(b, N, C)}


def refined(b: int, l: int) -> dict[str, Tensor]:
    return {"aggregated": drawn(b, l, D), "visual": drawn(b, N, C), "dynamic_mask": scored(b, l)[1]}


def related(b: int, l: int) -> dict[str, Tensor]:
    return {"refined": drawn(b, l, D)} | masked(b, l)


def supervised(b: int, l: int) -> dict[str, Tensor]:
    return {"scores": scored(b, l)[0][:, 0], "mask": drawn(b, 16, 20).sigmoid()}


def worded(b: int, l: int) -> dict[str, Tensor]:
    return {"language": drawn(b, l, D)} | masked(b, l)


class Cues(nn.Module):
    """All kinds of `GlobalCue`, the learned one away from the mean."""

    def __init__(self) -> None:
        super().__init__()
        self.cues = nn.ModuleList(GlobalCue(D, kind) for kind in ("last", "mean", "learned"))
        self.cues[2].query.data = drawn(D)

    def forward(self, language: Tensor, language_mask: Tensor) -> tuple[Tensor, ...]:
        return tuple(out for cue in self.cues for out in cue(language, language_mask))


class Joined(nn.Module):
    """A guidance set of tokens with a mask and the same ones without."""

    def forward(self, language: Tensor, language_mask: Tensor) -> GuidanceSet:
        return GuidanceSet.join((language, language_mask), (language, None))


BLOCKS = {
    "GlobalCue": Case(Cues, worded),
    "GuidanceSet": Case(Joined, worded),
    "LanguageEnhancer": Case(lambda: LanguageEnhancer(D, C, depth=1, num_heads=2), enhanced),
    "RelevanceCuration": Case(lambda: RelevanceCuration(C, D, 6), tokens),
    "MaskedSoftmaxAggregation": Case(lambda: MaskedSoftmaxAggregation(C, D), aggregated),
    "DynamicMaskCrossAttention": Case(lambda: DynamicMaskCrossAttention(D, C, num_heads=2), refined),
    "VisualRelationshipSelfAttention": Case(lambda: VisualRelationshipSelfAttention(D, num_heads=2), related),
    "PixelContrastiveLoss": Case(PixelContrastiveLoss, supervised),
    "VisualExpressionExtractor": Case(
        lambda: VisualExpressionExtractor(C, D, D, joint_dim=6, num_heads=2), tokens
    ),
}
OPEN = {"b": Dim("b", max=64), "l": Dim("l", min=3, max=64)}


def exported(module: nn.Module, inputs: dict[str, Tensor], *, strict: bool) -> torch.export.ExportedProgram:
    """Trace with batch and words open, nothing else."""
    b, l = TRACED
    axes = {b: OPEN["b"], l: OPEN["l"]}
    shapes = {
        name: {i: axes[size] for i, size in enumerate(x.shape[:2]) if size in axes}
        for name, x in inputs.items()
    }
    shapes = {
        name: {i: dim for i, dim in dims.items() if (i == 0) == (dim is axes[b])}
        for name, dims in shapes.items()
    }
    with torch.no_grad():
        return torch.export.export(module, (), inputs, dynamic_shapes=shapes, strict=strict)


def as_list(out: Tensor | tuple[Tensor, ...]) -> list[Tensor]:
    return [out] if isinstance(out, Tensor) else list(out)


def assert_same(actual: list[Tensor], eager: list[Tensor]) -> None:
    for x, y in zip(actual, eager, strict=True):
        assert x.dtype == y.dtype
        assert x.equal(y) if y.dtype == torch.bool else assert_equal(x, y.double()) is None


def session(program: torch.export.ExportedProgram) -> Callable[[dict[str, Tensor]], list[Tensor]]:
    """Bring a program to ONNX Runtime."""
    import onnxruntime

    file = io.BytesIO()
    made = torch.onnx.export(program, dynamo=True, verbose=False, optimize=False)
    made.save(file, external_data=False)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    opened = onnxruntime.InferenceSession(file.getvalue(), options, providers=["CPUExecutionProvider"])
    names = [x.name for x in opened.get_inputs()]
    return lambda inputs: [
        torch.as_tensor(x) for x in opened.run(None, {n: inputs[n].numpy() for n in names})
    ]


def test_no_block_is_forgotten():
    listed = {name: getattr(metris_blocks, name) for name in metris_blocks.__all__}
    # What blocks return is no block; a guidance set is made by a function of its own.
    results = {name for name, thing in listed.items() if not issubclass(thing, nn.Module)} - {"GuidanceSet"}
    assert BLOCKS.keys() == listed.keys() - results


@pytest.mark.parametrize("name", BLOCKS)
def test_exported_block_gives_what_eager_gives_at_all_sizes(name):
    block, inputs = BLOCKS[name].module().eval(), BLOCKS[name].inputs
    program = exported(block, inputs(*TRACED), strict=False)
    module = program.module()
    runs = [lambda given: as_list(module(**given))]
    runs += [session(program)] if ONNX else []
    for b, l in RUN:
        given = inputs(b, l)
        with torch.no_grad():
            eager = as_list(block(**given))
        for run in runs:
            assert_same(run(given), eager)


def test_strict_export_gives_what_eager_gives_at_all_sizes():
    make, inputs = BLOCKS["VisualExpressionExtractor"]
    block = make().eval()
    module = exported(block, inputs(*TRACED), strict=True).module()
    for b, l in RUN:
        given = inputs(b, l)
        with torch.no_grad():
            assert_same(as_list(module(**given)), as_list(block(**given)))


class TopR(nn.Module):
    def forward(self, scores: Tensor, visual_mask: Tensor) -> tuple[Tensor, Tensor]:
        return top_r_mask(scores, 0.3), top_r_mask(scores, 0.3, visual_mask=visual_mask)


def tied(b: int, n: int) -> dict[str, Tensor]:
    """Rows in which the edge of the top r is a tie, of both zeros and infinities too; padding anywhere."""
    generator = torch.Generator().manual_seed(b * n)
    values = torch.tensor([0.5, 0.0, -0.0, -0.5, torch.inf, -torch.inf])
    scores = values[torch.randint(6, (b, 3, n), generator=generator)]
    scores[0, 0], scores[-1, 1] = 0.0, -torch.inf
    visual_mask = torch.rand(b, n, generator=generator) < 0.6
    visual_mask[-1] = False
    return {"scores": scores, "visual_mask": visual_mask}


def test_exported_selection_keeps_the_same_tokens_where_scores_tie():
    b, n = Dim("b", max=64), Dim("n", min=2, max=4096)
    shapes = {"scores": {0: b, 2: n}, "visual_mask": {0: b, 1: n}}
    program = torch.export.export(TopR(), (), tied(5, 11), dynamic_shapes=shapes, strict=False)
    module = program.module()
    runs = [lambda given: module(**given), *([session(program)] if ONNX else [])]
    for given in (tied(1, 2), tied(2, 40), tied(4, 225), tied(3, 1600)):
        eager = TopR()(**given)
        for run in runs:
            assert all(x.equal(y) for x, y in zip(run(given), eager, strict=True))
