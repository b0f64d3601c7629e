"""Files of results: one JSON object a line, with the mask as run lengths; and predictions of other programs.

A line that `evaluate` writes has sent_id, ref_id, image_id, split, expression, category_id; protocol,
sentences (which of an object's) and threshold (null where masks were given); the fields of `outcome.Outcome`;
mask, as COCO's compressed RLE at the size of the protocol, as it was before the
no-target classifier might withdraw it; and no_target, the probability that this classifier gave, where there
is one. To be scored again a line needs sent_id and mask; split tells equal sent_ids of several splits apart,
no_target is heeded, and protocol must be the one that is asked for.
"""

import json
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from reference_model.data.images import open_binary
from reference_model.data.records import Record, segmentation_mask
from reference_model.data.untrusted import listing, plain_field
from reference_model.files import InputError, shown
from reference_model.scoring.outcome import Outcome
from reference_model.scoring.protocols import PROTOCOLS, Protocol


def result_line(
    record: Record,
    found: Outcome,
    mask: np.ndarray,
    protocol: Protocol,
    no_target: float | None,
    threshold: float | None = None,
) -> str:
    """Give the line of one sentence."""
    rle = coco_mask.encode(np.asfortranarray(mask.view(np.uint8)))
    row = {key: getattr(record, key) for key in ("sent_id", "ref_id", "image_id", "split", "expression")}
    row |= {"category_id": record.category_id, "protocol": protocol.name}
    row |= {"sentences": protocol.sentences, "threshold": threshold}
    row |= found._asdict()
    row |= {} if no_target is None else {"no_target": no_target}
    row["mask"] = {"size": list(mask.shape), "counts": rle["counts"].decode("ascii")}
    return json.dumps(row, ensure_ascii=False) + "\n"


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
            of a PNG of two values, 0 outside.
        protocol: Name of the one to score by. None: lines of any.

    Raises:
        InputError: The file is missing or malformed, has a sentence twice, or holds masks that another
            protocol has cut and resized.
    """

    def __init__(self, path: Path, protocol: str | None = None) -> None:
        self.path = path
        self._places: dict[tuple[str | None, int], tuple[str, int]] = {}
        for where, offset, row in rows(path):
            split = plain_field(row, "split", str, where) if "split" in row else None
            key = (split, row["sent_id"])
            if key in self._places:
                raise InputError(f"{where}: sent_id {row['sent_id']} a second time; keep one of them")
            if "mask" not in row:
                raise InputError(f"{where}: has no 'mask', only {shown(list(row))}; give RLE or a path")
            other = row.get("protocol")
            if protocol is not None and other != protocol and other in tuple(PROTOCOLS):
                raise InputError(
                    f"{where}: its mask was cut and resized by protocol {other}, not {protocol}; "
                    f"score it with --protocol {other}, or write the results of {protocol}"
                )
            self._places[key] = (where, offset)
        if not self._places:
            raise InputError(f"{path}: holds no predictions; write one sentence a line")

    def has(self, record: Record) -> bool:
        """Tell whether there is a line for a sentence."""
        return (record.split, record.sent_id) in self._places or (None, record.sent_id) in self._places

    def refuse_missing(self, records: Collection[Record]) -> None:
        """Refuse to score records some of which have no line.

        Raises:
            InputError: The first of them, and how many there are.
        """
        missing = [record for record in records if not self.has(record)]
        if missing:
            raise self._lacks(missing[0], f"; {len(missing)} of {len(records)} sentences lack theirs")

    def _lacks(self, record: Record, count: str = "") -> InputError:
        return InputError(
            f"{self.path}: has no line with sent_id {record.sent_id} ({shown(record.expression)} of split "
            f"{record.split}) among its {len(self._places)}{count}; predict every sentence of the splits, or "
            "leave those out with --data.on_error skip"
        )

    def of(self, record: Record) -> tuple[np.ndarray, float | None, float | None]:
        """Find the (h, w) bool mask of a sentence, the probability that nothing is meant, and the threshold.

        Raises:
            InputError: There is none, or it cannot be used.
        """
        sentence = (record.split, record.sent_id)
        place = self._places.get(sentence, self._places.get((None, record.sent_id)))
        if place is None:
            raise self._lacks(record)
        where, offset = place
        with self.path.open("rb") as file:
            file.seek(offset)
            row = _row(file.readline(), where)
        known = (_probability(row, key, where) for key in ("no_target", "threshold"))
        return _mask(row["mask"], where, self.path.parent), *known


def _probability(row: dict[str, Any], key: str, where: str) -> float | None:
    found: float | None = row.get(key)
    if found is not None and not (type(found) in (int, float) and 0 <= found <= 1):
        raise InputError(f"{where}: {key} is {shown(found)}, expected a probability, 0 to 1")
    return found


def _mask(mask: Any, where: str, folder: Path) -> np.ndarray:
    if isinstance(mask, str):
        try:
            return open_binary(folder / mask)
        except InputError as error:
            raise InputError(f"{where}: mask {error}") from error
    size = mask.get("size") if isinstance(mask, dict) else None
    if not (isinstance(size, list) and len(size) == 2):
        raise InputError(f"{where}: mask is {shown(mask)}, expected a path or RLE with size and counts")
    return segmentation_mask(mask, *size, owner=where)
