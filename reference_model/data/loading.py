"""What training draws from: batches of a split, epoch after epoch, with the place where it is."""

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Protocol

import torch
from torch.utils.data import DataLoader

from reference_model.data.collate import Batch
from reference_model.data.dataset import Item, ReferringDataset
from reference_model.data.sampler import ImageGroupedSampler
from reference_model.processes import outlive_sigterm


class Loader(Protocol):
    """Batches of one process; `ListedLoader` where records are listed, `ShardedLoader` where streamed."""

    steps: int
    """Optimiser steps of an epoch."""
    accumulate: int
    """Batches that this process takes in one step."""
    sentences: int
    """Count of sentences, of all processes together."""
    images: int
    """Count of their images."""
    epoch: int
    position: int
    """Sentences of this epoch that are done, of all processes together; where an iteration begins."""

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches of the current epoch, from ``position`` on."""

    def advance(self) -> bool:
        """Count a step as done, and tell whether it was the last one of its epoch."""


class ListedLoader:
    """Batches of listed records, in the order of an `ImageGroupedSampler`.

    Args:
        dataset: Makes the dataset when the first batch is drawn: a cache takes its place on the disk at once.
        sampler: Says which records meet in a batch; owns the place in the data.
        collate: Makes a batch of items.
        workers: Worker processes; 0 loads in this one.
        pin_memory: Put batches where copies to a GPU run beside the computation.
    """

    def __init__(
        self,
        dataset: Callable[[], ReferringDataset],
        sampler: ImageGroupedSampler,
        collate: Callable[[Sequence[Item]], Batch],
        *,
        workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        self.sampler = sampler
        self.steps, self.accumulate = sampler.steps, sampler.accumulate
        self.sentences, self.images = sampler.sentences, sampler.images
        self.advance = sampler.advance
        self._options = {"collate_fn": collate, "num_workers": workers, "pin_memory": pin_memory}
        self._dataset, self._loader = dataset, None

    @property
    def epoch(self) -> int:
        """Passes over the data that are done."""
        return self.sampler.epoch

    @epoch.setter
    def epoch(self, epoch: int) -> None:
        self.sampler.epoch = epoch

    @property
    def position(self) -> int:
        """Sentences of this epoch that are done, of all processes together."""
        return self.sampler.position

    @position.setter
    def position(self, position: int) -> None:
        self.sampler.position = position

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches of the current epoch, from ``position`` on."""
        if self._loader is None:
            self._loader = DataLoader(
                self._dataset(),
                batch_sampler=self.sampler,
                persistent_workers=self._options["num_workers"] > 0,
                worker_init_fn=outlive_sigterm,
                # Its own generator: otherwise each new iterator would shift the dropout of the run.
                generator=torch.Generator().manual_seed(self.sampler.seed),
                **self._options,
            )
        return iter(self._loader)


def micro_batches(loader: Loader) -> Iterator[list[Batch]]:
    """Yield the micro-batches of one step after the other, epoch after epoch."""
    while True:
        waiting = iter(loader)
        while step := list(islice(waiting, loader.accumulate)):
            yield step
