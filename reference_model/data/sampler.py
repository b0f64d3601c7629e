"""Which sentences meet in a batch, from (seed, epoch, position) alone, however many processes share it."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import chain

import torch
from torch.utils.data import Sampler

from reference_model.files import InputError


def piece_size(batch_size: int, world: int, accumulate: int) -> int:
    """Cut the batch of a step into equal pieces: give the records of one.

    Raises:
        InputError: It cannot be cut evenly.
    """
    pieces = world * accumulate
    if batch_size % pieces:
        raise InputError(
            f"batch_size: {batch_size} sentences cannot be cut into {world} processes x {accumulate} "
            f"(accumulate) equal pieces; give a multiple of {pieces}"
        )
    return batch_size // pieces


class ImageGroupedSampler(Sampler[list[int]]):
    """Every sentence at most once an epoch, shuffled, ``per_image`` sentences of one image side by side.

    The batch of a step is cut into world · accumulate equal pieces, and piece m · world + rank is the m-th
    that this process takes: the order of an epoch does not depend on how many processes there are.

    Args:
        image_ids: The image of each record.
        batch_size: Records per optimiser step, of all processes together; a last short batch is left out
            (unless it is the only one).
        per_image: Sentences of an image kept together, so that it is encoded once for them.
        seed: Of the shuffling; the order of epoch e follows from (seed, e) alone.
        rank: Of this process, in [0, world).
        world: Number of processes.
        accumulate: Pieces that each process takes one after the other in a step.

    Raises:
        InputError: The batch cannot be cut evenly, or is cut and there are too few records for it.
    """

    def __init__(
        self,
        image_ids: Sequence[int],
        batch_size: int,
        *,
        per_image: int = 1,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        accumulate: int = 1,
    ) -> None:
        self.piece = piece_size(batch_size, world, accumulate)
        if self.piece < batch_size and len(image_ids) < batch_size:
            raise InputError(
                f"batch_size: is {batch_size}, but there are {len(image_ids)} sentences; give a smaller one"
            )
        self.image_ids = image_ids
        self.batch_size = batch_size
        self.per_image = per_image
        self.seed = seed
        self.rank, self.world, self.accumulate = rank, world, accumulate
        self.epoch = 0
        self.position = 0
        """Records of this epoch that are done, of all processes together; where `__iter__` begins."""

    @property
    def sentences(self) -> int:
        """Count of records."""
        return len(self.image_ids)

    @property
    def images(self) -> int:
        """Count of their images."""
        return len(set(self.image_ids))

    @property
    def steps(self) -> int:
        """Optimiser steps of an epoch."""
        return max(1, len(self.image_ids) // self.batch_size)

    def __len__(self) -> int:
        """Pieces of an epoch that this process takes."""
        return self.steps * self.accumulate

    def __iter__(self) -> Iterator[list[int]]:
        """Yield this process's pieces of the current epoch, from ``position`` on."""
        order = self._order()
        for start in range(self.position, self.steps * self.batch_size, self.batch_size):
            for m in range(self.accumulate):
                first = start + (m * self.world + self.rank) * self.piece
                yield order[first : first + self.piece]

    def advance(self) -> bool:
        """Count a step as done, and tell whether it was the last one of its epoch.

        Workers draw ahead of the training, so what was yielded is not what is done.
        """
        self.position += self.batch_size
        if self.position < self.steps * self.batch_size:
            return False
        self.epoch, self.position = self.epoch + 1, 0
        return True

    def _order(self) -> list[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        by_image = defaultdict(list)
        for i in torch.randperm(len(self.image_ids), generator=generator).tolist():
            by_image[self.image_ids[i]].append(i)
        groups = [
            members[start : start + self.per_image]
            for members in by_image.values()
            for start in range(0, len(members), self.per_image)
        ]
        shuffled = (groups[i] for i in torch.randperm(len(groups), generator=generator).tolist())
        return list(chain.from_iterable(shuffled))
