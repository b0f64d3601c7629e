"""Which sentences meet in a batch, from (seed, epoch) alone."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import chain

import torch
from torch.utils.data import Sampler


class ImageGroupedSampler(Sampler[list[int]]):
    """Every sentence at most once an epoch, shuffled, ``per_image`` sentences of one image side by side.

    Args:
        image_ids: The image of each record.
        batch_size: Records per batch; a last short batch is left out (unless it is the only one).
        per_image: Sentences of an image kept together, so that it is encoded once for them.
        seed: Of the shuffling; the order of epoch e follows from (seed, e) alone.
    """

    def __init__(
        self, image_ids: Sequence[int], batch_size: int, *, per_image: int = 1, seed: int = 0
    ) -> None:
        self.image_ids = image_ids
        self.batch_size = batch_size
        self.per_image = per_image
        self.seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        return max(1, len(self.image_ids) // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        """Yield the batches of the current epoch."""
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
        order = list(chain.from_iterable(shuffled))
        for start in range(0, len(self) * self.batch_size, self.batch_size):
            yield order[start : start + self.batch_size]
