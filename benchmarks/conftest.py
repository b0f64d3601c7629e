"""The fixture `row`: true first, then timed in turns, then written to results/<device>.json."""

import datetime
import importlib.metadata
import json
import os
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
import torch

from benchmarks.cases import DTYPES, Case, Size, Truth, require_truth
from benchmarks.measure import event_ms, graph_of, ratio, roofline, synchronize
from reference_model.cost import device_name, peak_bytes

Row = dict[str, object]
RESULTS = Path(os.environ.get("METRIS_BENCH_RESULTS", Path(__file__).parent / "results"))
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# What a row is: a later run replaces the row of the same key.
KEY = ("stem", "provider", "mode", "stage", "b", "dtype")
# Every row is compared, in turns, with these.
REFERENCES = ("literal", "sdpa")
# Seconds that a row on the CPU may take, its references included; between 3 and 20 rounds.
_CPU_SECONDS = 0.4
# Seconds for all rows together; those that come later say so.
_ALL_SECONDS = 420 if DEVICE == "cuda" else 540
_NAME = device_name(torch.device(DEVICE)) + (
    f", {torch.get_num_threads()} threads" if DEVICE == "cpu" else ""
)
_started = time.monotonic()
_rows: list[Row] = []
_truth: dict[tuple[object, ...], Truth] = {}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Measure small sizes first, as a slow machine runs out of time on large ones; a case's rows together."""

    def order(item: pytest.Item) -> tuple[int, str, str, str, str]:
        given = item.callspec.params
        size = given["size"]
        return size.b * size.n, str(size), item.originalname, given["mode"], given["dtype"]

    items.sort(key=order)


@pytest.fixture
def device() -> str:
    return DEVICE


@pytest.fixture
def provider(request) -> str:
    return request.param


@pytest.fixture
def mode(request) -> str:
    return request.param


@pytest.fixture
def size(request) -> Size:
    return request.param


@pytest.fixture
def dtype(request) -> str:
    return request.param


@pytest.fixture(autouse=True)
def seed() -> None:
    """Draw a row's numbers alike, whichever rows are asked for."""
    torch.manual_seed(0)


@pytest.fixture
def row(request, benchmark, provider, mode, size, dtype) -> Callable[[Case], None]:
    """Measure one provider of a case; skip, with the reason in the results, what cannot run."""
    about = {
        "stem": request.function.__name__.removeprefix("bench_"),
        "provider": provider,
        "mode": mode,
        "stage": size.stage,
        "b": size.b,
        "n": size.n,
        "c": size.c,
        "dtype": dtype,
        **_versions(),
    }

    def skip_if(why: str) -> None:
        if why:
            _rows.append({key: about[key] for key in KEY} | {"skipped": why})
            pytest.skip(why)

    def measure(case: Case) -> None:
        way = case.ways[provider]
        skip_if(way if isinstance(way, str) else "")
        skip_if("" if mode == "forward" or case.differentiable() else "has no gradient")
        # Providers of one case follow each other, and all draw the same numbers: one truth serves them.
        key = (about["stem"], mode, str(size), dtype)
        if key not in _truth:
            _truth.clear()
            _truth[key] = Truth(case, mode)
        require_truth(case, provider, mode, _truth[key])
        found = _times(benchmark, case, provider, mode)
        # A backward does twice the products of its forward.
        passes = {"forward": 1, "graph": 1, "backward": 2, "forward+backward": 3}[mode]
        flops, moved = _roofline(dtype)
        bound = max(passes * case.flop / flops, passes * case.nbytes / moved)
        found["gflop"], found["mbytes"] = passes * case.flop / 1e9, passes * case.nbytes / 1e6
        # Of the equations as written out: a way that gets by with fewer operations may exceed 1.
        found["roofline_share"] = 1000 * bound / found.get("event_ms", found["ms"])
        benchmark.extra_info.update(about | found)
        _rows.append(about | found)

    # Before anything is drawn: most rows need a GPU.
    skip_if(_why_not_here(provider, mode, size, dtype))
    skip_if("out of time" if time.monotonic() - _started > _ALL_SECONDS else "")
    return measure


def _why_not_here(provider: str, mode: str, size: Size, dtype: str) -> str:
    if DEVICE == "cuda":
        return ""
    if mode == "graph":
        return "device=cpu (CUDA graphs need cuda)"
    if dtype != "float32":
        return f"device=cpu ({dtype} is measured on GPUs)"
    if "compiled" in provider and mode == "backward":
        return "device=cpu (left out: forward+backward is compiled)"
    if size.n > 225 and (size.b > 1 or mode == "backward"):
        return "device=cpu (left out: all rows have ten minutes)"
    return ""


def _times(benchmark, case: Case, provider: str, mode: str) -> dict[str, object]:
    references = [name for name in REFERENCES if name != provider and callable(case.ways.get(name))]
    steps = {name: case.steps(name, mode) for name in (provider, *references)}
    prepare, run = steps[provider]
    found: dict[str, object] = {}
    if mode == "graph":
        run = graph_of(run)

    def timed(step: Callable[[], object]) -> float:
        start = time.perf_counter()
        step()
        synchronize(DEVICE)
        return time.perf_counter() - start

    seconds: dict[str, list[float]] = {name: [] for name in steps}

    def others() -> None:
        # A B A B: the references run once before each round of this row.
        for name in references:
            steps[name][0]()
            synchronize(DEVICE)
            seconds[name].append(timed(steps[name][1]))
        prepare()
        synchronize(DEVICE)

    def own() -> None:
        seconds[provider].append(timed(run))

    others()
    own()
    total = sum(x[-1] for x in seconds.values())
    for x in seconds.values():
        x.clear()
    rounds = 30 if DEVICE == "cuda" else max(3, min(20, int(_CPU_SECONDS / total)))
    benchmark.pedantic(own, setup=others, rounds=rounds, warmup_rounds=0)
    ms = sorted(1000 * x for x in seconds[provider])
    found["ms"] = statistics.median(ms)
    found["p20_ms"], found["p80_ms"] = ms[len(ms) // 5], ms[-1 - len(ms) // 5]
    found["rounds"] = rounds
    for name in references:
        found[f"ratio_to_{name}"] = ratio(seconds[provider], seconds[name])
    if DEVICE == "cuda":
        found["event_ms"] = event_ms(run, 30, prepare)
        for name in references if mode != "graph" else ():
            found[f"event_ratio_to_{name}"] = found["event_ms"] / event_ms(steps[name][1], 30, steps[name][0])
    prepare()
    whole = run if mode != "backward" else lambda: (prepare(), run())
    found["peak_mib"] = peak_bytes(whole, DEVICE) / 2**20
    return found


@cache
def _roofline(dtype: str) -> tuple[float, float]:
    return roofline(DEVICE, DTYPES[dtype])


@cache
def _versions() -> dict[str, object]:
    def version(package: str) -> str:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return "none"

    # "-dirty" behind the commit: the tree held more than that.
    words = ["git", "describe", "--always", "--dirty"]
    git = subprocess.run(words, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return {
        "device": _NAME,
        **{package: version(package) for package in ("torch", "triton", "xformers")},
        "commit": git.stdout.strip() or "unknown",
        "date": datetime.date.today().isoformat(),
    }


@pytest.fixture(scope="session", autouse=True)
def results() -> Iterator[None]:
    """Merge the rows of this run into the file of this device, written whole."""
    yield
    if not _rows:
        return
    RESULTS.mkdir(exist_ok=True)
    slug = re.sub(r"[^a-z0-9]+", "-", _NAME.lower()).strip("-")
    path = RESULTS / f"{slug}.json"
    rows = merged(json.loads(path.read_text())["rows"] if path.exists() else [], _rows)
    peaks = {
        dtype: {"flop_per_s": _roofline(dtype)[0], "bytes_per_s": _roofline(dtype)[1]}
        for dtype in sorted({row["dtype"] for row in rows if "ms" in row})
    }
    # One line a row: differences between runs can be read.
    lines = ",\n".join(map(json.dumps, rows))
    head = json.dumps({"device": _NAME, "roofline": peaks})
    part = path.with_suffix(".part")
    part.write_text(f'{head[:-1]}, "rows": [\n{lines}\n]}}\n')
    os.replace(part, path)


def merged(before: list[Row], after: list[Row]) -> list[Row]:
    """Replace rows by those of the same key, but what was measured not by what is skipped now."""
    rows = {_key(row): row for row in before}
    for row in after:
        if "ms" in row or "ms" not in rows.get(_key(row), {}):
            rows[_key(row)] = row
    return [rows[key] for key in sorted(rows)]


def _key(row: Row) -> tuple[str, ...]:
    return tuple(str(row[name]) for name in KEY)
