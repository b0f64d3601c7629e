"""Configs with some options changed, by the options' own names, whichever group they are in."""

import dataclasses
from typing import Any, TypeVar

Config = TypeVar("Config")


def replace(config: Config, **changes: Any) -> Config:
    """`dataclasses.replace`, where ``learning_rate=1e-3`` reaches ``config.optim.learning_rate``."""
    fields = {field.name for field in dataclasses.fields(config)}
    for name in changes.keys() - fields:
        groups = [group for group in fields if hasattr(getattr(config, group), name)]
        (group,) = [group for group in groups if dataclasses.is_dataclass(getattr(config, group))]
        changes[group] = replace(changes.get(group, getattr(config, group)), **{name: changes.pop(name)})
    return dataclasses.replace(config, **changes)
