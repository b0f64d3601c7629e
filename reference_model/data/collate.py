"""From records to batches: sentences of one image share it, so that it is decoded and encoded once."""

import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from reference_model.data.cache import SharedCache
from reference_model.data.images import open_image
from reference_model.data.plain import shown
from reference_model.data.reader import OnError
from reference_model.data.records import Record
from reference_model.data.transforms import image_pixels, resize_mask
from reference_model.files import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Tokens(NamedTuple):
    """Tokenised sentences."""

    token_ids: Tensor
    """(b, l) int64; index 0 is [CLS] or what stands for it, padding at the end."""

    language_mask: Tensor
    """(b, l) bool; True = real token, [CLS] and [SEP] or what stands for them included."""


class Item(NamedTuple):
    """One record with its image and mask."""

    record: Record
    image: Tensor
    """(3, s, s) uint8: a quarter of what it takes once `normalized`, which is for the device to do."""

    mask: Tensor
    """(s, s) bool; True inside the object."""


class Batch(NamedTuple):
    """b sentences about u different images."""

    images: Tensor
    """(u, 3, s, s) uint8, each image once; a model takes them `normalized`."""

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


class ReferringDataset(Dataset[Item]):
    """Records with their images and masks at one square size.

    Args:
        records: What a reader gave.
        size: s, side of image and mask, pixels.
        cache: Make each image (3·s² bytes) and mask (s² bytes) once: the processes that fork from this one,
            as the workers of a DataLoader on Linux, share them in a temporary file (`SharedCache`).
        on_error: What an image or mask that cannot be decoded does: ``stop`` with an InputError, or be left
            out of its batch, with one warning (``skip``). A batch that would be left empty takes the next
            record that can be decoded, so that all training processes stay in step.
    """

    def __init__(
        self, records: Sequence[Record], size: int, *, cache: bool = False, on_error: OnError = "stop"
    ) -> None:
        if size < 1:
            raise ValueError(f"ReferringDataset: size must be at least 1 pixel, got {size}")
        self.records = records
        self.size = size
        self.on_error = on_error
        self._broken: dict[tuple[str, int], str] = {}
        # Sentences of one object share its segmentation, while ids of annotations need not be unique.
        self._object = [id(record.segmentation) for record in records]
        self._pixels: SharedCache | None = None
        self._masks: SharedCache | None = None
        if cache:
            images = dict.fromkeys(record.image_id for record in records)
            self._image_row = {image_id: row for row, image_id in enumerate(images)}
            self._object_row = {key: row for row, key in enumerate(dict.fromkeys(self._object))}
            self._pixels = SharedCache(len(self._image_row), 3 * size**2)
            self._masks = SharedCache(len(self._object_row), size**2)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Item:
        return self._items([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Item]:
        """Make a whole batch (DataLoader asks for it): what sentences share is decoded once.

        Raises:
            InputError: An image or mask cannot be decoded; under ``skip``, when none of all records can.
        """
        try:
            return self._items(indices)
        except InputError as error:
            if self.on_error == "stop":
                raise
            first = error
        count = len(self.records)
        for index in range(indices[-1] + 1, indices[-1] + count):
            with suppress(InputError):
                return self._items([index % count])
        raise first

    def _items(self, indices: Sequence[int]) -> list[Item]:
        """Make those of a batch that can be decoded; raises where none can."""
        images: dict[int, Tensor] = {}
        masks: dict[int, Tensor] = {}
        items, first = [], None
        for index in indices:
            record = self.records[index]
            try:
                if record.image_id not in images:
                    images[record.image_id] = self._image(record)
                if self._object[index] not in masks:
                    masks[self._object[index]] = self._mask(index)
            except InputError as error:
                if self.on_error == "stop":
                    raise
                first = first or error
                continue
            items.append(Item(record, images[record.image_id], masks[self._object[index]]))
        if first is not None and not items:
            raise InputError(f"{first}; nothing is left of a batch of {len(indices)}") from first
        return items

    def _image(self, record: Record) -> Tensor:
        if self._pixels is not None:
            held = self._pixels.read(self._image_row[record.image_id])
            if held is not None:
                return torch.from_numpy(held).view(3, self.size, self.size)
        with self._once("image", record.image_id):
            size, name = (record.height, record.width), record.image_name
            image = open_image(record.image, height_width=size, name=name)
        pixels = image_pixels(image, self.size)
        if self._pixels is not None:
            self._pixels.write(self._image_row[record.image_id], pixels.numpy())
        return pixels

    def _mask(self, index: int) -> Tensor:
        key = self._object[index]
        if self._masks is not None and (held := self._masks.read(self._object_row[key])) is not None:
            return torch.from_numpy(held.view(bool)).view(self.size, self.size)
        with self._once("mask", key):
            whole = self.records[index].mask()
        mask = resize_mask(whole, self.size, self.size)
        if self._masks is not None:
            self._masks.write(self._object_row[key], mask)
        return torch.from_numpy(mask)

    @contextmanager
    def _once(self, kind: str, key: int) -> Iterator[None]:
        """Remember what could not be decoded: it is told once, and not tried again."""
        if (kind, key) in self._broken:
            raise InputError(self._broken[kind, key])
        try:
            yield
        except InputError as error:
            if self.on_error == "skip":
                self._broken[kind, key] = str(error)
                warnings.warn(f"{error}; its sentences are left out", stacklevel=4)
            raise


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


def outlive_sigterm(worker: int) -> None:
    """Leave SIGTERM to the process that trains: schedulers send it to all of a job (a ``worker_init_fn``).

    A worker ends with its parent in any case.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def report_overlong(tokenizer: "PreTrainedTokenizerBase", records: Sequence[Record], max_tokens: int) -> None:
    """Say on stderr, once before a run, how many sentences :class:`Collate` will cut."""
    rows = _framed(tokenizer, [record.expression for record in records])
    overlong = sum(len(row.ids) > max_tokens for row in rows)
    if overlong:
        print(f"{overlong} of {len(rows)} sentences exceed {max_tokens} tokens and are cut", file=sys.stderr)


def tokenize(
    tokenizer: "PreTrainedTokenizerBase",
    expressions: Sequence[str],
    max_tokens: int = 20,
    *,
    warn: bool = True,
) -> Tokens:
    """Tokenise sentences and pad them to the longest one.

    Args:
        tokenizer: That of the text encoder. Where it opens no sentence, as T5's and GPT's, its sign for a
            beginning, else for an end, is put in front: place 0 is the global cue's in every sentence.
        expressions: b sentences.
        max_tokens: The most tokens of a sentence, special ones included. A longer sentence is cut; its last
            token stays the closing one ([SEP]), if it has one.
        warn: Name each sentence that is cut in a warning.

    Returns:
        (b, l) int64 token ids and (b, l) bool mask, l at most ``max_tokens``.

    Raises:
        InputError: A sentence has no word.
        ValueError: ``max_tokens`` leaves no room for a word, or there is no sentence.
    """
    if isinstance(expressions, str):
        raise TypeError("tokenize: expressions is one string, expected a list of them")
    if not expressions:
        raise ValueError("tokenize: expressions is empty, expected at least one")
    for expression in expressions:
        if not expression.strip():
            raise InputError(f"{shown(expression)}: has no word; write what to look for")
        try:
            expression.encode()
        except UnicodeEncodeError as error:
            raise InputError(f"{shown(expression)}: not valid Unicode text; mend that sentence") from error
    rows = []
    for expression, (ids, closed) in zip(expressions, _framed(tokenizer, expressions)):
        special = 1 + closed
        if max_tokens <= special:
            raise ValueError(
                f"tokenize: max_tokens is {max_tokens}, but {special} of them are special tokens"
            )
        if len(ids) <= special:
            raise InputError(f"{shown(expression)}: has no word; write what to look for")
        if len(ids) > max_tokens:
            if warn:
                warnings.warn(
                    f"{expression!r} has {len(ids)} tokens with the special ones, {max_tokens} are kept",
                    stacklevel=2,
                )
            ids = [*ids[: max_tokens - closed], *ids[len(ids) - closed :]]
        rows.append(ids)
    lengths = torch.tensor([len(row) for row in rows])
    longest = int(lengths.max())
    return Tokens(
        # What stands there is not read; GPT's tokenizer has no sign for it.
        torch.tensor([row + [tokenizer.pad_token_id or 0] * (longest - len(row)) for row in rows]),
        torch.arange(longest) < lengths[:, None],
    )


class _Framed(NamedTuple):
    ids: list[int]
    """Token 0 opens the sentence."""
    closed: bool
    """Whether the last one closes it."""


def _framed(tokenizer: "PreTrainedTokenizerBase", expressions: Sequence[str]) -> list[_Framed]:
    """Tokenise sentences, each behind a token that opens it."""
    signs = (tokenizer.cls_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id)
    opening = next((sign for sign in signs if sign is not None), None)
    if opening is None:
        raise ValueError("tokenize: the tokenizer has no sign for the beginning or the end of a sentence")
    rows = tokenizer(list(expressions), return_special_tokens_mask=True, verbose=False)
    return [
        _Framed(ids if added[:1] == [1] else [opening, *ids], len(ids) > 1 and added[-1] == 1)
        for ids, added in zip(rows["input_ids"], rows["special_tokens_mask"])
    ]
