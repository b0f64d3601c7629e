"""What a run tells: one bar, a log that can be plotted, and a note of where and with what it was done."""

import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import torch
from tqdm import tqdm

from reference_model.cost import device_name
from reference_model.files import written_whole

T = TypeVar("T")

LOG, NOTE = "log.jsonl", "run.json"
_PACKAGES = ("metris-blocks", "torch", "timm", "transformers", "accelerate", "safetensors", "numpy", "pillow")


class Log:
    """A file of one JSON object a line, each on disk as soon as it is written.

    Args:
        path: The file; None: nothing is written.
        done: Steps that the run did before; what the log says of later ones is dropped, for they are done
            again.
    """

    def __init__(self, path: Path | None, *, done: int = 0) -> None:
        self.file = None
        if path is None:
            return
        before = path.read_text(encoding="utf-8").splitlines() if done and path.exists() else []
        with written_whole(path) as fresh:
            fresh.write_text("".join(f"{line}\n" for line in before if _step(line) <= done), encoding="utf-8")
        self.file = path.open("a", encoding="utf-8")

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *_: object) -> None:
        if self.file is not None:
            self.file.close()

    def write(self, **entry: Any) -> None:
        """Append one entry."""
        if self.file is not None:
            self.file.write(json.dumps(entry) + "\n")
            self.file.flush()


def _step(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")  # a line that was being written when the run was killed


class Meter:
    """Images per second, time spent waiting for them, and memory, since it was last read."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.start()

    def start(self) -> None:
        """Begin anew, so that what was not training is not counted."""
        self.images, self.steps, self.step_seconds, self.waited = 0, 0, 0.0, 0.0
        self.since = self.latest = time.monotonic()

    def waiting(self, batches: Iterator[T]) -> Iterator[T]:
        """Yield the batches, and time how long each is waited for."""
        while True:
            began = time.monotonic()
            batch = next(batches, None)
            self.waited += time.monotonic() - began
            if batch is None:
                return
            yield batch

    def count(self, images: int) -> None:
        """Count a step."""
        self.images, self.steps = self.images + images, self.steps + 1
        now = time.monotonic()
        self.step_seconds, self.latest = now - self.latest, now

    def read(self) -> dict[str, float]:
        """Give them, the waiting as a share of the time; the next reading counts from here."""
        seconds = max(self.latest - self.since, 1e-9)
        found = {
            "images_per_second": round(self.images / seconds, 2),
            "step_seconds": round(seconds / max(self.steps, 1), 4),
            "data_wait": round(self.waited / seconds, 4),
            "memory_MiB": peak_memory(self.device),
        }
        self.images, self.steps, self.waited, self.since = 0, 0, 0.0, self.latest
        return found


def peak_memory(device: torch.device) -> int:
    """MiB that this process held at most: on its GPU, or altogether where there is none."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) // 2**20
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit // 2**20


def progress_bar(done: int, steps: int, *, shown: bool) -> tqdm:
    """One bar for the whole run; its speed and the time left count from where it went on."""
    return tqdm(total=steps, initial=done, desc="train", unit="step", disable=not shown)


def write_note(run: Path, facts: Mapping[str, Any], *, done: int, device: torch.device) -> None:
    """Note where and with what the run is done: one session more for each time it goes on."""
    session = {
        "step": done,
        "at": datetime.now().astimezone().isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in _PACKAGES},
        "commit": commit(),
        "hardware": {
            "device": device_name(device),
            "processors": os.cpu_count(),
            "threads": torch.get_num_threads(),
        },
        **facts,
    }
    path = run / NOTE
    before = json.loads(path.read_text(encoding="utf-8"))["sessions"] if done and path.exists() else []
    note = json.dumps({"sessions": [*before, session]}, indent=2)
    with written_whole(path) as fresh:
        fresh.write_text(note + "\n", encoding="utf-8")


def commit() -> str | None:
    """Name the git commit of this code, with + where files differ from it; None outside of a repository."""
    git = ("git", "-C", str(Path(__file__).parent))
    try:
        # It may be installed below a repository that is not its own.
        subprocess.run([*git, "ls-files", "--error-unmatch", __file__], capture_output=True, check=True)
        found = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
        differs = subprocess.run([*git, "diff", "--quiet", "HEAD"], capture_output=True).returncode
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip() + "+" * bool(differs)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
