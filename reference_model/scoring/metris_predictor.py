"""METRIS as a predictor: batches of whole images, encoded once for all of their sentences."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from transformers import PreTrainedTokenizerBase

from reference_model.checkpoints.checkpoint import Checkpoint
from reference_model.data.readers.reader import OnError
from reference_model.data.records import Record
from reference_model.data.transforms import image_pixels
from reference_model.model.metris import METRIS, MetrisOutput
from reference_model.processes import outlive_sigterm
from reference_model.scoring.answers import Answer
from reference_model.scoring.predictors import Answers, Groups, opened
from reference_model.tokens import tokenize


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

    @classmethod
    def of(cls, checkpoint: Checkpoint, **options: Any) -> "MetrisPredictor":
        """Make a predictor of a checkpoint; ``options``: batch_size, workers and on_error."""
        config = checkpoint.config
        sizes = {"image_size": config.image_size, "max_tokens": config.max_tokens}
        return cls(checkpoint.model, checkpoint.tokenizer, **sizes, device=checkpoint.device, **options)

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
                    output = self.model(pixels, *rest)
                yield from zip(records, answers_of(output), strict=True)
        finally:
            self.model.train(training)


def answers_of(output: MetrisOutput) -> list[Answer]:
    """Part the output of METRIS about b sentences into b answers."""
    absent = [None] * len(output.logits)
    if output.no_target is not None:
        absent = output.no_target.float().sigmoid().tolist()
    return [Answer(logits, True, probability) for logits, probability in zip(output.logits, absent)]
