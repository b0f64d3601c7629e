"""Files in and out: one error for what a user can mend, and writing that leaves nothing half-written."""

import errno
import os
import reprlib
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class InputError(ValueError):
    """A value from the user cannot be used. Printed as one line, with exit code 2.

    Args:
        thing: What cannot be used: an option, a file, a field of a file.
        problem: What is wrong with it, with the value found and the value expected.
        step: What the user can do next.
    """

    def __init__(self, thing: str, problem: str = "", step: str = "") -> None:
        super().__init__(thing, problem, step)  # as args, so that worker processes can send it
        self.thing, self.problem, self.step = thing, problem, step

    def __str__(self) -> str:
        line = f"{self.thing}: {self.problem}" if self.problem else self.thing
        return f"{line}; {self.step}" if self.step else line


def refuse_unwritable(path: str | Path) -> None:
    """Find out before long work whether ``path`` can be written after it.

    Raises:
        InputError: The place cannot be written.
    """
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{path}: is a folder, expected the name of a file to write")
    try:
        nearest = next(folder for folder in path.resolve().parents if folder.exists())
        with tempfile.TemporaryDirectory(dir=nearest):
            pass
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}); choose another place") from error


@contextmanager
def written_whole(path: str | Path, *, flush: bool = True) -> Iterator[Path]:
    """Give a temporary path beside ``path``, and move it onto ``path`` once the block ends well.

    The block writes a file or makes a folder there. If it raises, ``path`` stays as it was. A folder
    that stood at ``path`` is replaced whole. With ``flush`` all of it is on the disk before it has its name:
    a machine that loses power keeps the old one or the new. A data set of many files is sooner made again.

    Raises:
        InputError: The place cannot be written.
    """
    path = Path(path).resolve()
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise InputError(f"{path}: is neither a file nor a folder; choose another place")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        room = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}); choose another place") from error
    try:
        fresh = room / path.name
        yield fresh
        for part in (fresh, *fresh.rglob("*")) if flush else ():
            _flush(part)
        if not (fresh.is_dir() and path.is_dir()):
            os.replace(fresh, path)
        else:
            os.replace(path, room / "replaced")
            try:
                os.replace(fresh, path)
            except BaseException:
                os.replace(room / "replaced", path)
                raise
        _flush(path.parent)
    except OSError as error:
        # A full disk names no file. An error about some other file is not ours to explain.
        if error.filename is not None and not str(error.filename).startswith((str(path), str(room))):
            raise
        raise InputError(f"{path}: cannot be written ({error.strerror}); choose another place") from error
    finally:
        shutil.rmtree(room, ignore_errors=True)


def _flush(path: Path) -> None:
    """Wait until a file, or the list of names in a folder, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some file systems cannot do it for folders
            raise
    finally:
        os.close(descriptor)


def shown(value: object) -> str:
    """Print any value on one short line."""
    try:
        return reprlib.repr(value)
    except ValueError:  # an integer beyond Python's limit of printed digits
        return f"a huge {type(value).__name__}"


def printable(text: str) -> str:
    """Write out what a terminal would act on: line ends, escape sequences, turns of direction."""
    return "".join(one if one.isprintable() else repr(one)[1:-1] for one in text)


def one_line(error: BaseException) -> str:
    """Print what an exception says on one short line, or its type where it says nothing."""
    return " ".join(str(error).split())[:160] or type(error).__name__
