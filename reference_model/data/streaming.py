"""From shards to batches: shuffled, shared out among processes, and never more than a buffer in memory."""

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from random import Random

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from reference_model.data.collate import Batch
from reference_model.data.dataset import Item, ReferringDataset
from reference_model.data.readers.shards import Shards, webdataset
from reference_model.data.records import Record
from reference_model.files import InputError
from reference_model.processes import outlive_sigterm


class ShardedDataset(IterableDataset[list[Item]]):
    """Every sentence of a sharded split once an epoch, in lists of those of one image, decoded once for them.

    The order follows from seed, epoch, rank, world and the count of worker processes. Shards are shared out
    where there are enough of them; else each process reads all of them and keeps every so manieth image.

    Args:
        reader: The shards.
        split: One of its splits.
        size: s, side of image and mask, pixels.
        per_image: Sentences of an image kept together.
        buffer: Lists that are held, with their images as encoded, to shuffle them.
        seed: Of the shuffling.
        rank: Number of this training process.
        world: Count of training processes.
    """

    def __init__(
        self,
        reader: Shards,
        split: str,
        size: int,
        *,
        per_image: int = 1,
        buffer: int = 512,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if not 0 <= rank < world:
            raise ValueError(f"ShardedDataset: rank must be in [0, world), got rank={rank}, world={world}")
        self.reader = reader
        self.shards = reader.of_split(split)
        self.size = size
        self.per_image = per_image
        self.buffer = buffer
        self.seed = seed
        self.rank = rank
        self.world = world
        self.epoch = 0

    @property
    def sentences(self) -> int:
        """Count of sentences in an epoch of all processes, as the index says."""
        return sum(shard.sentences for shard in self.shards)

    def __iter__(self) -> Iterator[list[Item]]:
        """Yield what falls to this process of the current epoch."""
        for records in self.groups():
            dataset = ReferringDataset(records, self.size, on_error=self.reader.on_error)
            try:
                yield dataset.__getitems__(range(len(records)))
            except InputError:
                if self.reader.on_error == "stop":
                    raise  # else it has been told

    def groups(self) -> Iterator[list[Record]]:
        """Yield the records of what `__iter__` yields, not yet decoded."""
        worker = get_worker_info()
        workers, worker_id = (1, 0) if worker is None else (worker.num_workers, worker.id)
        number, processes = self.rank * workers + worker_id, self.world * workers
        shards = list(self.shards)
        Random(f"{self.seed} {self.epoch}").shuffle(shards)  # alike in all processes
        if len(shards) >= processes:
            samples = (found for shard in shards[number::processes] for found in self.reader.samples(shard))
        else:
            found = (found for shard in shards for found in self.reader.samples(shard))
            samples = islice(found, number, None, processes)
        rng = Random(f"{self.seed} {self.epoch} {number}")
        groups = (group for records in samples for group in self._parted(records, rng))
        yield from webdataset().shuffle(self.buffer, initial=self.buffer, rng=rng)(groups)

    def _parted(self, records: Sequence[Record], rng: Random) -> Iterator[list[Record]]:
        order = rng.sample(records, len(records))
        for start in range(0, len(order), self.per_image):
            yield order[start : start + self.per_image]


class ShardedLoader:
    """Batches of a `ShardedDataset`; an epoch is ``len`` of them, for any count of worker processes.

    A process whose share gives fewer begins with it anew, so that all processes take equally many steps.
    Where ``position`` is not 0, an epoch goes on in its middle: what comes before is read, and left out.

    Args:
        dataset: What to load.
        batch_size: Sentences per batch, fewer only where there are fewer in all.
        collate: Makes a batch of items.
        accumulate: Batches that this process takes in one step.
        workers: Worker processes; 0 loads in this one.
        pin_memory: Put batches where copies to a GPU run beside the computation.
    """

    def __init__(
        self,
        dataset: ShardedDataset,
        batch_size: int,
        collate: Callable[[list[Item]], Batch],
        *,
        accumulate: int = 1,
        workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        self.dataset = dataset
        pieces = dataset.world * accumulate
        if pieces > 1 and dataset.sentences < batch_size * pieces:
            raise InputError(
                f"batch_size: is {batch_size * pieces}, but there are {dataset.sentences} sentences; give a "
                "smaller one"
            )
        self.batch_size = min(batch_size, dataset.sentences)
        self.accumulate = accumulate
        self.steps = max(1, dataset.sentences // (self.batch_size * pieces))
        """Optimiser steps of an epoch."""
        self.sentences = dataset.sentences
        self.images = sum(shard.samples for shard in dataset.shards)
        self.position = 0
        """Sentences of this epoch that are done, of all processes together."""
        self.collate = collate
        self.workers = workers
        self.pin_memory = pin_memory
        self.epoch = 0

    def __len__(self) -> int:
        return self.steps * self.accumulate

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches of the current epoch, from ``position`` on."""
        self.dataset.epoch = self.epoch
        done = self.position // (self.batch_size * self.dataset.world)
        return islice(self._batches(), done, len(self))

    def advance(self) -> bool:
        """Count a step as done, and tell whether it was the last one of its epoch."""
        step = self.batch_size * self.dataset.world * self.accumulate
        self.position += step
        if self.position < self.steps * step:
            return False
        self.epoch, self.position = self.epoch + 1, 0
        return True

    def _batches(self) -> Iterator[Batch]:
        held: list[Item] = []
        while True:
            # New worker processes, which know the epoch; its own generator, or loading would shift dropout.
            generator = torch.Generator().manual_seed(self.dataset.seed)
            loader = DataLoader(
                self.dataset,
                batch_size=None,
                num_workers=self.workers,
                worker_init_fn=outlive_sigterm,
                generator=generator,
            )
            found = 0
            for items in loader:
                found += len(items)
                held += items
                while len(held) >= self.batch_size:
                    batch = self.collate(held[: self.batch_size])
                    held = held[self.batch_size :]
                    yield _pinned(batch) if self.pin_memory else batch
            if not found:
                raise InputError(
                    f"{self.dataset.reader.source}: no sample can be read; see metris data check"
                )


def _pinned(batch: Batch) -> Batch:
    return Batch._make(part.pin_memory() if isinstance(part, Tensor) else part for part in batch)
