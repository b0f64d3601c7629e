"""Where the data is, and what is done with it; torch-free, so that ``--help`` stays quick."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from jsonargparse.typing import NonNegativeInt

from reference_model.files import InputError


@dataclass(frozen=True)
class DataConfig:
    """A data set of any known layout and how it is read."""

    root: Path
    """Where it is. What is there tells the layout: a folder with ``<dataset>/refs(<split_by>).p`` (REFER),
    ``<dataset>/grefs(<split_by>).json`` (gRefCOCO), ``anns/<dataset>/`` (CRIS) or ``<split>-*.parquet`` (the
    Hub's), a folder of ``<split>-*.tar`` shards or its http(s) address, or one's own JSONL file."""

    dataset: str = "refcoco"
    """Folder of the data set under ``root``: refcoco, refcoco+, refcocog, grefcoco, ref-zom; with CRIS's
    layout refcoco, refcoco+, refcocog_u or refcocog_g. Other layouts hold one data set."""

    split_by: str = "unc"
    """Who made the splits: unc (refcoco, refcoco+, grefcoco), umd or google (refcocog), final (ref-zom)."""

    text: Literal["sent", "raw"] = "sent"
    """Which form of a sentence is read where there are two: cleaned (CRIS, CGFormer) or raw (LAVT, ReLA)."""

    on_error: Literal["stop", "skip"] = "stop"
    """What a malformed record or a broken image does: stop with one line, or be left out and counted. A
    command that looks at a run skips where its training did."""

    workers: NonNegativeInt = 0
    """Processes that load batches, 0 or more; 0 loads in the training process itself."""

    def refuse_missing(self) -> None:
        """Refuse a root where nothing is.

        Raises:
            InputError: It is neither a file, a folder nor an address.
        """
        if not (str(self.root).startswith(("http:/", "https:/")) or self.root.exists()):
            raise InputError(str(self.root), "no such file or folder", "give the root of a data set")


@dataclass(frozen=True)
class CheckConfig:
    """Check a data set: counts beside the published ones, images, masks, ids. Exit code 1 if any is wrong.

    ``metris data check PATH`` is ``metris data check --data.root PATH``.
    """

    data: DataConfig
    images: bool = False
    """Decode every image too, instead of looking whether its file is there."""
    json: bool = False
    """Print JSON instead of a table."""


@dataclass(frozen=True)
class ConvertConfig:
    """Convert a data set of any known layout to JSONL or to tar shards.

    ``metris convert PATH --out data.jsonl`` is ``metris convert --data.root PATH --out data.jsonl``.
    """

    data: DataConfig
    out: Path
    """A file NAME.jsonl, which names the images where they are, or a folder, for shards that hold them."""
    splits: str | None = None
    """Splits to convert, separated by commas. None: all."""
    shard_size: int = 256
    """Most MiB of a shard."""
    json: bool = False
    """Print JSON instead of a line."""
