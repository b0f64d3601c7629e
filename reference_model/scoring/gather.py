"""What several processes saw of a split, put together in the order of one."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import NamedTuple, TextIO

import torch.distributed as dist

from reference_model.data.readers.reader import as_list
from reference_model.data.records import Record
from reference_model.files import InputError, shown
from reference_model.processes import place
from reference_model.scoring.outcome import Outcome


class Seen(NamedTuple):
    """What is told of one sentence, and can be sent from process to process."""

    record: Record
    outcome: Outcome
    threshold: float | None
    line: str | None
    """Of the file of results, if there is to be one."""


def gathered(seen: Iterable[Seen]) -> Iterator[Seen]:
    """Yield what one process sees as it comes; of several, each yields what all of them saw.

    Of several, a split is held without its images and masks, and a stream comes out in the order of images.

    Raises:
        InputError: That of any process, in all of them.
    """
    _, processes = place()
    if processes == 1:
        yield from seen
        return
    error, light = None, []
    try:
        light = [one._replace(record=replace(one.record, image=b"", segmentation=[])) for one in seen]
    except InputError as failed:
        error = str(failed)
    parts: list[tuple[str | None, list[Seen]]] = [(None, [])] * processes
    dist.all_gather_object(parts, (error, light))
    for said, _ in parts:
        if said is not None:  # all end in good order, with the same line
            raise InputError(said)
    # One after the other as one process has listed records: an image is with one of them.
    every = [one for _, part in parts for one in part]
    yield from sorted(every, key=lambda one: (one.record.image_id, one.record.ref_id))


class Rows:
    """Lines of results, a line for each sentence of a run: parts of a split that was scored add none."""

    def __init__(self, file: TextIO) -> None:
        self.file = file
        self._before: set[tuple[str, int]] = set()
        self._here: set[tuple[str, int]] = set()

    def begin(self) -> None:
        """Begin a further split, or part of one."""
        self._before |= self._here
        self._here = set()

    def add(self, record: Record, line: str) -> None:
        """Write a sentence; raises where the split has its sent_id twice."""
        key = (record.split, record.sent_id)
        if key in self._here:
            raise _repeated(record)
        self._here.add(key)
        if key not in self._before:
            self.file.write(line)


def _refuse_repeated(splits: dict[str, Iterable[Record]]) -> None:
    """Refuse to write results of a split with two sentences of one number; a stream is seen as it goes."""
    for records in splits.values():
        seen: set[tuple[str, int]] = set()
        for record in as_list(records) or ():
            if (record.split, record.sent_id) in seen:
                raise _repeated(record)
            seen.add((record.split, record.sent_id))


def _repeated(record: Record) -> InputError:
    return InputError(
        f"results: sent_id {record.sent_id} of split {record.split} ({shown(record.expression)}) is that of "
        "several sentences, and lines of results go by it; number them afresh, see metris data check"
    )
