"""The command ``completion``: a script that lets a shell complete commands, options and their choices."""

import argparse
import typing
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

from reference_model.cli import BARE, COMMANDS, WITH_PRESETS, load
from reference_model.configs import preset_names
from reference_model.files import InputError
from reference_model.viewing.config import CompletionConfig


def completion(config: CompletionConfig) -> None:
    """Run the command ``completion``: print the script.

    Raises:
        InputError: shtab is missing.
    """
    try:
        import shtab
    except ModuleNotFoundError as error:
        raise InputError("completion: needs shtab; pip install 'metris-blocks[reference]'") from error
    print(shtab.complete(parser(shtab.FILE), shell=config.shell))


def parser(file: dict[str, str]) -> argparse.ArgumentParser:
    """Build the tree of commands and options as argparse has it, with ``file`` to complete paths."""
    whole = argparse.ArgumentParser("metris")
    whole.add_argument("--version", action="store_true", help="print the version")
    commands = whole.add_subparsers(dest="command")
    groups: dict[str, Any] = {}
    for name, (place, _) in COMMANDS.items():
        config, (first, *rest) = load(place), name.split()
        summary = config.__doc__.splitlines()[0].replace("`", "")
        if rest:
            if first not in groups:
                both = commands.add_parser(first, help="look at a data set")
                groups[first] = both.add_subparsers(dest=f"{first}_command")
            one = groups[first].add_parser(rest[0], help=summary)
        else:
            one = commands.add_parser(name, help=summary)
        _add(one, config, file)
        one.add_argument("--config", metavar="FILE").complete = file  # type: ignore[attr-defined]
        if name in WITH_PRESETS:
            one.add_argument("--preset", choices=preset_names())
        if name in BARE:
            bare = one.add_argument(
                "bare", nargs="*", choices=["bash", "zsh"] if name == "completion" else None
            )
            if name != "completion":
                bare.complete = file  # type: ignore[attr-defined]
    return whole


def _add(one: argparse.ArgumentParser, config: type, file: dict[str, str], prefix: str = "") -> None:
    types = typing.get_type_hints(config)
    for field in fields(config):
        kinds = [types[field.name], *typing.get_args(types[field.name])]
        nested = next((kind for kind in kinds if is_dataclass(kind)), None)
        if nested is not None:
            _add(one, nested, file, f"{prefix}{field.name}.")
            continue
        choices = [
            str(value)
            for kind in kinds
            if typing.get_origin(kind) is Literal
            for value in typing.get_args(kind)
        ]
        option = f"--{prefix}{field.name}"
        if types[field.name] is bool:
            one.add_argument(option, nargs="?", choices=["true", "false"])
            continue
        added = one.add_argument(option, choices=choices or None, metavar=field.name.upper())
        if Path in kinds:
            added.complete = file  # type: ignore[attr-defined]
