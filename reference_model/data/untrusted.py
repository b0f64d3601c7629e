"""Read pickles and JSON files that may hold nothing but plain data, from hands nobody vouches for."""

import io
import json
import os
import pickle
import re
import struct
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

from reference_model.files import InputError, one_line, shown

MEND = "fetch the file again from its source, or mend that entry"

MOST_BYTES = 2**30
"""Size of the largest pickle or JSON file that is read whole; COCO's largest has 0.45 GiB."""

LONGEST_PATH = 1000

# What no portable path has: separators and drives of other systems, controls, halves of characters.
_BARRED = re.compile(r"[\\:\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")

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


_LOAD: dict[int, Callable[[Any], None]] = dict(pickle._Unpickler.dispatch)


def _with_text_keys(op: bytes, keys: slice) -> Callable[[Any], None]:
    """Guard what fills a dict: numbers can be chosen so that a table of them takes hours to fill."""

    def load(unpickler: Any) -> None:
        for key in unpickler.stack[keys]:
            if type(key) is not str:
                raise _Refused(f"a dict with the key {shown(key)}")
        _LOAD[op[0]](unpickler)

    return load


def _put(unpickler: Any) -> None:
    """Put into the memo, at no index that a file of MOST_BYTES cannot have; see `_with_text_keys`."""
    index = int(unpickler.readline()[:-1])
    if not 0 <= index < MOST_BYTES:
        raise pickle.UnpicklingError(f"memo index {shown(index)}")
    unpickler.memo[index] = unpickler.stack[-1]


# The C unpickler reserves memory for whatever memo index a file states, so five bytes can take it all;
# the Python one is slower and safe.
class _PlainUnpickler(pickle._Unpickler):
    """Unpickle lists, dicts, strings and numbers; refuse every global, extension and persistent id."""

    dispatch: ClassVar = _LOAD | {
        pickle.DICT[0]: _with_text_keys(pickle.DICT, slice(None, None, 2)),
        pickle.SETITEMS[0]: _with_text_keys(pickle.SETITEMS, slice(None, None, 2)),
        pickle.SETITEM[0]: _with_text_keys(pickle.SETITEM, slice(-2, -1)),
        pickle.PUT[0]: _put,
    }
    # BYTEARRAY8 reserves as much memory as the file states, and plain data needs neither it nor sets.
    for _op in (pickle.BYTEARRAY8, pickle.EMPTY_SET, pickle.ADDITEMS, pickle.FROZENSET):
        del dispatch[_op[0]]

    def find_class(self, module: str, name: str) -> Any:
        raise _Refused(f"the global {shown(f'{module}.{name}')}")

    def get_extension(self, code: int) -> Any:
        raise _Refused(f"the extension code {code}")

    def persistent_load(self, pid: Any) -> Any:
        raise _Refused(f"the persistent id {shown(pid)}")


def read_bytes(path: Path) -> bytes:
    """Read a whole file.

    Raises:
        InputError: It is missing, unreadable, no plain file or too large; says what its folder holds.
    """
    try:
        if path.exists() and not path.is_file():  # a pipe or a device would never end
            raise InputError(f"{path}: is not a file; {path.parent} holds {listing(path.parent)}")
        if (size := path.stat().st_size) > MOST_BYTES:
            raise InputError(f"{path}: has {size} bytes, more than the {MOST_BYTES} that are read; split it")
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
        InputError: The file is missing, is no pickle, holds itself, or asks for anything but plain data
            (named).
    """
    data = read_bytes(path)
    try:
        try:
            value = _PlainUnpickler(io.BytesIO(data), fix_imports=False, encoding="utf-8").load()
        except UnicodeDecodeError:
            value = _PlainUnpickler(io.BytesIO(data), fix_imports=False, encoding="latin-1").load()
    except _Refused as error:
        raise InputError(
            f"{path}: asks for {error}, but only lists, dicts, text and numbers are read; "
            "nothing was run: fetch the file again from its source, or save it as plain data"
        ) from error
    except _GARBAGE as error:
        raise InputError(
            f"{path}: not a whole pickle ({type(error).__name__}: {one_line(error)}); fetch the file again"
        ) from error
    if _outgrows(value, 4 * len(data) + 1000):
        raise InputError(f"{path}: holds lists inside of themselves, or many times over; {MEND}")
    return value


def _outgrows(value: Any, most: int) -> bool:
    """Whether a value, walked as a tree, has more parts than ``most``: a few bytes can name a list often."""
    waiting, parts = [value], 1
    while waiting:
        found = waiting.pop()
        if type(found) in (dict, list, tuple):
            parts += len(found)
            if parts > most:
                return True
            inner = found.values() if type(found) is dict else found
            waiting += [part for part in inner if type(part) in (dict, list, tuple)]
    return False


def read_plain_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        InputError: The file is missing, malformed or nested too deep.
    """
    return plain_json(read_bytes(path), str(path), "file")


def plain_json(text: str | bytes, where: str, kind: str = "text") -> Any:
    """Read JSON text.

    Args:
        where: What the message begins with: file and entry.
        kind: What the message calls the text: file, line, ...

    Raises:
        InputError: It is malformed or nested too deep.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise InputError(f"{where}: nested too deep for this kind of {kind}; {MEND}") from error
    except ValueError as error:
        raise InputError(f"{where}: not a whole JSON {kind} ({one_line(error)}); {MEND}") from error


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
    values: list[Any] = plain_field(entry, key, list, where)
    if not all(_is_plain(value, kind) for value in values):
        raise InputError(f"{where} has {key!r} = {shown(values)}, expected a list of {kind.__name__}; {MEND}")
    return values


def _is_plain(value: Any, kind: type) -> bool:
    return type(value) is kind and (type(value) is not int or -(2**63) <= value < 2**63)


def plain_path(name: str) -> bool:
    """Whether a name that a file gives is a path below a folder, on any system, and no way out of it."""
    parts = PurePosixPath(name).parts
    below = bool(parts) and parts[0] != "/" and ".." not in parts
    return below and len(name) <= LONGEST_PATH and not _BARRED.search(name)


def note_of(file: Path, name: str) -> Path:
    """Name a file that goes with a file of one's own: NAME.generated.json with NAME.jsonl."""
    return file.with_name(f"{file.stem}.{name}")


def note_beside(place: Path, name: str) -> Path | None:
    """Find a note such as generated.json: in a folder; with a file, the file's own, or that of its folder."""
    paths = [place / name] if place.is_dir() else [note_of(place, name), place.parent / name]
    return next((path for path in paths if path.is_file()), None)
