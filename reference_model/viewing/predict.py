"""Predict masks of one's own image, or of samples of a data set, and draw them."""

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from reference_model.data.collate import tokenize
from reference_model.data.refer import Refer
from reference_model.data.transforms import image_tensor, open_image
from reference_model.files import InputError, refuse_unwritable, written_whole
from reference_model.model.checkpoint import Checkpoint, load_checkpoint, pick_device
from reference_model.scoring.evaluate import mask_at
from reference_model.scoring.metrics import SegmentationMetrics
from reference_model.viewing.config import PredictConfig
from reference_model.viewing.overlay import TRUTH, captioned, overlay


def predict_masks(
    checkpoint: Checkpoint, image: Image.Image, expressions: list[str], *, threshold: float = 0.5
) -> list[np.ndarray]:
    """Predict one mask per sentence; the image is encoded once.

    Args:
        checkpoint: A loaded model.
        image: RGB image of any size.
        expressions: k sentences.
        threshold: Probability above which a pixel belongs to the mask, in (0, 1).

    Returns:
        k bool masks (height, width), the image's own size.

    Raises:
        InputError: A sentence has no word.
    """
    model, device = checkpoint.model, next(checkpoint.model.parameters()).device
    tokens = tokenize(checkpoint.tokenizer, expressions, checkpoint.config.max_tokens)
    pixels = image_tensor(image, checkpoint.config.image_size)[None].to(device)
    index = torch.zeros(len(expressions), dtype=torch.long, device=device)
    with torch.inference_mode():
        output = model(pixels, tokens.token_ids.to(device), tokens.language_mask.to(device), index)
    return [mask_at(logits, image.height, image.width, threshold=threshold) for logits in output.logits]


def predict(config: PredictConfig) -> list[Path]:
    """Run the command ``predict`` and return the files it wrote.

    Raises:
        InputError: The checkpoint, image, sentence, data or place to write cannot be used.
    """
    if not 0 < config.threshold < 1:
        raise InputError(f"threshold: must be in (0, 1), got {config.threshold:g}; 0.5 is usual")
    if config.data is None and (config.image is None or not config.expression):
        raise InputError('predict: give --image and --expression "the red boat", or --data.root and --split')
    if config.data is not None and config.image is not None:
        raise InputError("predict: got --image and --data, expected one of them")
    if config.data is None:
        if not config.out.name or config.out.name == ".." or config.out.suffix.lower() not in ("", ".png"):
            raise InputError(f"out {config.out}: must name a PNG file, such as mask.png")
        if config.image.resolve() == config.out.with_suffix(".png").resolve():
            raise InputError(f"out {config.out}: is the image itself; choose another name")
        refuse_unwritable(config.out.with_suffix(".png"))
    checkpoint = load_checkpoint(config.checkpoint, device=pick_device(config.device))
    entries = _of_samples(config, checkpoint) if config.data is not None else _of_image(config, checkpoint)
    if config.json:
        print(json.dumps(entries, indent=2))
    for entry in () if config.json else entries:
        print("  ".join(f"{key}: {value}" for key, value in entry.items()))
    return [Path(entry[key]) for entry in entries for key in ("mask", "overlay") if key in entry]


def _of_image(config: PredictConfig, checkpoint: Checkpoint) -> list[dict]:
    image, expressions = open_image(config.image), config.expression
    masks = predict_masks(checkpoint, image, expressions, threshold=config.threshold)
    entries = []
    for number, (expression, mask) in enumerate(zip(expressions, masks, strict=True), start=1):
        stem = config.out.stem if len(masks) == 1 else f"{config.out.stem}_{number}"
        mask_file = config.out.with_name(f"{stem}.png")
        overlay_file = config.out.with_name(f"{stem}_overlay.png")
        _save(Image.fromarray(mask.astype(np.uint8) * 255), mask_file)
        _save(captioned([(image, "image"), (overlay(image, mask), "prediction")], expression), overlay_file)
        share = round(float(mask.mean()), 4)
        entries.append(
            {"expression": expression, "mask": str(mask_file), "overlay": str(overlay_file), "area": share}
        )
    return entries


def _of_samples(config: PredictConfig, checkpoint: Checkpoint) -> list[dict]:
    if config.count < 1:
        raise InputError(f"count: must be >= 1, got {config.count}")
    records = Refer(config.data.root, config.data.dataset, config.data.split_by).records(config.split)
    picked = np.linspace(0, len(records) - 1, min(config.count, len(records))).round().astype(int)
    entries = []
    for number, i in enumerate(
        tqdm(picked, desc="predict", unit="sample", leave=False, disable=None), start=1
    ):
        record = records[i]
        image, truth = open_image(record.image, height_width=(record.height, record.width)), record.mask()
        (mask,) = predict_masks(checkpoint, image, [record.expression], threshold=config.threshold)
        iou = SegmentationMetrics().update(mask, truth)
        panels = [
            (image, "image"),
            (overlay(image, truth, colour=TRUTH), "truth"),
            (overlay(image, mask), f"prediction, IoU {iou:.2f}"),
        ]
        path = config.out / f"{config.split}_{number:02d}.png"
        _save(captioned(panels, record.expression), path)
        entries.append({"expression": record.expression, "overlay": str(path), "iou": round(iou, 4)})
    return entries


def _save(image: Image.Image, path: Path) -> None:
    with written_whole(path) as fresh:
        image.save(fresh, format="PNG")
