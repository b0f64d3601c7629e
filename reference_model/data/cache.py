"""Rows of bytes, made once, that all workers of a process share."""

import os
import shutil
import tempfile
import warnings
from collections.abc import Callable
from multiprocessing.context import get_spawning_popen
from multiprocessing.reduction import DupFd
from typing import Any

import numpy as np

from reference_model.files import InputError


class SharedCache:
    """Rows in a file without a name: what one process has written, its maker and all whom that started read.

    The file takes its place on the disk at once, and is gone with the last of them, however they end. The
    system keeps its pages in memory as long as there is room. Other copies by pickle have rows of their own.

    Args:
        rows: How many there are at most.
        width: Bytes of a row.

    Raises:
        InputError: The disk for temporary files has no room for all rows.
    """

    def __init__(self, rows: int, width: int) -> None:
        self.rows, self.width = rows, width
        self._full = False
        self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115
        needed = rows * (width + 1)
        try:
            # A disk that became full on the way might fail a checkpoint. macOS has no such call.
            if needed and hasattr(os, "posix_fallocate"):
                os.posix_fallocate(self._file.fileno(), 0, needed)
        except OSError as error:
            self._file.close()
            folder = tempfile.gettempdir()
            left = f"{shutil.disk_usage(folder).free / 1e9:.1f} GB left ({error.strerror})"
            raise InputError(
                f"cache: takes {needed / 1e9:.1f} GB, but {folder} has {left}; set TMPDIR to a folder on a "
                "larger disk, or leave it out"
            ) from error

    def read(self, row: int) -> np.ndarray | None:
        """(width,) uint8, a copy of its own; None: nobody has written it yet."""
        # Calls instead of a mapping: another process's row is whole once its mark is seen, on any processor,
        # and a full disk is an error in `write`, where a mapping would end the process.
        start = row * (self.width + 1)
        if os.pread(self._file.fileno(), 1, start) != b"\1":
            return None
        values = np.empty(self.width, np.uint8)
        os.preadv(self._file.fileno(), [values], start + 1)
        return values

    def write(self, row: int, values: np.ndarray) -> None:
        """Keep (width,) bytes; where the disk has become full all the same, say so and keep no more."""
        if self._full:
            return
        start = row * (self.width + 1)
        try:
            written = os.pwrite(self._file.fileno(), values, start + 1)
            if written == self.width:
                os.pwrite(self._file.fileno(), b"\1", start)
                return
            reason = f"{written} of {self.width} bytes written"
        except OSError as error:
            reason = str(error.strerror)
        self._full = True
        warnings.warn(
            f"cache: {tempfile.gettempdir()} takes no more ({reason}); what it lacks is made again each time",
            stacklevel=3,
        )

    def __reduce__(self) -> tuple[Callable[..., "SharedCache"], tuple[Any, ...]]:
        # Workers that are not forked get the open file itself while they are started.
        if get_spawning_popen() is None:
            return SharedCache, (self.rows, self.width)
        return _of_parent, (self.rows, self.width, DupFd(self._file.fileno()))


def _of_parent(rows: int, width: int, descriptor: Any) -> SharedCache:
    cache = SharedCache(0, width)
    cache.rows, cache._file = rows, os.fdopen(descriptor.detach(), "r+b", buffering=0)
    return cache
