"""How time and memory are measured here: ways take turns, and memory is what the allocator hands out."""

import platform
import re
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from reference_model.model.cost import peak_bytes as peak_bytes

# Larger than the second-level cache of any GPU: writing it evicts what a row left there.
_FLUSH_BYTES = 256 * 2**20


def device_name(device: str) -> str:
    """Name the processor or the GPU, as its maker does."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else []
    return f"{names[0] if names else platform.machine()}, {torch.get_num_threads()} threads"


def synchronize(device: str) -> None:
    """Wait for the GPU, if there is one to wait for."""
    if device == "cuda":
        torch.cuda.synchronize()


def interleave(ways: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Time every way once a round, in turn, after a round that warms up. Seconds by way, on the CPU.

    Whatever slows the machine for a while slows all ways alike.
    """
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            times[name].append(time.perf_counter() - start)
    return {name: seconds[1:] for name, seconds in times.items()}


def ratio(ours: list[float], theirs: list[float]) -> float:
    """Median of the ratios of each round: machines are noisy, a median of ratios is not."""
    return statistics.median(one / other for one, other in zip(ours, theirs, strict=True))


def event_ms(function: Callable[[], object], rounds: int) -> float:
    """Median milliseconds between CUDA events around ``function``, with a cold second-level cache."""
    cache = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device="cuda")
    pairs = []
    for _ in range(rounds):
        pair = tuple(torch.cuda.Event(enable_timing=True) for _ in range(2))
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
    side = 8192 if device == "cuda" else 1536
    square = torch.randn(side, side, device=device).to(dtype)
    large = torch.empty((2**30 if device == "cuda" else 2**27) // square.element_size(), device=device).to(
        dtype
    )
    target = torch.empty_like(large)
    best = {}
    for name, work in (("flop", lambda: square @ square), ("bytes", lambda: target.copy_(large))):
        work()
        if device == "cuda":
            best[name] = event_ms(work, 10) / 1000
        else:
            best[name] = min(interleave({name: work}, 8)[name])
    return 2 * side**3 / best["flop"], 2 * large.nbytes / best["bytes"]
