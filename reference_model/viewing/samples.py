"""Draw a page of samples of a data set: each image with its mask, the sentence below."""

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from textwrap import shorten

import numpy as np
from PIL import Image
from tqdm import tqdm

from reference_model.data.datasets import read
from reference_model.data.images import open_image
from reference_model.data.readers.reader import Reader
from reference_model.data.records import Record
from reference_model.files import InputError, refuse_unwritable, written_whole
from reference_model.viewing.config import ShowConfig
from reference_model.viewing.overlay import TRUTH, captioned, overlay

SIDE = 320
"""Of the square that an image is fitted into, pixels."""
LONGEST = 300
"""Characters of a sentence that are shown."""


def show(config: ShowConfig) -> Path:
    """Run the command ``data show`` and return the picture it wrote.

    Raises:
        InputError: The data or the place to write cannot be used, or a sample is broken and none is skipped.
    """
    if not 1 <= config.count <= 200:
        raise InputError(f"count: must be in [1, 200], got {config.count}")
    if config.out.suffix.lower() != ".png":
        raise InputError(f"out {config.out}: must name a PNG file, such as samples.png")
    refuse_unwritable(config.out)
    reader = read(config.data)
    tiles = []
    for record in tqdm(
        evenly_spaced(reader, config.split, config.count),
        desc="show",
        total=config.count,
        unit="sample",
        leave=False,
        disable=None,
    ):
        try:
            tiles.append(tile(record))
        except InputError as error:
            if config.data.on_error == "stop":
                raise
            warnings.warn(f"{error}; left out", stacklevel=2)
    if not tiles:
        raise InputError(f"{reader.source}: no sample of {config.split} can be drawn; see metris data check")
    with written_whole(config.out) as fresh:
        page(tiles).save(fresh, format="PNG")
    said = {"picture": str(config.out), "samples": len(tiles), "split": config.split}
    line = f"{config.out}: {len(tiles)} samples of {config.split}"
    print(json.dumps(said) if config.json else line)
    return config.out


def evenly_spaced(reader: Reader, split: str, count: int) -> Iterator[Record]:
    """Yield ``count`` records of a split (all, where it has no more), read once and none of them held."""
    size = reader.splits.get(split)
    if size is None:  # a part by classes, which nobody has counted, or no split at all
        size = sum(1 for _ in reader.stream(split))
    picked = set(np.linspace(0, size - 1, min(count, size)).round().astype(int).tolist())
    for number, record in enumerate(reader.stream(split)):
        if number in picked:
            yield record


def tile(record: Record) -> Image.Image:
    """Draw one sample: ids above, what it refers to outlined and the rest dimmed, the sentence below.

    Raises:
        InputError: Image or mask cannot be read.
    """
    image = open_image(record.image, height_width=(record.height, record.width), name=record.image_name)
    mask = Image.fromarray(record.mask())
    scale = SIDE / max(image.size)
    w, h = (max(1, round(side * scale)) for side in image.size)
    # Drawn at its final size: an outline of a huge photo would vanish when that is reduced.
    small = np.asarray(mask.resize((w, h), Image.Resampling.NEAREST))
    drawn = overlay(image.resize((w, h)), small, colour=TRUTH, dim=False)
    square = Image.new("RGB", (SIDE, SIDE), "white")
    square.paste(drawn, ((SIDE - w) // 2, (SIDE - h) // 2))
    title = f"{record.split}, ref {record.ref_id}, sentence {record.sent_id}"
    title += ": no target" * record.no_target
    return captioned([(square, title)], shorten(record.expression, LONGEST, placeholder=" ..."))


def page(tiles: list[Image.Image]) -> Image.Image:
    """Set tiles of one width in rows, about as many a row as there are rows."""
    columns = round(len(tiles) ** 0.5)
    rows = [tiles[start : start + columns] for start in range(0, len(tiles), columns)]
    heights = [max(one.height for one in row) for row in rows]
    width = tiles[0].width
    sheet = Image.new("RGB", (columns * width, sum(heights)), "white")
    for i, row in enumerate(rows):
        for j, one in enumerate(row):
            sheet.paste(one, (j * width, sum(heights[:i])))
    return sheet
