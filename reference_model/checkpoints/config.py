"""Options of the commands that write checkpoints for others; no torch here."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class ExportConfig:
    """Write a checkpoint as one ONNX or PyTorch .pt2 file, with its tokenizer, checked against the model."""

    checkpoint: Path
    """Folder that train wrote."""
    out: Path
    """File to write, NAME.onnx or NAME.pt2; predict takes it in place of a checkpoint."""
    format: Literal["onnx", "pt2"] = "onnx"
    """onnx runs in ONNX Runtime and its like; pt2 in PyTorch alone, best the version that wrote it."""
    json: bool = False
    """Print JSON instead of a line."""


@dataclass(frozen=True)
class PushConfig:
    """Upload a checkpoint to the Hugging Face Hub, with a model card, and print its URL.

    The one command that needs a network, and a token that may write: that of ``hf auth login``.
    """

    checkpoint: Path
    """Folder that train wrote."""
    repo: str
    """OWNER/NAME on the Hub, made where it is not there; without OWNER the token's own."""
    private: bool = False
    """Make it private; refuses a public one that is there."""
    json: bool = False
    """Print JSON instead of a line."""
