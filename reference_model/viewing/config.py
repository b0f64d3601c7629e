"""What to predict, and where the pictures go; torch-free."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from reference_model.data.config import DataConfig


@dataclass(frozen=True)
class ShowConfig:
    """Draw a page of samples of a data set: ``metris data show PATH``."""

    data: DataConfig
    split: str = "train"
    """Split of the samples."""
    count: int = 12
    """Number of samples, evenly spaced over the split, in [1, 200]."""
    out: Path = Path("samples.png")
    """Picture to write, as PNG."""


@dataclass(frozen=True)
class PredictConfig:
    """Predict masks: of one image and its sentences, or of a few samples of a data set beside the truth."""

    checkpoint: Path
    """Folder that train wrote, or file that export wrote."""
    image: Path | None = None
    """Photo, JPEG or PNG of any size."""
    expression: list[str] | None = None
    """What to look for in the image; may be given several times."""
    out: Path = Path("mask.png")
    """Mask to write, as PNG (255 inside) of the image's own size, with an overlay NAME_overlay.png beside it.
    Several sentences number the names. With data: the folder of the pictures."""
    data: DataConfig | None = None
    """Data set to take samples from, instead of image and expression."""
    split: str = "val"
    """Split of the samples."""
    count: int = 6
    """Number of samples, evenly spaced over the split."""
    threshold: float = 0.5
    """Probability above which a pixel belongs to the mask, in (0, 1)."""
    no_target_threshold: float = 0.5
    """Probability of "no target", where a model tells it, above which a mask is empty, in (0, 1)."""
    device: str = "auto"
    """cpu, cuda, cuda:1 ...; auto takes a GPU where there is one."""
    json: bool = False
    """Print JSON instead of lines."""


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
