"""How time is measured here: ratios of turns, CUDA events with a cold cache, graphs; a machine's bounds."""

import statistics
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from reference_model.cost import latencies

# Larger than the second-level cache of any GPU: writing it evicts what a row left there.
_FLUSH_BYTES = 256 * 2**20


def synchronize(device: str) -> None:
    """Wait for the GPU, if there is one to wait for."""
    if device == "cuda":
        torch.cuda.synchronize()


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Median of the ratios of each round: machines are noisy, a median of ratios is not."""
    return statistics.median(one / other for one, other in zip(ours, theirs, strict=True))


def event_ms(
    function: Callable[[], object], rounds: int, prepare: Callable[[], object] = lambda: None
) -> float:
    """Median milliseconds between CUDA events around ``function``, with a cold second-level cache.

    ``prepare`` runs before each, outside the time.
    """
    cache = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device="cuda")
    pairs = []
    for _ in range(rounds):
        pair = tuple(torch.cuda.Event(enable_timing=True) for _ in range(2))
        prepare()
        cache.zero_()
        pair[0].record()
        function()
        pair[1].record()
        pairs.append(pair)
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in pairs)


def graph_of(function: Callable[[], Tensor]) -> Callable[[], object]:
    """Record ``function`` as a CUDA graph and give what replays it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def roofline(device: str, dtype: torch.dtype) -> tuple[float, float]:
    """Measure what this machine can do at best: FLOP/s of a large matrix product, bytes/s of a copy."""
    side, numbers = (8192, 2**28) if device == "cuda" else (1536, 2**25)
    square = torch.randn(side, side, device=device).to(dtype)
    source = torch.zeros(numbers, dtype=dtype, device=device)
    target = torch.empty_like(source)
    works = {"flop": lambda: square @ square, "bytes": lambda: target.copy_(source)}
    least = {name: min(ms) for name, ms in latencies(works, range(11), torch.device(device)).items()}
    return 2000 * side**3 / least["flop"], 2000 * source.nbytes / least["bytes"]
