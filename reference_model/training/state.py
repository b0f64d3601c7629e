"""What a killed run goes on from: everything, in safetensors and JSON, whole on disk or not there at all.

A state is a folder ``RUN/state/step-00000400``: ``tensors.safetensors`` (weights, τ, optimiser, average),
``facts.json`` (step, place in the data, best scores, scaler), ``rng-0000.json`` for each process, and
``manifest.json`` with the SHA-256 of them. ``RUN/state`` is there while a run is unfinished.
"""

import hashlib
import json
import random
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim.swa_utils import AveragedModel

from reference_model.files import InputError, written_whole

STATES = "state"
_TENSORS, _FACTS, _MANIFEST = "tensors.safetensors", "facts.json", "manifest.json"


class State(NamedTuple):
    """A state as it was saved."""

    folder: Path
    tensors: dict[str, Tensor]
    """By the names of `named_tensors`."""
    facts: dict[str, Any]
    rngs: list[dict[str, Any]]
    """Of each process there was."""


# --------------------------------------------------------------------------------------------- what is in it


def named_tensors(
    objective: nn.Module, optimiser: torch.optim.Optimizer, average: AveragedModel | None
) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor that a step changes, under a name that does not depend on how it is spread."""
    for part, module in (("objective", objective), ("average", average)):
        if module is not None:
            kept = module.state_dict().keys()
            yield from ((f"{part}.{name}", p.detach()) for name, p in module.named_parameters())
            yield from ((f"{part}.{name}", b) for name, b in module.named_buffers() if name in kept)
    for name, p in objective.named_parameters():
        yield from ((f"optimiser.{name}.{key}", value) for key, value in optimiser.state.get(p, {}).items())


def whole(tensor: Tensor) -> Tensor:
    """Gather a tensor that is spread over processes; all of them must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def restore(
    tensors: dict[str, Tensor],
    objective: nn.Module,
    optimiser: torch.optim.Optimizer,
    average: AveragedModel | None,
) -> None:
    """Put the tensors of a state where `named_tensors` took them from; the optimiser is a fresh one.

    Raises:
        InputError: Names or shapes are not those of this run.
    """
    for name, p in objective.named_parameters():
        for key in ("exp_avg", "exp_avg_sq"):
            if f"optimiser.{name}.{key}" in tensors:
                optimiser.state[p][key] = torch.zeros_like(p)  # laid out and spread as p is
        if (step := tensors.get(f"optimiser.{name}.step")) is not None:
            optimiser.state[p]["step"] = step.to(p.device)
    wanted = dict(named_tensors(objective, optimiser, average))
    if odd := sorted(wanted.keys() ^ tensors.keys()):
        raise InputError(f"state: has other tensors than this run, such as {odd[0]}; choose another --out")
    for name, tensor in wanted.items():
        found = tensors[name].to(tensor.device)
        if found.shape != tensor.shape:
            shapes = f"{tuple(found.shape)}, expected {tuple(tensor.shape)}"
            raise InputError(f"state: {name} has shape {shapes}; choose another --out")
        if isinstance(tensor, DTensor):
            found = distribute_tensor(found, tensor.device_mesh, tensor.placements)
        tensor.copy_(found)


def random_state() -> dict[str, Any]:
    """Give the state of all random numbers of this process, ready for JSON."""
    name, keys, *rest = np.random.get_state()
    return {
        "torch": torch.get_rng_state().numpy().tobytes().hex(),
        "cuda": torch.cuda.get_rng_state().numpy().tobytes().hex() if torch.cuda.is_initialized() else None,
        "numpy": [name, keys.tolist(), *rest],
        "python": random.getstate(),
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Go on from where `random_state` was."""
    torch.set_rng_state(_bytes(state["torch"]))
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(_bytes(state["cuda"]))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))


def _bytes(hexadecimal: str) -> Tensor:
    return torch.tensor(list(bytes.fromhex(hexadecimal)), dtype=torch.uint8)


# ------------------------------------------------------------------------------------------- out and in again


def save_state(
    run: Path, tensors: dict[str, Tensor], facts: dict[str, Any], rngs: list[dict[str, Any]], *, keep: int
) -> Path:
    """Write a state, whole and flushed to disk before it gets its name, and then drop the oldest ones.

    Args:
        run: Folder of the run.
        tensors: By the names of `named_tensors`, gathered, on the CPU.
        facts: What else there is to know, ready for JSON; ``step`` among it.
        rngs: Of each process.
        keep: States that stay, this one among them.

    Raises:
        InputError: The disk is full, or the place cannot be written; the states before stay as they were.
    """
    states = run / STATES
    with written_whole(states / f"step-{facts['step']:08d}") as folder:
        folder.mkdir()
        try:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / _TENSORS)
        except SafetensorError as error:
            raise InputError(f"{states}: cannot be written ({error}); make room there") from error
        _dump(facts, folder / _FACTS)
        for rank, rng in enumerate(rngs):
            _dump(rng, folder / f"rng-{rank:04d}.json")
        _dump({path.name: _sha256(path) for path in sorted(folder.iterdir())}, folder / _MANIFEST)
    steps = _steps(states)
    # Later ones were found broken, or this step would not have been done again.
    for old in [*(s for s in steps if s > facts["step"]), *[s for s in steps if s <= facts["step"]][:-keep]]:
        shutil.rmtree(states / f"step-{old:08d}", ignore_errors=True)
    return states / f"step-{facts['step']:08d}"


def newest_state(run: Path) -> Path | None:
    """Find the newest state of a run whose hashes hold, and name on stderr those that are left aside."""
    states = run / STATES
    for step in reversed(_steps(states)):
        folder = states / f"step-{step:08d}"
        problem = _problem(folder)
        if problem is None:
            return folder
        print(f"{folder}: {problem}; left aside for the one before", file=sys.stderr)
    return None


def load_state(folder: Path) -> State:
    """Read a state that `newest_state` found.

    Raises:
        InputError: This process, maybe on another machine, does not see it as it was written.
    """
    if problem := _problem(folder):
        raise InputError(f"{folder}: {problem}; give a folder that all machines see alike")
    rngs = [json.loads(path.read_text()) for path in sorted(folder.glob("rng-*.json"))]
    facts = json.loads((folder / _FACTS).read_text())
    return State(folder, load_file(folder / _TENSORS), facts, rngs)


def clear_leftovers(run: Path) -> None:
    """Remove what a run that was killed while it wrote left half-written."""
    for folder in (run, run / STATES, *run.glob("best/*")):
        for path in folder.glob(".*.????????"):  # as `written_whole` names them
            shutil.rmtree(path, ignore_errors=True)
    shutil.rmtree(run / f".{STATES}", ignore_errors=True)


def finish(run: Path) -> None:
    """Remove the states of a run; it is finished from the moment that their folder has another name."""
    leaving = run / f".{STATES}"
    if (run / STATES).is_dir():
        (run / STATES).rename(leaving)
    shutil.rmtree(leaving, ignore_errors=True)


def _steps(states: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in states.glob("step-*"))


def _problem(folder: Path) -> str | None:
    """Tell what is wrong with a state; None: nothing."""
    try:
        manifest = json.loads((folder / _MANIFEST).read_text())
        for name, expected in manifest.items():
            if _sha256(folder / name) != expected:
                return f"{name} is not what was written"
    except (OSError, ValueError, AttributeError) as error:
        return f"is not whole ({' '.join(str(error).split())})"
    return None if {_TENSORS, _FACTS, "rng-0000.json"} <= manifest.keys() else "is not whole"


def _sha256(path: Path) -> str:
    found = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(2**24):
            found.update(part)
    return found.hexdigest()


def _dump(value: Any, path: Path) -> None:
    path.write_text(json.dumps(value) + "\n", encoding="utf-8")
