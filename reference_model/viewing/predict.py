"""Predict masks of one's own image, or of samples of a data set, and draw them."""

import json
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from reference_model.checkpoints.checkpoint import Checkpoint
from reference_model.checkpoints.hub import load
from reference_model.configs import check_bounds
from reference_model.data.datasets import read
from reference_model.data.images import open_image
from reference_model.files import InputError, refuse_unwritable, written_whole
from reference_model.scoring.outcome import outcome
from reference_model.scoring.table import aligned
from reference_model.tokens import tokenize
from reference_model.viewing.config import PredictConfig
from reference_model.viewing.explain import unknown_words
from reference_model.viewing.jobs import Job, jobs
from reference_model.viewing.overlay import TRUTH, captioned, overlay
from reference_model.viewing.runs import image_of, tell_left_out


def predict(config: PredictConfig) -> list[Path]:
    """Run the command ``predict`` and return the files it wrote.

    Raises:
        InputError: The checkpoint, image, sentence, data or place to write cannot be used.
    """
    check_bounds(config)
    config.check()
    many = None if config.image is None else jobs(config.image, config.expression)
    single = config.data is None and many is None
    if config.out is None:
        config = replace(config, out=Path("mask.png" if single else "masks"))
    if many is not None:
        refuse_unwritable(config.out / "mask.png")
    checkpoint = load(config.checkpoint, device=config.device)
    if config.data is not None:
        entries = _of_samples(config, checkpoint)
    elif many is not None:
        entries = _of_many(config, checkpoint, many)
    else:
        entries = _predicted(config, checkpoint, open_image(config.image), config.expression)
    if config.json:
        print(json.dumps(entries, indent=2))
    else:
        print(_table(entries))
    return [Path(entry[key]) for entry in entries for key in ("mask", "overlay") if key in entry]


def _predicted(
    config: PredictConfig, checkpoint: Checkpoint, image: Image.Image, expressions: list[str]
) -> list[dict]:
    unknown = list(dict.fromkeys(w for sentence in expressions for w in unknown_words(checkpoint, sentence)))
    if unknown:
        warnings.warn(f"words that this model never learnt: {', '.join(unknown)}", stacklevel=2)
    found = _answers(config, checkpoint, image, expressions)
    entries = []
    for number, (expression, (mask, absent)) in enumerate(zip(expressions, found, strict=True), start=1):
        stem = config.out.stem if len(found) == 1 else f"{config.out.stem}_{number}"
        mask_file = config.out.with_name(f"{stem}.png")
        overlay_file = config.out.with_name(f"{stem}_overlay.png")
        _save(Image.fromarray(mask.astype(np.uint8) * 255), mask_file)
        panels = [(image, "image"), (overlay(image, mask), _title(config, absent, "prediction"))]
        _save(captioned(panels, expression), overlay_file)
        entry = {"expression": expression, "mask": str(mask_file), "overlay": str(overlay_file)}
        entries.append(entry | {"area": round(float(mask.mean()), 4)} | _probability(absent))
    return entries


def _of_many(config: PredictConfig, checkpoint: Checkpoint, many: list[Job]) -> list[dict]:
    """Predict on many images; one that cannot be read, or whose sentences have no word, is left out."""
    entries = []
    for number, job in enumerate(
        tqdm(many, desc="predict", unit="image", leave=False, disable=None), start=1
    ):
        stem = job.image.stem.encode()[:200].decode(errors="ignore")  # a name of a file has 255 bytes at most
        out = config.out / f"{number:0{len(str(len(many)))}d}_{stem}.png"
        try:  # around these two alone: what ails the model or the disk ails all images
            image = open_image(job.image)
            tokenize(checkpoint.tokenizer, job.expressions, checkpoint.config.max_tokens, warn=False)
        except InputError as error:
            warnings.warn(f"{error}; left out", stacklevel=2)
            continue
        found = _predicted(replace(config, out=out), checkpoint, image, job.expressions)
        entries += [{"image": str(job.image)} | entry for entry in found]
    if not entries:
        raise InputError(f"image {config.image}: none of its {len(many)} images can be used; mend them")
    return entries


def _table(entries: list[dict]) -> str:
    """Lay entries out, a column for each key that one of them has."""
    keys = list(dict.fromkeys(key for entry in entries for key in entry))
    rows = [[str(entry.get(key, "")) for key in keys] for entry in entries]
    return aligned([keys, *rows], left=len(keys))


def _of_samples(config: PredictConfig, checkpoint: Checkpoint) -> list[dict]:
    if config.count < 1:
        raise InputError(f"count: must be >= 1, got {config.count}")
    reader = read(config.data)
    records = reader.records(config.split)
    picked = np.linspace(0, len(records) - 1, min(config.count, len(records))).round().astype(int)
    entries = []
    defects = []
    for number, i in enumerate(
        tqdm(picked, desc="predict", unit="sample", leave=False, disable=None), start=1
    ):
        record = records[i]
        try:
            image, truth = image_of(record), record.mask()
        except InputError as error:
            if reader.on_error == "stop":
                raise
            defects.append(str(error))
            continue
        ((mask, absent),) = _answers(config, checkpoint, image, [record.expression])
        # As gIoU has it: an empty mask is all right where there is no target.
        iou = float(not mask.any()) if record.no_target else outcome(mask, truth).iou
        panels = [
            (image, "image"),
            (overlay(image, truth, colour=TRUTH), "truth: no target" if record.no_target else "truth"),
            (overlay(image, mask), _title(config, absent, f"prediction, IoU {iou:.2f}")),
        ]
        path = config.out / f"{config.split}_{number:02d}.png"
        _save(captioned(panels, record.expression), path)
        entry = {"expression": record.expression, "overlay": str(path), "iou": round(iou, 4)}
        entries.append(entry | _probability(absent))
    tell_left_out(defects, len(picked), "samples")
    return entries


def _answers(
    config: PredictConfig, checkpoint: Checkpoint, image: Image.Image, expressions: list[str]
) -> list[tuple[np.ndarray, float | None]]:
    """Give the mask of each sentence, and the probability that nothing is meant."""
    cuts = {"threshold": config.threshold, "no_target_threshold": config.no_target_threshold}
    found = checkpoint.predict(image, expressions, **cuts, return_scores=True)
    absent = [None] * len(expressions) if found.no_target is None else found.no_target.tolist()
    return list(zip(found.masks, absent))


def _title(config: PredictConfig, absent: float | None, usual: str) -> str:
    if absent is None or absent <= config.no_target_threshold:
        return usual
    return f"prediction: no target ({absent:.2f})"


def _probability(absent: float | None) -> dict[str, float]:
    return {} if absent is None else {"no_target": round(absent, 4)}


def _save(image: Image.Image, path: Path) -> None:
    with written_whole(path) as fresh:
        image.save(fresh, format="PNG")
