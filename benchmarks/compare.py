"""Is this tree faster than another one? Both run the rows of "auto" in turns; ratios with their spread.

    make bench-compare BASE=HEAD                    # this working tree beside the last commit
    python -m benchmarks.compare v0.1.0 --only 'extractor .*stage4-b8'

Each tree has a process of its own, with this tree's benchmarks, and is asked for one run at a time: here,
base, here, base ... A row whose result is wrong is not timed. Below 1, this tree is faster; a spread (p20 to
p80 of the ratios) that holds 1 shows no difference.
"""

import argparse
import importlib
import io
import json
import os
import re
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases import Case, Size, require_truth
from benchmarks.measure import synchronize

ROOT = Path(__file__).parents[1]
LIBRARIES = ("metris_blocks", "reference_model")
MODES = ("forward", "forward+backward")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def names() -> Iterator[str]:
    """Yield "stem size mode" of every row that can be compared."""
    for path in sorted(ROOT.glob("benchmarks/bench_*.py")):
        for stem in re.findall(r"^def bench_(\w+)\(", path.read_text(), re.MULTILINE):
            values = _parameters(_benchmark(stem))
            if "auto" in values["provider"]:
                yield from (f"{stem} {size} {mode}" for size in values["size"] for mode in MODES)


def case_of(stem: str, size: str) -> Case:
    """Build the case of a benchmark, as `make bench` does."""
    function = _benchmark(stem)
    chosen: Size = next(one for one in _parameters(function)["size"] if str(one) == size)
    built: list[Case] = []
    torch.manual_seed(0)
    function(row=built.append, device=DEVICE, size=chosen, dtype="float32")
    return built[0]


def _benchmark(stem: str) -> Any:
    """Import the one file with this benchmark: another tree may lack what the other files ask for."""
    for path in ROOT.glob("benchmarks/bench_*.py"):
        if f"\ndef bench_{stem}(" in path.read_text():
            return getattr(importlib.import_module(f"benchmarks.{path.stem}"), f"bench_{stem}")
    raise LookupError(f"there is no benchmark {stem}")


def _parameters(function: Any) -> dict[str, list]:
    return {mark.args[0]: mark.args[1] for mark in function.pytestmark if mark.name == "parametrize"}


# ------------------------------------------------------------------------------------- the process of a tree


def serve() -> None:
    """Answer on stdout, a line of JSON each: "stem size mode" prepares a row, an empty line runs it once."""
    answers, sys.stdout = sys.stdout, sys.stderr
    torch.set_num_threads(int(os.environ["METRIS_THREADS"]))
    prepare = run = lambda: None
    for line in map(str.strip, sys.stdin):
        if line:
            stem, size, mode = line.split()
            try:
                case = case_of(stem, size)
                require_truth(case, "auto", mode)
                prepare, run = case.steps("auto", mode)
                answer: object = "ready"
            # Another tree may lack anything that this tree's benchmarks ask for: the reason is the answer.
            except Exception as error:  # noqa: BLE001
                answer = f"{type(error).__name__}: {error}".splitlines()[0]
        else:
            prepare()
            synchronize(DEVICE)
            start = time.perf_counter()
            run()
            synchronize(DEVICE)
            answer = 1000 * (time.perf_counter() - start)
        print(json.dumps(answer), file=answers, flush=True)


class Tree:
    """A process that runs the benchmarks on the libraries of one tree.

    Args:
        libraries: Folder with metris_blocks and reference_model.
        room: Empty folder to put links in.
        threads: CPU threads.
    """

    def __init__(self, libraries: Path, room: Path, threads: int) -> None:
        for name in LIBRARIES:
            (room / name).symlink_to(libraries / name)
        (room / "benchmarks").symlink_to(ROOT / "benchmarks")
        # Threads that wait for the other tree must sleep, not spin.
        environment = os.environ | {"OMP_WAIT_POLICY": "PASSIVE", "METRIS_THREADS": str(threads)}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.compare", "--serve"],
            cwd=room,
            env=environment | {"PYTHONPATH": str(room)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, line: str = "") -> object:
        """Send one line and wait for the answer."""
        print(line, file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            raise SystemExit("bench-compare: a tree's process ended; its last words are above")
        return json.loads(answer)


# ----------------------------------------------------------------------------------------------- the command


def compare(here: Tree, base: Tree, rows: list[str], rounds: int) -> Iterator[list[str]]:
    """Yield the cells of each row: name, ms of base and here, ratio, spread."""
    for row in rows:
        problems = [f"{name}: {said}" for name, tree in (("here", here), ("base", base))
                    if (said := tree.ask(row)) != "ready"]  # fmt: skip
        if problems:
            yield [row, "", "", "", "; ".join(problems)]
            continue
        here.ask(), base.ask()  # warms up
        pairs = [(here.ask(), base.ask()) for _ in range(rounds)]
        ratios = sorted(ours / theirs for ours, theirs in pairs)
        low, high = ratios[len(ratios) // 5], ratios[-1 - len(ratios) // 5]
        ours, theirs = (statistics.median(ms) for ms in zip(*pairs))
        yield [
            row,
            f"{theirs:.3g}",
            f"{ours:.3g}",
            f"{statistics.median(ratios):.3f}",
            f"{low:.3f} to {high:.3f}",
        ]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="bench-compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("base", nargs="?", help="git revision to compare this working tree with")
    parser.add_argument("--only", default=r"stage4-b1 ", help="regular expression of rows (stem size mode)")
    parser.add_argument("--rounds", type=int, default=15, help="interleaved rounds of each row")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        return serve()
    if arguments.base is None:
        parser.error("say which revision to compare with, such as BASE=HEAD")
    if arguments.rounds < 1:
        parser.error(f"--rounds must be >= 1, got {arguments.rounds}")
    rows = [name for name in names() if re.search(arguments.only, name)]
    if not rows:
        parser.error(f"--only {arguments.only!r} matches no row, such as {next(names())!r}")
    archive = subprocess.run(["git", "archive", arguments.base, *LIBRARIES], cwd=ROOT, capture_output=True)
    if archive.returncode:
        parser.error(f"git has no {arguments.base}: {archive.stderr.decode().strip()}")
    with tempfile.TemporaryDirectory() as folder:
        rooms = [Path(folder, name) for name in ("here", "base", "library")]
        for room in rooms:
            room.mkdir()
        with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as tar:
            # Pythons before 3.10.12 and 3.11.4 have no filters.
            tar.extractall(rooms[2], **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
        trees = [Tree(ROOT, rooms[0], arguments.threads), Tree(rooms[2], rooms[1], arguments.threads)]
        print(f"{'row':<40} {'base ms':>9} {'here ms':>9} {'here/base':>9}  p20 to p80", flush=True)
        try:
            for row, theirs, ours, median, spread in compare(*trees, rows, arguments.rounds):
                print(f"{row:<40} {theirs:>9} {ours:>9} {median:>9}  {spread}", flush=True)
        finally:
            for tree in trees:
                tree.process.kill()


if __name__ == "__main__":
    main()
