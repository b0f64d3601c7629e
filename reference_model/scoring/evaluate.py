"""Score a model, and what needs no model, on the splits of a data set."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from reference_model.data.collate import Collate, ReferringDataset, report_overlong
from reference_model.data.readers import read
from reference_model.data.records import Record
from reference_model.data.refer import Refer
from reference_model.data.transforms import resize_mask
from reference_model.files import InputError, refuse_unwritable, written_whole
from reference_model.model.checkpoint import load_checkpoint, pick_device
from reference_model.model.metris import METRIS, MetrisOutput
from reference_model.scoring.baselines import largest_object, mean_mask_baseline
from reference_model.scoring.config import EvaluateConfig
from reference_model.scoring.metrics import SegmentationMetrics

Scores = dict[str, float]


class Prediction(NamedTuple):
    """What a model answers to one sentence."""

    mask: np.ndarray
    """(height, width) bool, the image's own size."""
    no_target: float | None
    """Probability that nothing in the image is meant, 0 to 1; None from a model without that classifier."""


@dataclass(frozen=True)
class Evaluator:
    """How to feed records to a model; one for a whole run.

    Args:
        tokenizer: The model's.
        image_size: Side of the square that images are resized to, pixels.
        max_tokens: Longest sentence, tokens.
        batch_size: Sentences per forward pass.
        workers: Processes that load batches; 0 loads in this one.
        threshold: Probability above which a pixel belongs to the mask, in (0, 1).
        no_target_threshold: Probability of "no target" above which the mask is empty, in (0, 1).
        device: Where the model is.
    """

    tokenizer: PreTrainedTokenizerBase
    image_size: int
    max_tokens: int
    batch_size: int = 32
    workers: int = 0
    threshold: float = 0.5
    no_target_threshold: float = 0.5
    device: torch.device | str = "cpu"

    def score(self, model: METRIS, records: Sequence[Record], *, title: str = "evaluate") -> Scores:
        """Score a model on records; sentences of an image go together, so that it is encoded once a batch.

        gIoU, cIoU, N-acc and T-acc are among the scores where a record has no target.
        """
        records = sorted(records, key=lambda record: (record.image, record.ref_id, record.sent_id))
        loader = DataLoader(
            ReferringDataset(records, self.image_size),
            batch_size=self.batch_size,
            collate_fn=Collate(self.tokenizer, self.max_tokens),
            num_workers=self.workers,
        )
        metrics = SegmentationMetrics(no_target=any(record.no_target for record in records))
        training = model.training
        model.eval()
        for batch in tqdm(loader, desc=title, unit="batch", leave=False, disable=None):
            batch = batch.to(self.device)
            with torch.inference_mode():
                output = model(batch.images, batch.token_ids, batch.language_mask, batch.image_index)
            found = predictions(
                output,
                [(record.height, record.width) for record in batch.records],
                threshold=self.threshold,
                no_target_threshold=self.no_target_threshold,
            )
            for record, prediction in zip(batch.records, found, strict=True):
                metrics.update(prediction.mask, record.mask())
        model.train(training)
        return metrics.compute()


def predictions(
    output: MetrisOutput,
    sizes: Sequence[tuple[int, int]],
    *,
    threshold: float = 0.5,
    no_target_threshold: float = 0.5,
) -> list[Prediction]:
    """Turn the output of a model about b sentences into masks, for scores and pictures alike.

    Args:
        output: Of the model.
        sizes: b heights and widths, those of the images themselves, pixels.
        threshold: Probability above which a pixel belongs to the mask, in (0, 1).
        no_target_threshold: Probability of "no target" above which the mask is empty, in (0, 1).
    """
    found = []
    for i, (height, width) in enumerate(sizes):
        absent = None if output.no_target is None else output.no_target[i].float().sigmoid().item()
        if absent is not None and absent > no_target_threshold:
            mask = np.zeros((height, width), dtype=bool)
        else:
            mask = mask_at(output.logits[i], height, width, threshold=threshold)
        found.append(Prediction(mask, absent))
    return found


def mask_at(logits: torch.Tensor, height: int, width: int, *, threshold: float = 0.5) -> np.ndarray:
    """Bring (h, w) logits to (height, width), the image's own size, bilinearly; True above ``threshold``."""
    resized = F.interpolate(logits[None, None].float(), (height, width), mode="bilinear", align_corners=False)
    return (resized[0, 0].sigmoid() > threshold).cpu().numpy()


def score_baselines(data: Refer, records: Sequence[Record], mean_mask: np.ndarray) -> dict[str, Scores]:
    """Score the mean training mask and the largest object on records; neither reads the sentence."""
    no_target = any(record.no_target for record in records)
    by_mean, by_size = (SegmentationMetrics(no_target=no_target) for _ in range(2))
    for record in records:
        truth = record.mask()
        by_mean.update(resize_mask(mean_mask, record.height, record.width), truth)
        by_size.update(largest_object(data.annotations(record.image_id), record.height, record.width), truth)
    return {"mean training mask": by_mean.compute(), "largest object": by_size.compute()}


def table(scores: dict[str, dict[str, Scores]]) -> str:
    """Lay out {split: {what: scores}} for a person, in per cent."""
    keys = ["mIoU", "oIoU", "P@0.5", "P@0.7", "P@0.9"]
    if any("gIoU" in score for by_name in scores.values() for score in by_name.values()):
        keys += ["gIoU", "cIoU", "N-acc", "T-acc"]
    rows = [["split", "prediction", *keys, "sentences"]]
    for split, by_name in scores.items():
        for name, score in by_name.items():
            cells = (f"{100 * score[key]:.2f}" if key in score else "-" for key in keys)
            rows.append([split, name, *cells, str(score["count"])])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    line = lambda row: "  ".join(
        cell.ljust(width) if i < 2 else cell.rjust(width) for i, (cell, width) in enumerate(zip(row, widths))
    )
    return "\n".join(map(line, rows))


def evaluate(config: EvaluateConfig) -> dict[str, dict[str, Scores]]:
    """Run the command ``evaluate``: {split: {"METRIS": scores, baseline: scores}}, fractions 0 to 1.

    Raises:
        InputError: The checkpoint or the data cannot be used, or a threshold is outside (0, 1).
    """
    if config.batch_size < 1:
        raise InputError(f"batch_size: must be >= 1, got {config.batch_size}")
    if config.data.workers < 0:
        raise InputError(f"data.workers: must be >= 0, got {config.data.workers}")
    for name in ("threshold", "no_target_threshold"):
        if not 0 < getattr(config, name) < 1:
            raise InputError(f"{name}: must be in (0, 1), got {getattr(config, name):g}; 0.5 is usual")
    device = pick_device(config.device)
    data = read(config.data)
    records = {split: data.records(split) for split in config.splits.split(",")}
    train = data.records("train") if config.baselines else []
    out = config.out or config.checkpoint / "metrics.json"
    checkpoint = load_checkpoint(config.checkpoint, device=device)
    refuse_unwritable(out)
    report_overlong(
        checkpoint.tokenizer, [r for found in records.values() for r in found], checkpoint.config.max_tokens
    )
    evaluator = Evaluator(
        checkpoint.tokenizer,
        image_size=checkpoint.config.image_size,
        max_tokens=checkpoint.config.max_tokens,
        batch_size=config.batch_size,
        workers=config.data.workers,
        threshold=config.threshold,
        no_target_threshold=config.no_target_threshold,
        device=device,
    )
    scores = {
        split: {"METRIS": evaluator.score(checkpoint.model, found, title=split)}
        for split, found in records.items()
    }
    if config.baselines:
        mean_mask = mean_mask_baseline(train, checkpoint.config.image_size)
        for split, found in records.items():
            scores[split] |= score_baselines(data, found, mean_mask)

    with written_whole(out) as path:
        path.write_text(json.dumps(scores, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(scores, indent=2) if config.json else table(scores))
    print(f"metrics: {out}", file=sys.stderr if config.json else sys.stdout)
    return scores
