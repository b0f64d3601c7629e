"""Where the data is; torch-free, so that ``--help`` stays quick."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class DataConfig:
    """A REFER or gRefCOCO folder and how it is read."""

    root: Path
    """Folder that holds ``<dataset>/refs(<split_by>).p`` (grefcoco: ``grefcoco/grefs(<split_by>).json``),
    ``<dataset>/instances.json`` and the images."""

    dataset: str = "refcoco"
    """Folder of the data set under ``root``: refcoco, refcoco+, refcocog or grefcoco."""

    split_by: str = "unc"
    """Who made the splits: unc (refcoco, refcoco+, grefcoco), umd or google (refcocog)."""

    workers: int = 0
    """Processes that load batches, 0 or more; 0 loads in the training process itself."""
