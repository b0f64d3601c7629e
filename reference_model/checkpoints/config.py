"""Options of the commands that write checkpoints for others; no torch here."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from reference_model.files import InputError, refuse_unwritable

WEIGHTS, CONFIG, TOKENIZER = "model.safetensors", "config.yaml", "tokenizer"
"""Parts of the folder of a checkpoint."""


def refuse_incomplete(folder: Path) -> None:
    """Refuse a folder that lacks a part of a checkpoint.

    Raises:
        InputError: Names what is missing.
    """
    missing = [name for name in (CONFIG, WEIGHTS, TOKENIZER) if not (folder / name).exists()]
    if missing:
        problem = f"has no {', '.join(missing)}"
        raise InputError(f"checkpoint {folder}", problem, "give the folder that train wrote")


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

    def check(self) -> None:
        """Refuse what can be refused before torch is imported."""
        if self.out.suffix != f".{self.format}":
            problem = f"must end in .{self.format}, by which predict knows the format"
            raise InputError(f"out {self.out}", problem, f"name it {self.out.stem}.{self.format}")
        refuse_incomplete(self.checkpoint)
        refuse_unwritable(self.out)


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

    def check(self) -> None:
        """Refuse what can be refused before torch is imported."""
        refuse_incomplete(self.checkpoint)
