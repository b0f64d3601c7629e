"""Score whatever answers records: the sentences of an image together, images shared among processes."""

import random
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import torch.distributed as dist
from tqdm import tqdm

from reference_model.data.readers.reader import OnError, as_list
from reference_model.data.records import Record, segmentation_defect
from reference_model.data.transforms import resize_mask
from reference_model.files import InputError
from reference_model.processes import place, running
from reference_model.scoring.answers import resized
from reference_model.scoring.curves import PrecisionRecall
from reference_model.scoring.metrics import SegmentationMetrics
from reference_model.scoring.outcome import Outcome
from reference_model.scoring.predictors import Predictor
from reference_model.scoring.protocols import PROTOCOLS, Protocol

Scores = dict[str, Any]


class Scored(NamedTuple):
    """One sentence, scored."""

    record: Record
    outcome: Outcome
    mask: np.ndarray
    """(h, w) bool at the size of the protocol, before any withdrawal."""
    truth: np.ndarray
    """(h, w) bool, the true mask."""
    no_target: float | None
    """Probability that nothing is meant."""
    threshold: float | None
    """Probability above which pixels are in ``mask``; None where the answer was a mask already."""


@dataclass(frozen=True)
class ImageGroups:
    """Records of one image together, all images or this process's share of them; may be gone through anew.

    A list is brought into the order of images. A stream is taken as it comes: sentences of an image or a ref
    that do not follow one another are separate groups.

    Args:
        records: Of one split.
        protocol: Which sentences of a ref count.
        process: Number of this process.
        processes: How many share the images, none padded and none twice.
    """

    records: Iterable[Record]
    protocol: Protocol = PROTOCOLS["metris"]
    process: int = 0
    processes: int = 1

    def __iter__(self) -> Iterator[list[Record]]:
        records, listed = self.records, as_list(self.records)
        if listed is not None:
            records = sorted(listed, key=lambda record: (record.image_id, record.ref_id))
        for number, (_, group) in enumerate(groupby(records, key=lambda record: record.image_id)):
            if number % self.processes == self.process:
                refs = groupby(group, key=lambda record: record.ref_id)
                yield [record for _, ref in refs for record in self._chosen(list(ref))]

    def _chosen(self, ref: list[Record]) -> list[Record]:
        match self.protocol.sentences:
            case "all":
                return ref
            case "first":
                return ref[:1]
            case "last":
                return ref[-1:]
            case "random":
                return [random.Random(f"{self.protocol.seed} {ref[0].ref_id}").choice(ref)]


@dataclass(frozen=True)
class Evaluator:
    """How answers become scores.

    Args:
        protocol: How masks are compared.
        no_target_threshold: Probability of "no target" above which the answer is an empty mask, in (0, 1).
        on_error: What a true mask that cannot be decoded does: ``stop``, or be left out (``skip``).
    """

    protocol: Protocol = PROTOCOLS["metris"]
    no_target_threshold: float = 0.5
    on_error: OnError = "stop"

    def score(self, predictor: Predictor, records: Iterable[Record], *, title: str = "evaluate") -> Scores:
        """Score a predictor on records: `outcome.scores`, as fractions 0 to 1.

        Where torch.distributed runs, each process takes its share of the images, and all return the whole.
        """
        metrics = SegmentationMetrics(self.protocol)
        for _ in self.outcomes(predictor, records, metrics, title=title):
            pass
        return computed(metrics)

    def outcomes(
        self,
        predictor: Predictor,
        records: Iterable[Record],
        metrics: SegmentationMetrics,
        curve: PrecisionRecall | None = None,
        *,
        title: str = "evaluate",
        total: int | None = None,
    ) -> Iterator[Scored]:
        """Yield each sentence once it is scored and added to ``metrics`` and ``curve``.

        Args:
            predictor: Gives the answers.
            records: Of one split; a sequence, or a stream, of which one image at a time is kept.
            metrics: Of this protocol.
            curve: Of the same sentences.
            title: Of the progress bar.
            total: Number of sentences that the progress bar shall expect.
        """
        share = place()
        answers = predictor(ImageGroups(records, self.protocol, *share))
        if total is None and (listed := as_list(records)) is not None:
            total = len(listed)
        total = total if self.protocol.sentences == "all" and share[1] == 1 else None
        truths: dict[int, tuple[Any, np.ndarray | None]] = {}
        image = None
        silent = True if share[0] else None  # None: where there is no terminal
        for record, answer in tqdm(answers, title, total, leave=False, unit="sentence", disable=silent):
            if record.image_id != image:
                image, truths = record.image_id, {}
            # Sentences of one object share its segmentation; kept here, its id stays its own.
            if id(record.segmentation) not in truths:
                truths[id(record.segmentation)] = (record.segmentation, self._truth(record))
            truth = truths[id(record.segmentation)][1]
            if truth is None:
                continue
            mask, probability = resized(answer, *truth.shape, self.protocol)
            withdrawn = None if answer.no_target is None else answer.no_target > self.no_target_threshold
            metrics.update(mask, truth, target=not record.no_target, withdrawn=withdrawn)
            if curve is not None:
                if probability is not None and np.isnan(probability.min()):
                    raise InputError(
                        f"evaluate: the model gives NaN for {record.expression!r} (sent_id "
                        f"{record.sent_id}); take weights of a run that did not diverge"
                    )
                curve.update(probability, truth)
            threshold = answer.threshold if probability is None else self.protocol.cutoff
            yield Scored(record, metrics.latest, mask, truth, answer.no_target, threshold)

    def _truth(self, record: Record) -> np.ndarray | None:
        try:
            return truth_of(record, self.protocol)
        except InputError as error:
            if self.on_error == "stop":
                raise
            warnings.warn(f"{error}; its sentences are left out", stacklevel=2)
            return None


def truth_of(record: Record, protocol: Protocol) -> np.ndarray:
    """Fill the true mask of a sentence, at the size of the protocol: (h, w) bool."""
    size, drawn = protocol.size, record.segmentation
    if size is None:
        return record.mask(protocol.overlaps)
    if protocol.truth == "redrawn" and isinstance(drawn, list):
        if segmentation_defect(drawn, record.height, record.width) is None:  # else `mask` says which it has
            by = (size / record.width, size / record.height)
            scaled = [[number * by[i % 2] for i, number in enumerate(polygon)] for polygon in drawn]
            record = replace(record, segmentation=scaled, height=size, width=size)
        return record.mask(protocol.overlaps)
    return resize_mask(record.mask(protocol.overlaps), size, size)


def computed(metric: SegmentationMetrics | PrecisionRecall) -> Any:
    """Compute a metric, over all processes."""
    if running() and dist.get_backend() == "nccl":
        metric = metric.to("cuda")
    return metric.compute()
