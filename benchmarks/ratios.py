"""How much faster is the extractor than the paper's equations, written out? Ratios of interleaved runs.

    python -m benchmarks.ratios            # sizes of 480 px: b=8, l=21, n=225, c=1024, d=768, r=0.3

Each round runs every way once, in turn, and gives a ratio of ours over theirs; printed are their medians.
Nothing is timed before all ways agree.
"""

import argparse
import json
import statistics
from functools import partial

import torch

from benchmarks.baselines import literal_extractor, sdpa_extractor
from benchmarks.measure import interleave, ratio
from metris_blocks import VisualExpressionExtractor


def measure(
    b: int, l: int, n: int, c: int, d: int, *, rounds: int, threads: int
) -> dict[str, dict[str, float]]:
    """Give {mode: {"ours ms": ..., "ours / literal": ..., "ours / sdpa": ...}}, medians over the rounds."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    extractor = VisualExpressionExtractor(c, d, d)
    visual, language = torch.randn(b, n, c), torch.randn(b, l, d)
    ways = {
        "ours": lambda visual, language: extractor(visual, language).tokens,
        "literal": lambda visual, language: literal_extractor(extractor, visual, language),
        "sdpa": lambda visual, language: sdpa_extractor(extractor, visual, language),
    }
    reference = ways["literal"](visual, language)
    for name, way in ways.items():
        torch.testing.assert_close(
            way(visual, language), reference, rtol=1e-3, atol=1e-4, msg=f"{name} is wrong"
        )

    parameters = list(extractor.parameters())
    inputs = [x.clone().requires_grad_() for x in (visual, language)]

    def forward(way):
        with torch.inference_mode():
            way(visual, language)

    def forward_backward(way):
        torch.autograd.grad(way(*inputs).sum(), [*parameters, *inputs])

    report = {}
    for mode in (forward, forward_backward):
        times = interleave({name: partial(mode, way) for name, way in ways.items()}, rounds)
        report[mode.__name__] = {
            "ours ms": 1000 * statistics.median(times["ours"]),
            **{f"ours / {name}": ratio(times["ours"], times[name]) for name in ("literal", "sdpa")},
        }
    return report


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--b", type=int, default=8, help="samples")
    parser.add_argument("--l", type=int, default=21, help="expression tokens")
    parser.add_argument("--n", type=int, default=225, help="visual tokens")
    parser.add_argument("--c", type=int, default=1024, help="visual channels")
    parser.add_argument("--d", type=int, default=768, help="language and guidance channels")
    parser.add_argument("--rounds", type=int, default=15, help="interleaved rounds")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    print(json.dumps(measure(**vars(parser.parse_args())), indent=2))
