"""What can be scored besides METRIS: any callable, and files of masks.

A predictor takes groups of records, each about one image, and yields every record with its answer, in order.
"""

import importlib
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from reference_model.data.images import open_image
from reference_model.data.readers.reader import OnError
from reference_model.data.records import Record
from reference_model.files import InputError
from reference_model.scoring.answers import Answer
from reference_model.scoring.results import Predictions

Groups = Iterable[list[Record]]
Answers = Iterator[tuple[Record, Answer]]
Predictor = Callable[[Groups], Answers]
SegmentationModel = Callable[[Image.Image, list[str]], Any]
"""An RGB image and k sentences -> k masks of any one size, (k, h, w): bool, or probabilities from 0 to 1."""


@dataclass(frozen=True)
class CallablePredictor:
    """Any model as a predictor: it is called with an image and all of its sentences, or a batch of them.

    Args:
        model: (RGB image, k sentences) -> (k, h, w) or k of (h, w): bool, or probabilities from 0 to 1.
        name: What messages call it.
        on_error: What an image that cannot be decoded does; see `opened`.
        batch_size: Sentences of a call, at most.
    """

    model: SegmentationModel
    name: str
    on_error: OnError = "stop"
    batch_size: int = 32

    def __call__(self, groups: Groups) -> Answers:
        """Yield each record with its answer.

        Raises:
            InputError: The model returned something else.
        """
        for whole, image in opened(groups, self.on_error):
            for start in range(0, len(whole), self.batch_size):
                records = whole[start : start + self.batch_size]
                with torch.inference_mode():
                    found = self.model(image, [record.expression for record in records])
                    if isinstance(
                        found, Iterator
                    ):  # a generator's own errors are the model's, with traceback
                        found = list(found)
                for record, mask in zip(records, self._checked(found, records), strict=True):
                    yield record, Answer(mask, False, None)

    def _checked(self, found: Any, records: list[Record]) -> list[Tensor]:
        expected = f"expected {len(records)} masks (h, w), bool or probabilities"
        try:
            masks = [torch.as_tensor(mask).detach() for mask in found]
        except (TypeError, ValueError, RuntimeError) as error:
            raise InputError(f"model {self.name}: returned a {type(found).__name__}, {expected}") from error
        if len(masks) != len(records):
            raise InputError(f"model {self.name}: returned {len(masks)} masks, {expected}, one a sentence")
        for mask, record in zip(masks, records, strict=True):
            if mask.ndim != 2 or not mask.numel():
                problem = f"has shape {tuple(mask.shape)}"
            elif mask.dtype != torch.bool and not mask.is_floating_point():
                problem = f"is {str(mask.dtype).removeprefix('torch.')}"
            elif mask.is_floating_point() and not (mask.min() >= 0 and mask.max() <= 1):  # NaN fails both
                problem = f"has values from {mask.min():g} to {mask.max():g}, no probabilities"
            else:
                refuse_transposed(mask.shape, record, f"model {self.name}")
                continue
            raise InputError(f"model {self.name}: mask of {record.expression!r} {problem}; {expected}")
        return masks


def callable_from(name: str) -> SegmentationModel:
    """Import PACKAGE.MODULE:NAME, from the current folder too.

    Raises:
        InputError: There is no such module or name, or it cannot be called.
    """
    module, _, attribute = name.partition(":")
    if not module or not attribute:
        raise InputError(f"model {name}: expected PACKAGE.MODULE:NAME, such as my_package.my_model:predict")
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise  # something that the module itself imports: its traceback tells more
        raise InputError(
            f"model {name}: no module {error.name!r} in {Path.cwd()} or among what is installed"
        ) from error
    model = getattr(found, attribute, None)
    if not callable(model):
        there = ", ".join(key for key, value in vars(found).items() if callable(value) and key[0] != "_")
        raise InputError(f"model {name}: {module} has no callable {attribute!r}; it has {there or 'none'}")
    return model


@dataclass(frozen=True)
class FilePredictor:
    """A file of predicted masks as a predictor; images are not opened."""

    file: Predictions
    on_error: OnError = "stop"
    """What a sentence that the file lacks does: ``stop``, or be left out (``skip``)."""

    def __call__(self, groups: Groups) -> Answers:
        """Yield each record with the mask that the file has for it.

        Raises:
            InputError: It has none, or one that cannot be used.
        """
        for record in (record for group in groups for record in group):
            if self.on_error == "skip" and not self.file.has(record):
                continue
            mask, absent, threshold = self.file.of(record)
            refuse_transposed(mask.shape, record, str(self.file.path))
            yield record, Answer(torch.from_numpy(mask), False, absent, threshold)


def refuse_transposed(shape: Sequence[int], record: Record, source: str) -> None:
    """Refuse a mask whose height and width are those of the image the wrong way round."""
    size = (record.height, record.width)
    if tuple(shape) == size[::-1] != size:
        raise InputError(
            f"{source}: mask of {record.expression!r} (sent_id {record.sent_id}) has height {shape[0]} and "
            f"width {shape[1]}, the image {size[0]} and {size[1]}; give masks as (height, width)"
        )


def opened(groups: Groups, on_error: OnError) -> Iterator[tuple[list[Record], Image.Image]]:
    """Open the image of each group; one that cannot be decoded raises (stop) or is left out (skip)."""
    for records in groups:
        first = records[0]
        size, name = (first.height, first.width), first.image_name
        try:
            image = open_image(first.image, height_width=size, name=name)
        except InputError as error:
            if on_error == "stop":
                raise
            warnings.warn(f"{error}; its sentences are left out", stacklevel=2)
            continue
        yield records, image
