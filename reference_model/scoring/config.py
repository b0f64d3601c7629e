"""How predictions are scored and compared; torch-free."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from jsonargparse.typing import OpenUnitInterval, PositiveInt

from reference_model.checkpoints.config import refuse_incomplete
from reference_model.data.config import DataConfig
from reference_model.files import InputError


@dataclass(frozen=True)
class EvaluateConfig:
    """Score a checkpoint, any other model, or a file of predictions on splits of a data set, per sentence."""

    data: DataConfig
    checkpoint: Path | None = None
    """Folder that train wrote."""
    model: str | None = None
    """Instead of a checkpoint, PACKAGE.MODULE:NAME of a callable: PIL RGB image, list of k (≤ batch_size)
    strings -> (k, h, w) bool or probabilities, or k of (h, w)."""
    predictions: Path | None = None
    """Instead of a model, a .jsonl file of {"sent_id": ..., "mask": path or RLE}, as ``results`` writes; a
    path names a PNG of two values, from the folder of the file. Images need not be there. ``metris convert``
    lists the sent_ids."""
    splits: str = "val"
    """Splits to score, separated by commas, such as val,testA,testB."""
    protocol: Literal["metris", "lavt", "cris", "cgformer", "rela"] = "metris"
    """How masks are compared, after the published evaluation code of that name; see scoring/protocols.py."""
    threshold: OpenUnitInterval | None = None
    """Probability above which a pixel belongs to the mask, in (0, 1); not for masks. None: the protocol's."""
    sentences: Literal["all", "first", "last", "random"] | None = None
    """Which sentences of an object are scored; random draws one by its ref_id. None: the protocol's, all."""
    no_target_threshold: OpenUnitInterval = 0.5
    """Probability of "no target", where a model tells it, above which a mask is empty, in (0, 1)."""
    baselines: bool = False
    """Score two predictions that never read the sentence too: mean training mask, largest object."""
    breakdowns: bool = False
    """Give scores by category and by sentence length too."""
    intervals: bool = False
    """Give 95 per cent bootstrap intervals, resampling images, too."""
    results: Path | None = None
    """Write every sample's mask and IoU here, as .jsonl; what ``metris compare`` takes."""
    batch_size: PositiveInt = 32
    """Sentences per forward pass, or call of a model."""
    out: Path | None = None
    """Where the metrics go as JSON. None: metrics.json in the checkpoint, which keeps other splits scored
    before; nowhere without a checkpoint."""
    device: str = "auto"
    """cpu, cuda, cuda:1 ...; auto takes a GPU where there is one, under torchrun each process its own."""
    json: bool = False
    """Print JSON instead of a table."""

    def check(self) -> None:
        """Refuse what can be refused before torch is imported.

        Raises:
            InputError: An option is missing or contradicts another one, or a file is not there.
        """
        sources = ("checkpoint", "model", "predictions")
        given = [name for name in sources if getattr(self, name) is not None]
        if len(given) != 1:
            got = f"got {' and '.join(given)}" if given else "got none"
            raise InputError("evaluate", f"give one of --checkpoint, --model or --predictions, {got}")
        if self.threshold is not None and self.predictions is not None:
            problem = "does nothing to --predictions, which are masks already"
            raise InputError("threshold", problem, "leave it out")
        if self.checkpoint is not None:
            refuse_incomplete(self.checkpoint)
        if self.predictions is not None and not self.predictions.exists():
            raise InputError(str(self.predictions), "no such file", "give a .jsonl of masks")
        self.data.refuse_missing()


@dataclass(frozen=True)
class CompareConfig:
    """Compare two files of results on the same samples, paired: ``metris compare A.jsonl B.jsonl``."""

    a: Path
    """Results that evaluate wrote."""
    b: Path
    """Others, of the same samples."""
    resamples: int = 10_000
    """Bootstrap resamples of the images, in [100, 1000000]."""
    seed: int = 0
    """Of the resampling."""
    json: bool = False
    """Print JSON instead of a table."""
