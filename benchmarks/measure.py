"""How time and memory are measured here: ways take turns, and memory is what the allocator hands out."""

import statistics
import time
from collections.abc import Callable, Mapping

from torch.profiler import ProfilerActivity, profile


def interleave(ways: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Time every way once a round, in turn, after a round that warms up. Seconds by way.

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


def peak_bytes(function: Callable[[], object]) -> int:
    """Bytes on the CPU that are held at once while ``function`` runs, beyond what was there before."""
    function()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        function()
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak
