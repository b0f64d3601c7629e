"""Read pickles and JSON files that may hold nothing but plain data, from hands nobody vouches for."""

import io
import json
import os
import pickle
import reprlib
import struct
from pathlib import Path
from typing import Any, ClassVar

from reference_model.files import InputError

MEND = "fetch the file again from its source, or mend that entry"

# What garbage makes the unpickler raise, besides UnpicklingError; found by fuzzing.
_GARBAGE = (
    pickle.UnpicklingError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    RecursionError,
    TypeError,
    ValueError,
    struct.error,
)


class _Refused(Exception):
    """The pickle asks for something other than plain data."""


# The C unpickler reserves memory for whatever memo index a file states, so five bytes can take it all;
# the Python one is slower and safe.
class _PlainUnpickler(pickle._Unpickler):
    """Unpickle lists, dicts, strings and numbers; refuse every global, extension and persistent id."""

    # BYTEARRAY8 reserves as much memory as the file states, and plain data never needs it.
    dispatch: ClassVar = {
        op: load for op, load in pickle._Unpickler.dispatch.items() if op != pickle.BYTEARRAY8[0]
    }

    def find_class(self, module: str, name: str) -> Any:
        raise _Refused(f"the global {shown(f'{module}.{name}')}")

    def get_extension(self, code: int) -> Any:
        raise _Refused(f"the extension code {code}")

    def persistent_load(self, pid: Any) -> Any:
        raise _Refused(f"the persistent id {shown(pid)}")


def shown(value: object) -> str:
    """Print any value on one short line."""
    try:
        return reprlib.repr(value)
    except ValueError:  # an integer beyond Python's limit of printed digits
        return f"a huge {type(value).__name__}"


def one_line(error: BaseException) -> str:
    """Print what an exception says on one short line, or its type where it says nothing."""
    return " ".join(str(error).split())[:160] or type(error).__name__


def read_bytes(path: Path) -> bytes:
    """Read a whole file.

    Raises:
        InputError: It is missing or unreadable; says what its folder holds.
    """
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file; {path.parent} holds {listing(path.parent)}") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check its permissions") from error


def listing(folder: Path) -> str:
    """Name the first files of a folder, for messages that say what is there."""
    if not folder.is_dir():
        return "nothing: there is no such folder"
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        return f"what cannot be listed ({error.strerror})"
    return (
        ", ".join(map(repr, names[:12])) + (f" and {len(names) - 12} more" * (len(names) > 12)) or "nothing"
    )


def read_plain_pickle(path: Path) -> Any:
    """Unpickle plain data of any protocol, Python 2's byte strings as UTF-8 or else Latin-1.

    Raises:
        InputError: The file is missing, is no pickle, or asks for anything but plain data (named).
    """
    data = read_bytes(path)
    try:
        try:
            return _PlainUnpickler(io.BytesIO(data), fix_imports=False, encoding="utf-8").load()
        except UnicodeDecodeError:
            return _PlainUnpickler(io.BytesIO(data), fix_imports=False, encoding="latin-1").load()
    except _Refused as error:
        raise InputError(
            f"{path}: asks for {error}, but only lists, dicts, text and numbers are read; "
            "nothing was run: fetch the file again from its source, or save it as plain data"
        ) from error
    except _GARBAGE as error:
        raise InputError(
            f"{path}: not a whole pickle ({type(error).__name__}: {one_line(error)}); fetch the file again"
        ) from error


def read_plain_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        InputError: The file is missing, malformed or nested too deep.
    """
    data = read_bytes(path)
    try:
        return json.loads(data)
    except RecursionError as error:
        raise InputError(f"{path}: nested too deep for this kind of file; fetch the file again") from error
    except ValueError as error:
        raise InputError(
            f"{path}: not a whole JSON file ({one_line(error)}); fetch the file again"
        ) from error


def plain_field(entry: Any, key: str, kind: type, where: str) -> Any:
    """Take ``entry[key]``, which must be exactly of type ``kind``.

    Args:
        where: What the message begins with: file and entry.

    Raises:
        InputError: ``entry`` is not a dict, lacks the key, or holds another type or a number beyond 64 bits.
    """
    if type(entry) is not dict:
        raise InputError(f"{where} is {shown(entry)}, expected a dict with {key!r}; {MEND}")
    if key not in entry:
        raise InputError(f"{where} has no {key!r}, only {shown(list(entry))}; {MEND}")
    value = entry[key]
    if not _is_plain(value, kind):
        raise InputError(f"{where} has {key!r} = {shown(value)}, expected {kind.__name__}; {MEND}")
    return value


def plain_list(entry: Any, key: str, kind: type, where: str) -> list[Any]:
    """Take ``entry[key]``, which must be a list of nothing but ``kind``; raises as `plain_field` does."""
    values = plain_field(entry, key, list, where)
    if not all(_is_plain(value, kind) for value in values):
        raise InputError(f"{where} has {key!r} = {shown(values)}, expected a list of {kind.__name__}; {MEND}")
    return values


def _is_plain(value: Any, kind: type) -> bool:
    return type(value) is kind and (kind is not int or -(2**63) <= value < 2**63)
