"""Do time and memory of the extractor grow linearly with the number of visual tokens? Fitted exponents.

    python -m benchmarks.scaling    # n = 225 .. 14,400 (480 px, stages 4 to 1), b=1, l=21, c=1024, d=768

Prints ms and MiB for each n, and the slope of their logarithms against log n: 1 is linear. What no n
changes (MLPs of l tokens, weights) makes small n look dear, so the slope may lie below 1. "literal" is left
out where Repeat(F_v, L) alone would fill the memory.
"""

import argparse
import json
import math
import statistics

import torch

from benchmarks.baselines import extractor_ways
from metris_blocks import VisualExpressionExtractor
from reference_model.cost import latencies, peak_bytes

SIZES = (225, 900, 3600, 14400)
_LARGEST_LITERAL = 3600


def measure(*, b: int, l: int, c: int, d: int, rounds: int, threads: int) -> dict[str, object]:
    """Give {mode: {way: {"ms": {n: ..}, "MiB": {n: ..}, "time exponent": .., "memory exponent": ..}}}."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    extractor = VisualExpressionExtractor(c, d, d)
    report = {}
    for mode in ("forward", "forward_backward"):
        rows: dict[str, dict[str, dict[int, float]]] = {}
        for n in SIZES:
            ways = _ways(extractor, torch.randn(b, n, c), torch.randn(b, l, d), backward=mode != "forward")
            if n > _LARGEST_LITERAL:
                del ways["literal"]
            times = latencies(ways, range(rounds + 1), torch.device("cpu"))
            for name, way in ways.items():
                row = rows.setdefault(name, {"ms": {}, "MiB": {}})
                row["ms"][n] = statistics.median(times[name])
                row["MiB"][n] = peak_bytes(way) / 2**20
        report[mode] = {
            name: {
                **row,
                "time exponent": fitted_exponent(row["ms"]),
                "memory exponent": fitted_exponent(row["MiB"]),
            }
            for name, row in rows.items()
        }
    return report


def fitted_exponent(by_size: dict[int, float]) -> float:
    """Least-squares slope of log value against log size."""
    x, y = ([math.log(value) for value in values] for values in (by_size, by_size.values()))
    return statistics.linear_regression(x, y).slope


def _ways(extractor, visual, language, *, backward):
    leaves = [x.requires_grad_() for x in (visual, language)]

    def run(call):
        if backward:
            return torch.autograd.grad(call(*leaves).sum(), [*extractor.parameters(), *leaves])
        with torch.inference_mode():
            return call(visual, language)

    return {name: lambda call=call: run(call) for name, call in extractor_ways(extractor).items()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--b", type=int, default=1, help="samples")
    parser.add_argument("--l", type=int, default=21, help="expression tokens")
    parser.add_argument("--c", type=int, default=1024, help="visual channels")
    parser.add_argument("--d", type=int, default=768, help="language and guidance channels")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    print(json.dumps(measure(**vars(parser.parse_args())), indent=2))
