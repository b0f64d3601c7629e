"""Files of results: one JSON object a line, with the mask as run lengths; and predictions of other programs.

A line that `evaluate` writes has sent_id, ref_id, image_id, split, expression, category_id; protocol and the
fields of `outcome.Outcome`; mask, as COCO's compressed RLE at the size of the protocol, as it was before the
no-target classifier might withdraw it; and no_target, the probability that this classifier gave, where there
is one. To be scored again a line needs sent_id and mask; split tells equal sent_ids of several splits apart,
and no_target is heeded.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from pycocotools import mask as coco_mask

from reference_model.data.images import image_size, open_mask
from reference_model.data.plain import listing, plain_field, shown
from reference_model.data.records import Record, segmentation_mask
from reference_model.files import InputError
from reference_model.scoring.outcome import Outcome
from reference_model.scoring.protocols import Protocol


def write_row(
    file: TextIO,
    record: Record,
    found: Outcome,
    mask: np.ndarray,
    protocol: Protocol,
    no_target: float | None,
) -> None:
    """Append one sentence."""
    rle = coco_mask.encode(np.asfortranarray(mask.view(np.uint8)))
    row = {key: getattr(record, key) for key in ("sent_id", "ref_id", "image_id", "split", "expression")}
    row |= {"category_id": record.category_id, "protocol": protocol.name}
    row |= found._asdict()
    row |= {} if no_target is None else {"no_target": no_target}
    row["mask"] = {"size": list(mask.shape), "counts": rle["counts"].decode("ascii")}
    file.write(json.dumps(row, ensure_ascii=False) + "\n")


def rows(path: Path) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """Yield (what messages begin with, offset in the file in bytes, row) of each line that is not blank.

    Raises:
        InputError: The file is missing, or a line is no JSON object.
    """
    try:
        with path.open("rb") as file:
            offset = 0
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield f"{path}:{number}", offset, _row(line, f"{path}:{number}")
                offset += len(line)
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file; {path.parent} holds {listing(path.parent)}") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check the path") from error


def _row(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not a JSON object; write one sentence a line") from error
    plain_field(row, "sent_id", int, where)
    return row


class Predictions:
    """A file of predicted masks, whose lines are read when they are asked for; only their places are kept.

    Args:
        path: A .jsonl file with ``sent_id`` and ``mask``: RLE, or the path, from the folder of the file,
            of a PNG that is not 0 inside.

    Raises:
        InputError: The file is missing or malformed, or has a sentence twice.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._places: dict[tuple[str | None, int], tuple[str, int]] = {}
        for where, offset, row in rows(path):
            split = plain_field(row, "split", str, where) if "split" in row else None
            key = (split, row["sent_id"])
            if key in self._places:
                raise InputError(f"{where}: sent_id {row['sent_id']} a second time; keep one of them")
            if "mask" not in row:
                raise InputError(f"{where}: has no 'mask', only {shown(list(row))}; give RLE or a path")
            self._places[key] = (where, offset)
        if not self._places:
            raise InputError(f"{path}: holds no predictions; write one sentence a line")

    def of(self, record: Record) -> tuple[np.ndarray, float | None]:
        """Find the (h, w) bool mask of a sentence, and the probability that nothing is meant, if it is known.

        Raises:
            InputError: There is none, or it cannot be used.
        """
        sentence = (record.split, record.sent_id)
        place = self._places.get(sentence, self._places.get((None, record.sent_id)))
        if place is None:
            raise InputError(
                f"{self.path}: has no line with sent_id {record.sent_id} ({record.expression!r} of split "
                f"{record.split}) among its {len(self._places)}; predict every sentence of the splits"
            )
        where, offset = place
        with self.path.open("rb") as file:
            file.seek(offset)
            row = _row(file.readline(), where)
        probability = row.get("no_target")
        if probability is not None and not (type(probability) in (int, float) and 0 <= probability <= 1):
            raise InputError(f"{where}: no_target is {shown(probability)}, expected a probability, 0 to 1")
        return _mask(row["mask"], where, self.path.parent), probability


def _mask(mask: Any, where: str, folder: Path) -> np.ndarray:
    if isinstance(mask, str):
        try:
            return open_mask(folder / mask, *image_size(folder / mask))
        except InputError as error:
            raise InputError(f"{where}: mask {error}") from error
    size = mask.get("size") if isinstance(mask, dict) else None
    if not (isinstance(size, list) and len(size) == 2):
        raise InputError(f"{where}: mask is {shown(mask)}, expected a path or RLE with size and counts")
    return segmentation_mask(mask, *size, owner=where)
