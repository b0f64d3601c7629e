"""What a run tells of itself: its data set, its log, pictures of it to look at."""

import json
import math
import warnings
from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from reference_model.checkpoints.checkpoint import CONFIG
from reference_model.configs import build, read_yaml
from reference_model.data.config import DataConfig
from reference_model.data.datasets import read
from reference_model.data.images import open_image
from reference_model.data.readers.reader import OnError, Reader
from reference_model.data.records import Record
from reference_model.data.transforms import resize_mask
from reference_model.files import InputError
from reference_model.viewing.explain import Explanation

LOG, METRICS = "log.jsonl", "metrics.json"
SIDE = 480
"""Longest side of a picture in a figure, pixels."""


def data_of(run: Path, given: DataConfig | None) -> Reader:
    """Read the data set that was given, or else the one that a run was trained on.

    Where no more than a root was given, that is where the run's data set is now; ``on_error`` and ``workers``
    tell no data set from another, and skip is heeded wherever it stands: a run that skipped is looked at so.

    Raises:
        InputError: The run names none, or it cannot be read.
    """
    alike = None if given is None else DataConfig(given.root, on_error=given.on_error, workers=given.workers)
    if given is not None and given != alike:
        return read(given)
    config = data_config(run)
    if given is not None:
        on_error: OnError = "skip" if "skip" in (given.on_error, config.on_error) else "stop"
        return read(replace(config, root=given.root, on_error=on_error, workers=given.workers))
    try:
        return read(config)
    except InputError as error:
        raise InputError(
            f"{error} (the data of {run / CONFIG}); or give --data.root, where they are now"
        ) from error


def data_config(run: Path) -> DataConfig:
    """Tell what a run was trained on.

    Raises:
        InputError: It does not say.
    """
    path = run / CONFIG
    if not path.is_file():
        raise InputError(f"checkpoint {run}: has no {CONFIG}; give the folder that train wrote")
    return build(DataConfig, read_yaml(path, DataConfig, section="data"), source=str(path))


def log_of(run: Path) -> list[dict[str, Any]]:
    """Read the log of a run, one row a step; a line that a crash cut is left out."""
    path = run / LOG
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else ():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    return rows


def losses(rows: Sequence[dict[str, Any]]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Give the steps (k) of a log, and its losses (k) by name; NaN where a row lacks one."""
    named = {"total": "total", "mask": "mask", "contrastive": "contrastive (Eq. 4)"}
    named |= {"no_target": "no target"}
    number = lambda value: float(value) if isinstance(value, int | float) else math.nan
    found = {
        name: np.array([number(row.get(key)) for row in rows])
        for key, name in named.items()
        if any(key in row for row in rows)
    }
    return np.array([row["step"] for row in rows]), found


def spaced_images(reader: Reader, split: str, count: int) -> list[list[Record]]:
    """List the records of ``count`` images of a split (all, where it has no more), evenly spaced.

    Raises:
        InputError: There is no such split, or nothing in it.
    """
    ids = list(dict.fromkeys(record.image_id for record in reader.stream(split)))
    if not ids:
        raise InputError(f"{reader.source}: split {split!r} has no records; choose another")
    wanted = {ids[i] for i in np.linspace(0, len(ids) - 1, min(count, len(ids))).round().astype(int)}
    kept = [record for record in reader.stream(split) if record.image_id in wanted]
    place = {image_id: number for number, image_id in enumerate(ids)}
    kept.sort(key=lambda record: place[record.image_id])
    return [list(group) for _, group in groupby(kept, key=lambda record: record.image_id)]


def usable(groups: Sequence[list[Record]], on_error: OnError) -> tuple[list[list[Record]], int]:
    """Leave out records whose image or mask cannot be decoded, and say so in one line.

    Args:
        groups: Records, image by image.
        on_error: With ``stop`` all are kept: the first that cannot be decoded raises where it is used.

    Returns:
        What is left, and how many sentences are not.

    Raises:
        InputError: None is left.
    """
    if on_error == "stop":
        return list(groups), 0
    left, defects = [], []
    for group in groups:
        kept = []
        for record in group:
            try:
                record.mask()
                if not kept:
                    image_of(record)
            except InputError as error:
                defects.append(str(error))
            else:
                kept.append(record)
        left += [kept] if kept else []
    tell_left_out(defects, len(defects) + sum(map(len, left)), "sentences")
    return left, len(defects)


def tell_left_out(defects: Sequence[str], of: int, what: str) -> None:
    """Say in one line how many of ``of`` samples were left out, and why the first was.

    Raises:
        InputError: All were.
    """
    if defects and len(defects) == of:
        raise InputError(f"{defects[0]}; none of {of} {what} can be used, see metris data check --images")
    if defects:
        warnings.warn(f"{defects[0]}; {len(defects)} of {of} {what} left out", stacklevel=3)


def image_of(record: Record) -> Image.Image:
    """Open the image of a record."""
    return open_image(record.image, height_width=(record.height, record.width), name=record.image_name)


def picture(image: Image.Image, *, side: int = SIDE) -> np.ndarray:
    """Give (h, w, 3) uint8, reduced where its longest side is more than ``side`` pixels."""
    shown = image.copy()
    shown.thumbnail((side, side))
    return np.asarray(shown)


def truth_at(record: Record, height: int, width: int) -> np.ndarray:
    """Give the true mask, (height, width) bool."""
    return resize_mask(record.mask(), height, width)


def answered(found: Explanation, height: int, width: int) -> np.ndarray:
    """Give the mask that a model answers with, (height, width) bool; empty where it says "no target"."""
    if found.no_target is not None and found.no_target > 0.5:
        return np.zeros((height, width), dtype=bool)
    return found.mask(height, width)
