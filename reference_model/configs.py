"""Configs: frozen dataclasses filled from YAML files, presets and the command line; no torch here."""

import dataclasses
import difflib
import functools
import re
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import yaml
from jsonargparse import ArgumentParser, DefaultHelpFormatter, set_parsing_settings

from reference_model.files import InputError

set_parsing_settings(docstring_parse_attribute_docstrings=True)

PRESETS = Path(__file__).parent / "presets"
Config = TypeVar("Config")

DROPPED: dict[str, Any] = {
    "contrastive_rows": "global",
    "learn_aggregation_temperature": False,
    "share_temperature": False,
    "straight_through": False,
}
"""Options of earlier versions that made no measurable difference -> the value that all now have."""


class _PlainLoader(yaml.SafeLoader):
    """SafeLoader without aliases, which can nest a short file into itself or into gigabytes."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError(f"alias *{self.peek_event().anchor} is not allowed, write the value out")
        return super().compose_node(parent, index)


class Help(DefaultHelpFormatter):
    """Help whose examples stay on a line each, to be copied, and that says null, as one has to type it."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        if text.startswith("examples:"):
            return text
        return "\n\n".join(super(Help, self)._fill_text(part, width, indent) for part in text.split("\n\n"))

    def _expand_help(self, action: Any) -> str:
        said = super()._expand_help(action).replace("<class 'Path'>", "Path")
        return re.sub(r"\bNone: ", "null: ", said)


class Parser(ArgumentParser):
    """jsonargparse's parser, whose errors are one line and an `InputError`."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise what jsonargparse would print with its usage."""
        line = " ".join(str(message).split())
        raise InputError(f"{self.prog}: {line}; see {self.prog} --help") from ex


def preset_names() -> list[str]:
    """Name the presets of this package."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def preset_file(name: str) -> Path:
    """Find a preset by name.

    Raises:
        InputError: There is none; names the nearest and all.
    """
    path = PRESETS / f"{name}.yaml"
    if not path.is_file():
        known = preset_names()
        raise InputError(f"preset {name}: unknown{_nearest(name, known)}; there are {', '.join(known)}")
    return path


def read_yaml(path: str | Path, config: type, *, section: str | None = None) -> dict[str, Any]:
    """Read a YAML mapping and refuse keys that the config does not have.

    A dropped option is passed over at the value that is left of it; in a ``section``, as of a trained model,
    at any value, since all of them concern training.

    Args:
        path: The file.
        config: Dataclass that the file (or its ``section``) fills.
        section: Top-level key to read, leaving the others aside. None: the whole file.

    Raises:
        InputError: The file cannot be read, is no mapping, or has an unknown key; names the nearest.
    """
    try:
        loaded = yaml.load(Path(path).read_text(encoding="utf-8"), _PlainLoader)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); give a YAML file") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: is not YAML ({' '.join(str(error).split())}); mend it") from error
    loaded = {} if loaded is None else loaded
    if section is not None and isinstance(loaded, dict):
        loaded = loaded.get(section)
    if not isinstance(loaded, dict):
        where = f"section {section} of {path}" if section else str(path)
        raise InputError(f"{where}: holds a {type(loaded).__name__}, expected a mapping of config keys")
    for key in list(_unknown_keys(loaded, config)):
        *inside, name = key.split(".")
        if name not in DROPPED:
            refuse_unknown(str(path), key, config)
        value = functools.reduce(dict.__getitem__, inside, loaded).pop(name)
        if section is None and value != DROPPED[name]:
            problem = f"is no longer an option, and {value} cannot be had"
            raise InputError(f"{path}: {key}", problem, f"set it to {_typed(DROPPED[name])}, or leave it out")
    return loaded


def _typed(value: Any) -> str:
    return yaml.safe_dump(value).split("\n")[0]


def refuse_unknown(source: str, key: str, config: type) -> NoReturn:
    """Raise the error for a key that no field of ``config`` has."""
    raise InputError(f"{source}: unknown key {key}{_nearest(key, known_keys(config))}")


def known_keys(config: type) -> list[str]:
    """Give the dotted names of all fields, nested dataclasses included."""
    keys = []
    for name, nested in _fields(config):
        keys.append(name)
        if nested is not None:
            keys += [f"{name}.{key}" for key in known_keys(nested)]
    return keys


def build(config: type[Config], values: Mapping[str, Any], *, source: str) -> Config:
    """Fill a config from plain values, with their types checked.

    Raises:
        InputError: A value has the wrong type, or one without default is missing.
    """
    parser = Parser(prog=source, exit_on_error=False)
    parser.add_class_arguments(config, as_group=False)
    filled = parser.instantiate(parser.parse_object(dict(values)))
    return config(**vars(filled))


def to_yaml(config: Any) -> str:
    """Write a config out in full, ready to be read again."""
    return yaml.safe_dump(_plain(dataclasses.asdict(config)), sort_keys=False, allow_unicode=True)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _unknown_keys(values: Mapping[str, Any], config: type, prefix: str = "") -> Iterator[str]:
    fields = dict(_fields(config))
    for key, value in values.items():
        if key not in fields:
            yield f"{prefix}{key}"
        elif fields[key] is not None and isinstance(value, dict):
            yield from _unknown_keys(value, fields[key], f"{prefix}{key}.")


def _fields(config: type) -> Iterator[tuple[str, type | None]]:
    """Yield each field with the dataclass it nests, or None."""
    types = typing.get_type_hints(config)
    for field in dataclasses.fields(config):
        choices = (types[field.name], *typing.get_args(types[field.name]))
        yield field.name, next((c for c in choices if dataclasses.is_dataclass(c)), None)


def _nearest(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f", did you mean {near[0]}?" if near else ""
