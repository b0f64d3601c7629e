"""From records to batches: sentences of one image share it, so that it is decoded and encoded once."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from reference_model.data.dataset import Item
from reference_model.data.records import Record
from reference_model.tokens import tokenize

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Batch(NamedTuple):
    """b sentences about u different images."""

    images: Tensor
    """(u, 3, s, s) uint8, each image once."""

    image_index: Tensor
    """(b,) int64; the row of ``images`` that a sentence is about."""

    token_ids: Tensor
    """(b, l) int64."""

    language_mask: Tensor
    """(b, l) bool; True = real token."""

    masks: Tensor
    """(b, s, s) bool; True inside the object."""

    records: list[Record]
    """The b records, in order."""

    def to(self, device: torch.device | str) -> "Batch":
        """Move the tensors; copies from pinned memory run beside the computation."""
        return self._make(
            value.to(device, non_blocking=True) if isinstance(value, Tensor) else value for value in self
        )


class Collate:
    """Make a :class:`Batch` of items; to be given to a DataLoader as ``collate_fn``.

    Overlong sentences are cut in silence: `report_overlong` counts them once.

    Args:
        tokenizer: That of the text encoder.
        max_tokens: The most tokens of a sentence, special ones included.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", max_tokens: int = 20) -> None:
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens

    def __call__(self, items: Sequence[Item]) -> Batch:
        images: dict[int, Tensor] = {}
        for record, image, _ in items:
            images.setdefault(record.image_id, image)
        row = {image_id: index for index, image_id in enumerate(images)}
        records = [item.record for item in items]
        expressions = [record.expression for record in records]
        tokens = tokenize(self.tokenizer, expressions, self.max_tokens, warn=False)
        return Batch(
            images=torch.stack(list(images.values())),
            image_index=torch.tensor([row[record.image_id] for record in records]),
            token_ids=tokens.token_ids,
            language_mask=tokens.language_mask,
            masks=torch.stack([item.mask for item in items]),
            records=records,
        )
