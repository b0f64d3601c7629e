"""What one visitor of the page has open: an image, sentences, answers, and the pictures and files of them."""

import functools
import html
import json
import shutil
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

from reference_model.checkpoints.checkpoint import Checkpoint
from reference_model.data.images import open_image
from reference_model.data.readers.reader import LONGEST_SENTENCE
from reference_model.figures import COLOURS, TRUTH, dimmed, heated, spread, tinted
from reference_model.files import InputError
from reference_model.viewing.explain import Encoded, Explanation, encode, explain
from reference_model.viewing.runs import picture

PALETTE = (*COLOURS, TRUTH)
LEAST, SIDE, TILE = 480, 768, 256
"""Longest side of the picture with masks, at least and at most, and of a tile, pixels."""
MAPS = ("relevance", "curated tokens", "attention to LE", "attention to VE")


class Cut(NamedTuple):
    """The answers at one threshold."""

    shown: np.ndarray
    """(h, w, 3) uint8, the image at the size at which it is shown."""
    masks: list[np.ndarray]
    """(h, w) bool of each sentence, at that size."""
    rows: list[dict[str, Any]]
    """Sentence, score, area and probability of no target."""
    files: list[str]
    """To download: masks as PNG or a zip of several, as COCO's RLE, and as JSON with the scores."""


@dataclass
class Session:
    """What one visitor has open."""

    source: str | None = None
    """The file of the image. It may be gone: what is below does not need it any more."""
    encoded: Encoded | None = None
    """Of the file; sentences and r may change without another look at it."""
    sentences: list[str] = field(default_factory=list)
    found: list[Explanation] = field(default_factory=list)
    ratio: float | None = None
    folder: str | None = None
    """Where the files to download are."""
    cut: Cut | None = None

    def forget(self) -> None:
        """Remove the files."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)


def asked(
    checkpoint: Checkpoint, source: str | None, lines: str, ratio: float | None, before: Session
) -> Session:
    """Refer to an image; it is read and encoded only if it is another one than before.

    Args:
        checkpoint: A loaded model.
        source: File of the image; its name changes with what is in it, as that of an upload does.
        lines: Sentences, one a line.
        ratio: r. None: the model's own.
        before: What was open.

    Raises:
        InputError: There is no image or sentence, or they cannot be used.
    """
    sentences = [line.strip() for line in (lines or "").splitlines() if line.strip()]
    if source is None:
        raise InputError("There is no image yet: drop one above, or pick an example.")
    if not sentences:
        raise InputError("There is no sentence yet: write what to look for, one sentence a line.")
    if len(sentences) > len(PALETTE):
        raise InputError(f"{len(sentences)} sentences, but there are {len(PALETTE)} colours: leave some out.")
    if max(map(len, sentences)) > LONGEST_SENTENCE:
        raise InputError(f"A sentence is longer than {LONGEST_SENTENCE} characters: shorten it.")
    encoded = before.encoded
    if encoded is None or source != before.source:
        path = Path(source)
        try:
            file = path.read_bytes()
        except FileNotFoundError as error:
            raise InputError(
                "The image is no longer here, so long was this page open: remove it above and drop it again."
            ) from error
        encoded = encode(checkpoint, open_image(file, name=path.name))
    found = explain(checkpoint, encoded, sentences, ratio=ratio)
    folder = before.folder or tempfile.mkdtemp(dir=_room().name)
    return Session(source, encoded, sentences, found, ratio, folder)


@functools.cache
def _room() -> "tempfile.TemporaryDirectory[str]":
    """Where all sessions keep their files; removed when the program ends, with pages still open too."""
    return tempfile.TemporaryDirectory(prefix="metris-app-")


def cut_at(session: Session, threshold: float) -> Cut:
    """Make masks at a threshold and write the files to download; kept in the session."""
    image = session.encoded.image
    shown = _at_least(picture(image, side=SIDE), LEAST)
    whole = [_mask(found, image.height, image.width, threshold) for found in session.found]
    small = [
        np.asarray(Image.fromarray(mask).resize(shown.shape[1::-1], Image.Resampling.NEAREST))
        for mask in whole
    ]
    rows = [
        {
            "sentence": found.expression,
            "score": round(found.confidence(threshold=threshold), 4) if mask.any() else 0.0,
            "area": round(float(mask.mean()), 6),
            "no_target": None if found.no_target is None else round(found.no_target, 4),
        }
        for found, mask in zip(session.found, whole)
    ]
    settings = {"threshold": threshold, "ratio": session.ratio}
    session.cut = Cut(shown, small, rows, _written(Path(session.folder), whole, rows, settings))
    return session.cut


def painted(cut: Cut, opacity: float) -> Image.Image:
    """Lay each mask over the image in its colour."""
    shown = cut.shown
    for mask, colour in zip(cut.masks, PALETTE):
        shown = tinted(shown, mask, colour, opacity=opacity)
    return Image.fromarray(shown)


def legend(rows: Sequence[dict[str, Any]]) -> str:
    """Say in HTML which colour is which sentence, and its score."""
    lines = []
    for row, (red, green, blue) in zip(rows, PALETTE):
        chip = f'<span style="background:rgb({red},{green},{blue});padding:0 .7em;margin-right:.6em"></span>'
        absent = "" if row["no_target"] is None else f", no target {row['no_target']:.2f}"
        said = f"score {row['score']:.2f}, {row['area']:.1%} of the image" if row["area"] else "nothing found"
        lines.append(f"<div>{chip}<b>{html.escape(row['sentence'])}</b> · {said}{absent}</div>")
    note = "Score: mean probability of the pixels inside the mask."
    return "".join(lines) + f"<small>{note}</small>"


def tiles(encoded: Encoded, found: Explanation, kind: str) -> tuple[str, list[tuple[Image.Image, str]]]:
    """Draw one of `MAPS` of a sentence: what is to be said of it, and a picture with its label for each word.

    A word without a visual expression token has no picture among those of VE.
    """
    image = _at_least(picture(encoded.image, side=TILE), TILE)
    if kind == "curated tokens":
        if found.curated is None:
            return "This model has no visual expression: it curates nothing.", []
        drawn = [dimmed(image, spread(row, *image.shape[:2])) for row in found.curated]
        labels = [f"{t}: {int(row.sum())} of {row.size}" for t, row in zip(found.tokens, found.curated)]
        said = "Bright: the visual tokens that the word curates, the r with the highest relevance (Eq. 3)."
        return said, [(Image.fromarray(tile), label) for tile, label in zip(drawn, labels)]
    maps, words = {
        "relevance": (found.scores, found.tokens),
        "attention to LE": (found.to_language and found.to_language[-1], found.tokens),
        "attention to VE": (found.to_visual and found.to_visual[-1], found.visual_tokens),
    }[kind]
    if maps is None:
        return f"This model has no {kind}.", []
    if not len(maps):
        return "No word of this sentence has a visual expression token.", []
    low, high = float(maps.min()), float(maps.max())
    said = f"Dark blue is {low:.2f}, yellow {high:.2f}: "
    if kind == "relevance":
        said += "cosine of each visual token with the word (Eq. 2)."
    else:
        given = {"LE": found.to_language, "VE": found.to_visual}
        sums = {name: float(to[-1].sum(axis=0).mean()) for name, to in given.items() if to is not None}
        said += f"share of a pixel's attention in the finest decoder stage; {' and '.join(sums)} "
        whole = sum(sums.values())
        said += "add up to 1." if whole > 0.999 else f"get {whole:.0%} of it, visual tokens the rest."
    labels = [f"{t}: {row.min():.2f} to {row.max():.2f}" for t, row in zip(words, maps)]
    return said, [(Image.fromarray(heated(image, row, low, high)), label) for row, label in zip(maps, labels)]


def _at_least(image: np.ndarray, side: int) -> np.ndarray:
    """Enlarge (h, w, 3) uint8 whose longest side is below ``side`` pixels: a small one can then be seen."""
    scale = side / max(image.shape[:2])
    if scale <= 1:
        return image
    h, w = (max(1, round(length * scale)) for length in image.shape[:2])
    return np.asarray(Image.fromarray(image).resize((w, h), Image.Resampling.NEAREST))


def _mask(found: Explanation, height: int, width: int, threshold: float) -> np.ndarray:
    mask = found.mask(height, width, threshold=threshold)
    return np.zeros_like(mask) if found.no_target is not None and found.no_target > 0.5 else mask


def _written(
    folder: Path, masks: Sequence[np.ndarray], rows: Sequence[dict[str, Any]], settings: dict[str, Any]
) -> list[str]:
    """Write masks as PNG (a zip of several), as COCO's RLE, and as JSON with the scores."""
    names = [f"mask_{number}.png" for number in range(1, len(masks) + 1)]
    for name, mask in zip(names, masks):
        Image.fromarray(mask.astype(np.uint8) * 255).save(folder / name)
    pictures = folder / names[0]
    if len(names) > 1:
        pictures = folder / "masks.zip"
        with zipfile.ZipFile(pictures, "w") as archive:
            for name in names:
                archive.write(folder / name, name)
    coded = [coco_mask.encode(np.asfortranarray(mask.view(np.uint8))) for mask in masks]
    runs = [{"size": list(x["size"]), "counts": x["counts"].decode("ascii")} for x in coded]
    (folder / "masks_rle.json").write_text(json.dumps(runs), encoding="utf-8")
    answers = [row | {"mask": name, "rle": run} for row, name, run in zip(rows, names, runs)]
    plain = json.dumps(settings | {"answers": answers}, indent=2, ensure_ascii=False)
    (folder / "answers.json").write_text(plain, encoding="utf-8")
    return [str(pictures), str(folder / "masks_rle.json"), str(folder / "answers.json")]
