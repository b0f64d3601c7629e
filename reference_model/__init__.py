"""METRIS, the paper's model, ready to use: ``from reference_model import load, build, preset, METRIS``."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from reference_model.checkpoints.checkpoint import Checkpoint as Checkpoint
    from reference_model.checkpoints.checkpoint import Prediction as Prediction
    from reference_model.checkpoints.hub import METRIS as METRIS
    from reference_model.checkpoints.hub import build as build
    from reference_model.checkpoints.hub import load as load
    from reference_model.model.config import preset as preset

# Where each name is. It is imported when it is used, since timm and transformers take seconds.
_HOMES = {
    "METRIS": "checkpoints.hub",
    "build": "checkpoints.hub",
    "load": "checkpoints.hub",
    "preset": "model.config",
    "Checkpoint": "checkpoints.checkpoint",
    "Prediction": "checkpoints.checkpoint",
}
__all__ = ["METRIS", "Checkpoint", "Prediction", "build", "load", "preset"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
