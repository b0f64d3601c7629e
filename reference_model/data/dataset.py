"""Records with their images and masks, at one square size."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from reference_model.data.cache import SharedCache
from reference_model.data.images import open_image
from reference_model.data.readers.reader import OnError
from reference_model.data.records import Record
from reference_model.data.transforms import image_pixels, resize_mask
from reference_model.files import InputError


class Item(NamedTuple):
    """One record with its image and mask."""

    record: Record
    image: Tensor
    """(3, s, s) uint8: a quarter of what it takes normalised, which METRIS does on the device."""

    mask: Tensor
    """(s, s) bool; True inside the object."""


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
