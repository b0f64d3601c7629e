"""Many images to predict on: a folder of photos with the same sentences, or a list as JSONL."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from reference_model.data.images import FORMATS
from reference_model.data.untrusted import plain_field
from reference_model.files import InputError, shown

SUFFIXES = {f".{kind.lower()}" for kind in FORMATS} | {".jpg", ".jp2", ".tif", ".pgm", ".mpo"}


class Job(NamedTuple):
    """One image and what is asked of it."""

    image: Path
    expressions: list[str]


def jobs(source: Path, expressions: list[str] | None) -> list[Job] | None:
    """List what a folder or a .jsonl asks; None where ``source`` is one image.

    Args:
        source: An image, a folder of images, or a file NAME.jsonl of lines such as
            ``{"image": "cats/1.jpg", "expression": "left cat"}``: the path is from the folder of that file,
            the expression a sentence or a list of them; without one, ``expressions`` hold.
        expressions: Sentences of images that have none of their own.

    Raises:
        InputError: There is no image, a line is malformed, or an image has no sentence.
    """
    if source.suffix.lower() == ".jsonl" and not source.is_dir():
        found = _lines(source, expressions)
    elif source.is_dir():
        if not expressions:
            raise InputError(f'image {source}: is a folder; give --expression "the red boat" too')
        images = sorted(path for path in source.iterdir() if path.suffix.lower() in SUFFIXES)
        found = [Job(path, list(expressions)) for path in images]
    else:
        return None
    if not found:
        raise InputError(f"image {source}: holds no image; give a folder of photos or a list of them")
    return found


def _lines(source: Path, expressions: list[str] | None) -> list[Job]:
    try:
        text = source.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{source}: cannot be read ({error.strerror}); check the path") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{source}: is not UTF-8 text; write one JSON object a line") from error
    found = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        where = f"{source}:{number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{where}: not JSON; write one object a line") from error
        image = plain_field(row, "image", str, where)
        found.append(Job(source.parent / image, _asked(row, expressions, where)))
    return found


def _asked(row: dict[str, Any], expressions: list[str] | None, where: str) -> list[str]:
    asked = row.get("expression", expressions)
    asked = [asked] if isinstance(asked, str) else asked
    if not asked:
        raise InputError(f"{where}: has no 'expression'; write one, or give --expression for all lines")
    if not (isinstance(asked, list) and all(isinstance(sentence, str) for sentence in asked)):
        raise InputError(f"{where}: 'expression' is {shown(asked)}, expected a sentence or a list of them")
    return list(asked)
