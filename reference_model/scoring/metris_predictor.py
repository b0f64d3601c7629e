"""METRIS as a predictor: batches of whole images, encoded once for all of their sentences."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from transformers import PreTrainedTokenizerBase

from reference_model.data.readers.reader import OnError
from reference_model.data.records import Record
from reference_model.data.transforms import image_pixels, normalized
from reference_model.model.metris import METRIS, MetrisOutput
from reference_model.processes import outlive_sigterm
from reference_model.scoring.answers import Answer, resized
from reference_model.scoring.predictors import Answers, Groups, opened
from reference_model.scoring.protocols import PROTOCOLS
from reference_model.tokens import tokenize


class Prediction(NamedTuple):
    """What a model's answer comes to at one size."""

    mask: np.ndarray
    """(height, width) bool."""
    no_target: float | None
    """Probability that nothing in the image is meant, 0 to 1; None from a model without that classifier."""


class _Feed(NamedTuple):
    images: Tensor
    image_index: Tensor
    token_ids: Tensor
    language_mask: Tensor
    records: list[Record]


class _Feeds(IterableDataset[_Feed]):
    """Batches of whole images, as many as fit; a worker process makes every n-th of them."""

    def __init__(self, groups: Groups, predictor: "MetrisPredictor") -> None:
        self.groups, self.batch_size = groups, predictor.batch_size
        self.tokenizer, self.max_tokens = predictor.tokenizer, predictor.max_tokens
        self.image_size, self.on_error = predictor.image_size, predictor.on_error

    def __iter__(self) -> Iterator[_Feed]:
        worker = get_worker_info()
        first, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        for number, groups in enumerate(self._packed()):
            found = list(opened(groups, self.on_error)) if number % step == first else ()
            if found:
                yield self._feed(*zip(*found))

    def _packed(self) -> Iterator[list[list[Record]]]:
        waiting: list[list[Record]] = []
        for group in self.groups:
            for start in range(0, len(group), self.batch_size):
                part = group[start : start + self.batch_size]
                if waiting and sum(map(len, waiting)) + len(part) > self.batch_size:
                    yield waiting
                    waiting = []
                waiting.append(part)
        if waiting:
            yield waiting

    def _feed(self, groups: Sequence[list[Record]], images: Sequence[Image.Image]) -> _Feed:
        records = [record for group in groups for record in group]
        expressions = [record.expression for record in records]
        tokens = tokenize(self.tokenizer, expressions, self.max_tokens, warn=False)
        pixels = torch.stack([image_pixels(image, self.image_size) for image in images])
        index = torch.tensor([row for row, group in enumerate(groups) for _ in group])
        return _Feed(pixels, index, *tokens, records)


@dataclass(frozen=True)
class MetrisPredictor:
    """METRIS as a predictor; an image is encoded once for all of its sentences, as far as a batch holds them.

    Args:
        model: Is set to evaluation while it predicts, and back after it.
        tokenizer: The model's.
        image_size: Side of the square that images are resized to, pixels.
        max_tokens: Longest sentence, tokens; longer ones are cut in silence.
        batch_size: Sentences per forward pass.
        workers: Processes that load batches; 0 loads in this one.
        device: Where the model is.
        on_error: What an image that cannot be decoded does; see `predictors.opened`.
    """

    model: METRIS
    tokenizer: PreTrainedTokenizerBase
    image_size: int
    max_tokens: int
    batch_size: int = 32
    workers: int = 0
    device: torch.device | str = "cpu"
    on_error: OnError = "stop"

    def __call__(self, groups: Groups) -> Answers:
        """Yield each record with its answer, logits at the model's size."""
        # batch_size=None: what is loaded are batches already.
        feeds, generator = _Feeds(groups, self), torch.Generator()  # else torch's own would move on
        loader = DataLoader(
            feeds,
            batch_size=None,
            num_workers=self.workers,
            worker_init_fn=outlive_sigterm,
            generator=generator,
        )
        training = self.model.training
        self.model.eval()
        try:
            for images, index, token_ids, language_mask, records in loader:
                with torch.inference_mode():
                    pixels, *rest = (x.to(self.device) for x in (images, token_ids, language_mask, index))
                    output = self.model(normalized(pixels), *rest)
                yield from zip(records, answers_of(output), strict=True)
        finally:
            self.model.train(training)


def answers_of(output: MetrisOutput) -> list[Answer]:
    """Part the output of METRIS about b sentences into b answers."""
    absent = [None] * len(output.logits)
    if output.no_target is not None:
        absent = output.no_target.float().sigmoid().tolist()
    return [Answer(logits, True, probability) for logits, probability in zip(output.logits, absent)]


def predictions(
    output: MetrisOutput,
    sizes: Sequence[tuple[int, int]],
    *,
    threshold: float = 0.5,
    no_target_threshold: float = 0.5,
) -> list[Prediction]:
    """Turn the output of a model about b sentences into masks, by protocol metris.

    Args:
        output: Of the model.
        sizes: b heights and widths, those of the images themselves, pixels.
        threshold: Probability above which a pixel belongs to the mask, in (0, 1).
        no_target_threshold: Probability of "no target" above which the mask is empty, in (0, 1).
    """
    found = []
    for answer, (height, width) in zip(answers_of(output), sizes, strict=True):
        logits, absent = answer.mask, answer.no_target
        if absent is not None and absent > no_target_threshold:
            mask = np.zeros((height, width), dtype=bool)
        else:
            mask = mask_at(logits, height, width, threshold=threshold)
        found.append(Prediction(mask, absent))
    return found


def mask_at(logits: Tensor, height: int, width: int, *, threshold: float = 0.5) -> np.ndarray:
    """Bring (h, w) logits to (height, width), the image's own size, bilinearly; True above ``threshold``."""
    protocol = replace(PROTOCOLS["metris"], threshold=threshold)
    return resized(Answer(logits, True, None), height, width, protocol).mask
