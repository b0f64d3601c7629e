"""What a module costs: multiply-adds, latency, peak memory. Torch alone, so that the benchmarks share it."""

import os
import platform
import re
import time
from collections.abc import Callable, Iterable, Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn, profiler
from torch.utils.flop_counter import FlopCounterMode

import metris_blocks.ops  # noqa: F401  (registers the kernels that _own_kernels names)


def device_name(device: torch.device) -> str:
    """Name the processor or the GPU, as its maker does."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else []
    return names[0] if names else platform.machine()


def multiply_adds(model: nn.Module, *inputs: Tensor) -> dict[str, int]:
    """Count the multiply-adds of a forward pass, by the path of each module in ``model``; "" is all of it.

    Matrix products, convolutions and attention count; what is done element by element does not.
    """
    with FlopCounterMode(display=False, custom_mapping=_own_kernels()) as counter:
        model(*inputs)
    root, counts = type(model).__name__, counter.get_flop_counts()
    paths = {name: ".".join(filter(None, (root, name))) for name, _ in model.named_modules()}
    return {name: sum(counts.get(path, {}).values()) // 2 for name, path in paths.items()}


def _own_kernels() -> dict[Any, Callable[..., int]]:
    """Give the operations of the library's opaque kernels, which the counter cannot see into, from shapes."""
    kernels = torch.ops.metris_blocks
    attention = lambda query, key, *_, **__: 4 * prod(query) * key[1]
    return {
        kernels.xformers_attention: attention,
        kernels.triton_attention: attention,
        kernels.triton_score: lambda visual, language, **_: 2 * prod(visual) * language[1],
        kernels.triton_aggregate: lambda scores, mask, visual, *_, **__: 2 * prod(scores) * visual[-1],
    }


def latencies(
    calls: Mapping[Any, Callable[[], object]], rounds: Iterable[object], device: torch.device
) -> dict[Any, list[float]]:
    """Give the milliseconds of each call in each of ``rounds`` but the first, which warms up.

    The calls take turns, so that what slows the machine for a while slows all alike.
    """
    times: dict[Any, list[float]] = {name: [] for name in calls}
    for _ in rounds:
        for name, call in calls.items():
            times[name].append(_milliseconds(call, device))
    return {name: ms[1:] for name, ms in times.items()}


def _milliseconds(call: Callable[[], object], device: torch.device) -> float:
    if device.type == "cpu":
        start = time.perf_counter()
        call()
        return 1000 * (time.perf_counter() - start)
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    before.record(torch.cuda.current_stream(device))
    call()
    after.record(torch.cuda.current_stream(device))
    torch.cuda.synchronize(device)
    return before.elapsed_time(after)


def peak_bytes(call: Callable[[], object], device: torch.device | str = "cpu") -> int:
    """Bytes that the allocator holds at once while ``call`` runs, beyond what was there before."""
    call()
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    # Else kineto reports every start and stop on stderr; it reads this when it first runs.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    with profiler.profile(activities=[profiler.ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak
