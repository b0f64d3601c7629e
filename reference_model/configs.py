"""Configs: frozen dataclasses filled from YAML files, presets and the command line; no torch here."""

import dataclasses
import difflib
import math
import re
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import yaml
from jsonargparse import ArgumentParser, DefaultHelpFormatter, set_parsing_settings
from jsonargparse.typing import restricted_number_type

from reference_model.files import InputError

set_parsing_settings(docstring_parse_attribute_docstrings=True)

PRESETS = Path(__file__).parent / "presets"
Config = TypeVar("Config")

Positive = restricted_number_type("FinitePositive", float, [(">", 0), ("<", math.inf)])
NotNegative = restricted_number_type("FiniteNotNegative", float, [(">=", 0), ("<", math.inf)])
Seed = restricted_number_type("Seed", int, [(">=", 0), ("<", 2**31)])

_GROUPS = {
    "optim": (
        *("learning_rate", "image_encoder_lr", "text_encoder_lr", "warmup_steps", "poly_power"),
        *("weight_decay", "clip_norm", "ema_decay"),
    ),
    "loss": ("contrastive_weight", "contrastive_temperature", "no_target_weight"),
    "checkpointing": ("save_every", "keep_last", "keep_best", "skip_nonfinite"),
    "parallel": (
        *("accumulate", "precision", "sharding", "checkpoint_activations", "compile", "channels_last"),
    ),
    "logging": ("log_every", "tracker"),
}
RENAMED = {key: f"{group}.{key}" for group, keys in _GROUPS.items() for key in keys}
"""Options as config files had them before -> their names of today; a rename adds its line."""
DROPPED = {
    "contrastive_rows": "global",
    "share_temperature": False,
    "learn_aggregation_temperature": False,
    "straight_through": False,
}
"""Options of before that made no measurable difference (docs/ablations/table-learning.md) -> the value that
all models have now."""


class _PlainLoader(yaml.SafeLoader):
    """SafeLoader without aliases, which can nest a short file into itself or into gigabytes."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError(f"alias *{self.peek_event().anchor} is not allowed, write the value out")
        return super().compose_node(parent, index)


# As jsonargparse reads numbers; YAML 1.1 takes 1e-3 for a word.
_PlainLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


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
        if found := _RESTRICTED.search(line):
            value = (found["value"] or line.rsplit("Given value: ")[-1]).strip()
            problem = f"must be {_bound(found['bound'])}, got {value}"
            raise InputError(found["key"], problem, f"see {self.prog} --help") from ex
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
    # Of a checkpoint's network they no longer matter: they were about training, or are in its weights.
    loaded = renamed(loaded, config, str(path), refuse=section is None)
    for key in _unknown_keys(loaded, config):
        refuse_unknown(str(path), key, config)
    return loaded


def renamed(
    values: Mapping[str, Any], config: type, source: str, *, refuse: bool, prefix: str = ""
) -> dict[str, Any]:
    """Give config values under the names of today.

    Raises:
        InputError: An option that is gone has another value than all models have now (``refuse``), or one is
            there under both of its names.
    """
    nested = dict(_fields(config))
    today = {key: value for key, value in values.items() if key in nested or key not in {*RENAMED, *DROPPED}}
    for key, kind in nested.items():
        if kind is not None and isinstance(today.get(key), dict):
            inside = f"{prefix}{key}."
            today[key] = renamed(today[key], kind, source, refuse=refuse, prefix=inside)
    for key in values.keys() - today.keys():
        if key in DROPPED:
            if refuse and values[key] != DROPPED[key]:
                problem = f"is no longer an option, and {values[key]} cannot be had"
                step = f"set it to {str(DROPPED[key]).lower()}, or leave it out"
                raise InputError(f"{source}: {prefix}{key}", problem, step)
            continue
        group, name = RENAMED[key].split(".")
        if group not in nested:
            today[key] = values[key]  # unknown here, and refused as that
            continue
        there = today.get(group) or {}
        if not isinstance(there, dict) or name in there:
            raise InputError(source, f"has both {key} and {group}, which it is in now", f"remove {key}")
        today[group] = {**there, name: values[key]}
    return today


def check_bounds(config: Any, prefix: str = "") -> None:
    """Refuse values outside the bounds of their fields' types, in a config made in Python.

    Raises:
        InputError: Names the field, the bound and the value.
    """
    types = typing.get_type_hints(type(config))
    for one in dataclasses.fields(config):
        value = getattr(config, one.name)
        if dataclasses.is_dataclass(value):
            check_bounds(value, f"{prefix}{one.name}.")
            continue
        choices = (types[one.name], *typing.get_args(types[one.name]))
        bounded = next((c for c in choices if hasattr(c, "_restrictions")), None)
        if bounded is None or value is None:
            continue
        try:
            bounded(value)
        except (ValueError, TypeError) as error:
            problem = f"must be {_bound(bounded._expression)}, got {value}"
            raise InputError(f"{prefix}{one.name}", problem, "give a value inside") from error


def refuse_unknown(source: str, key: str, config: type) -> NoReturn:
    """Raise the error for a key that no field of ``config`` has."""
    last = key.rsplit(".", 1)[-1]
    if last in DROPPED:
        raise InputError(f"{source}: unknown key {key}, it is gone; all models have {DROPPED[last]}")
    today, known = RENAMED.get(key), known_keys(config)
    hint = f", did you mean {today}?" if today in known else _nearest(key, known)
    raise InputError(f"{source}: unknown key {key}{hint}")


def known_flags(config: type, prefix: str = "") -> set[str]:
    """Give the dotted names of all fields that are true or false, nested dataclasses included."""
    flags, types = set(), typing.get_type_hints(config)
    for name, nested in _fields(config):
        if nested is not None:
            flags |= known_flags(nested, f"{prefix}{name}.")
        elif types[name] is bool:
            flags.add(f"{prefix}{name}")
    return flags


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
    if isinstance(value, int | float) and not isinstance(value, bool):
        return int(value) if isinstance(value, int) else float(value)  # of a bounded type
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


# What jsonargparse says of a value outside the bounds of a type; of a union it gives the value at its end.
_RESTRICTED = re.compile(
    r'Parser key "(?P<key>[^"]+)":.*Not of type \w+: (?P<value>\S+ )?does not conform to restriction '
    r"(?P<bound>v\S+(?: and v\S+)*)"
)


def _bound(expression: str) -> str:
    """Turn jsonargparse's ``v>0 and v<1`` into ``> 0 and < 1``."""
    return re.sub(r"v([<>=]+)", r"\1 ", expression).replace(str(2**31), "2^31")


def _nearest(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f", did you mean {near[0]}?" if near else ""
