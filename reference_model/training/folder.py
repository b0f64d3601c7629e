"""The folder of a run: one command at a time, and the note of what it is trained with."""

import fcntl
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from accelerate import Accelerator

from reference_model.checkpoints.checkpoint import GENERATED, WEIGHTS
from reference_model.data.convert import generated_note
from reference_model.files import InputError, refuse_unwritable, written_whole
from reference_model.training import state
from reference_model.training.distributed import on_first

_LOCK = ".lock"


@contextmanager
def lock_run_folder(out: Path, accelerator: Accelerator, *, dry_run: bool = False) -> Iterator[bool]:
    """Keep other commands out of a run's folder while this one trains in it.

    Yields:
        Whether an interrupted run is there to resume.

    Raises:
        InputError: A finished run is there, or another process trains in it.
    """
    if dry_run:
        yield False
        return
    file, fresh = None, [folder for folder in (out, *out.parents) if not folder.exists()]

    def lock() -> bool:
        nonlocal file
        interrupted = (out / state.STATES).is_dir()
        if (out / WEIGHTS).exists() and not interrupted:
            state.finish(out)  # it may have been killed at that
            raise InputError(f"{out}: holds the weights of a run already; choose another --out or remove it")
        refuse_unwritable(out / _LOCK)
        out.mkdir(parents=True, exist_ok=True)
        file = (out / _LOCK).open("a")
        try:
            # A lock of this process alone: those that load data would hold a flock a while after its death.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.close()
            file = None  # the other's, which it removes itself
            raise InputError(f"{out}: another metris train is at it; wait for that one") from error
        return interrupted

    try:
        yield on_first(accelerator, lock)
    finally:
        if file is not None:
            Path(file.name).unlink(missing_ok=True)
            file.close()
            with suppress(OSError):  # what is not empty stays
                for folder in fresh:
                    folder.rmdir()


def copy_generated_note(root: Path, out: Path) -> None:
    """Keep the settings of a generated data set beside the weights that were trained on it."""
    if (note := generated_note(root)) is not None:
        with written_whole(out / GENERATED) as path:
            shutil.copyfile(note, path)
