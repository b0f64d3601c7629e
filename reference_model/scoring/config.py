"""How a checkpoint is evaluated; torch-free."""

from dataclasses import dataclass
from pathlib import Path

from reference_model.data.config import DataConfig


@dataclass(frozen=True)
class EvaluateConfig:
    """Score a checkpoint on splits of a data set, per sentence, at each image's own size."""

    checkpoint: Path
    """Folder that train wrote."""
    data: DataConfig
    splits: str = "val"
    """Splits to score, separated by commas, such as val,testA,testB."""
    threshold: float = 0.5
    """Probability above which a pixel belongs to the mask, in (0, 1)."""
    no_target_threshold: float = 0.5
    """Probability of "no target", where a model tells it, above which a mask is empty, in (0, 1)."""
    baselines: bool = False
    """Score two predictions that never read the sentence too: mean training mask, largest object."""
    batch_size: int = 32
    """Sentences per forward pass."""
    out: Path | None = None
    """Where the metrics go as JSON. None: metrics.json in the checkpoint."""
    device: str = "auto"
    """cpu, cuda, cuda:1 ...; auto takes a GPU where there is one."""
    json: bool = False
    """Print JSON instead of a table."""
