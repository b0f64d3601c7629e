"""The weights that score best on val: which they are, and where they are kept."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from reference_model.checkpoints.checkpoint import WEIGHTS, save_weights, start_checkpoint, step_of_weights
from reference_model.files import written_whole
from reference_model.model.metris import METRIS

BEST = "best"


def metric_of(scores: dict[str, float]) -> str:
    """Name the score that selects weights: gIoU where some sentences have no target, else mIoU."""
    return "gIoU" if "gIoU" in scores else "mIoU"


@dataclass
class BestWeights:
    """The best evaluations of a run so far.

    Args:
        out: Folder of the run, which holds the best weights.
        keep: How many evaluations keep their weights; with 2 or more each in ``best/``.
    """

    out: Path
    keep: int
    ranked: list[tuple[float, int]] = field(default_factory=list)
    """Score and step of the best evaluations, best first."""
    scores: dict[str, float] = field(default_factory=dict)
    """Of the best one."""

    def rank(self, scores: dict[str, float], step: int) -> None:
        """Take an evaluation into account."""
        both = [*self.ranked, (scores[metric_of(scores)], step)]
        self.ranked = sorted(both, key=lambda entry: (-entry[0], entry[1]))[: self.keep]
        if self.ranked[0][1] == step:
            self.scores = scores

    def write(self, model: METRIS, tokenizer: PreTrainedTokenizerBase, config_yaml: str, step: int) -> None:
        """Write the weights of the latest evaluation where they are among the best."""
        if self.ranked[0][1] == step:
            save_weights(self.out, model, step=step)
        if self.keep == 1:
            return
        folders, mine = [self._folder(step) for _, step in self.ranked], self._folder(step)
        if mine in folders:
            start_checkpoint(mine, config_yaml, tokenizer)
            save_weights(mine, model, step=step)
        for folder in set((self.out / BEST).glob("step-*")) - set(folders):
            shutil.rmtree(folder)

    def drop_overwritten(self, say: Callable[[str], None]) -> list[tuple[float, int]]:
        """Drop best scores whose weights were overwritten just before the run was killed; give the others."""
        here = step_of_weights(self.out)
        if not self.ranked or here == self.ranked[0][1]:
            return self.ranked
        kept = [one for one in self.ranked if one[1] == here or (self._folder(one[1]) / WEIGHTS).exists()]
        if kept and kept[0][1] != here:
            with written_whole(self.out / WEIGHTS) as path:
                shutil.copyfile(self._folder(kept[0][1]) / WEIGHTS, path)
        of = f"those of step {kept[0][1]}" if kept else "replaced by the next evaluation"
        say(f"{self.out}: the weights there are not those of step {self.ranked[0][1]}, the best; are {of}")
        return kept

    def _folder(self, step: int) -> Path:
        return self.out / BEST / f"step-{step:08d}"
