"""One process or several that torchrun started: joining them, and what one has to know of the others."""

import atexit
import multiprocessing
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from reference_model.files import InputError


def join_processes(device: str) -> torch.device:
    """Join the processes that torchrun started, if it did, and take the device of this one.

    Args:
        device: cpu, cuda, cuda:1 or auto; of several processes each takes the GPU of its local rank.

    Raises:
        InputError: The device cannot be had.
    """
    several = {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()
    if several and (device == "cuda" or (device == "auto" and torch.cuda.is_available())):
        # Before anything else touches a GPU, or every process would hold some memory of the first one.
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    found = pick_device(device)
    if several and found.type == "cuda" and ":" in device:
        raise InputError(f"device {device}: torchrun gives each process a GPU of its own; use cuda or auto")
    if several and not dist.is_initialized():
        # Scores are added up on the CPU, gradients where they are.
        dist.init_process_group("cpu:gloo,cuda:nccl" if found.type == "cuda" else "gloo")
    return found


@contextmanager
def joined(device: str) -> Iterator[torch.device]:
    """`join_processes` for the length of a block, unless they are together already."""
    before = running()
    found = join_processes(device)
    try:
        yield found
    finally:
        if running() and not before:
            dist.destroy_process_group()


def running() -> bool:
    """Whether this process is one of a group."""
    return dist.is_available() and dist.is_initialized()


def place() -> tuple[int, int]:
    """Give the number of this process and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if running() else (0, 1)


def anywhere(flag: bool) -> bool:
    """Whether a flag is set in any process; all must ask."""
    if not running():
        return flag
    flags = [False] * dist.get_world_size()
    dist.all_gather_object(flags, flag)
    return any(flags)


def pick_device(name: str) -> torch.device:
    """Turn "auto", "cpu", "cuda", "cuda:1" ... into a device.

    Raises:
        InputError: torch does not know it or this machine has none.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        first = str(error).splitlines()[0]
        raise InputError(f"device {name}: cannot be used ({first}); use cpu or auto") from error


def outlive_sigterm(worker: int) -> None:
    """Leave SIGTERM to the process that trains: schedulers send it to all of a job (a ``worker_init_fn``).

    A worker ends with its parent in any case, which ends it by `_end_workers` where it did not do so before.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


@atexit.register
def _end_workers() -> None:
    """End workers that are left: at exit Python would send them SIGTERM and wait for them, for ever."""
    workers = [child for child in multiprocessing.active_children() if child.daemon]
    for worker in workers:
        worker.terminate()
    for worker in workers:
        worker.join(timeout=1)
        worker.kill()
