"""Rows of bytes, made once, that all workers of a run share."""

import os
import shutil
import tempfile
import warnings
from typing import Any

import numpy as np

from reference_model.files import InputError


class SharedCache:
    """Rows in a file without a name: what one process has written, all that forked from its maker read.

    The file is gone with the last of them, however they end. The system keeps its pages in memory as long as
    there is room. A process that got a pickled copy, as spawned workers do, has rows of its own.

    Args:
        rows: How many there are at most.
        width: Bytes of a row.

    Raises:
        InputError: The disk for temporary files has no room for all rows.
    """

    def __init__(self, rows: int, width: int) -> None:
        self.rows, self.width = rows, width
        folder = tempfile.gettempdir()
        needed, free = rows * (width + 1), shutil.disk_usage(folder).free
        if needed > free:
            raise InputError(
                f"cache: takes {needed / 1e9:.1f} GB, but {folder} has {free / 1e9:.1f} GB left; set TMPDIR "
                "to a folder on a larger disk, or leave it out"
            )
        self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115
        self._full = False

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
        """Keep (width,) uint8; where the disk has become full, say so once and keep no more."""
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

    def __getstate__(self) -> dict[str, Any]:
        return {"rows": self.rows, "width": self.width}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]
