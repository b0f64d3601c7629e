"""Score METRIS, any other model, or a file of masks, and what needs no model, on the splits of a data set."""

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TextIO

from reference_model.data.collate import report_overlong
from reference_model.data.layouts import read
from reference_model.data.reader import Reader
from reference_model.data.records import Record
from reference_model.files import InputError, refuse_unwritable, written_whole
from reference_model.model.checkpoint import GENERATED, load_checkpoint, pick_device
from reference_model.scoring.baselines import evenly, mean_mask_baseline, score_baselines
from reference_model.scoring.breakdowns import Breakdown
from reference_model.scoring.config import EvaluateConfig
from reference_model.scoring.curves import Curve, PrecisionRecall
from reference_model.scoring.evaluator import Evaluator, Scores, computed
from reference_model.scoring.metrics import SegmentationMetrics
from reference_model.scoring.metris_predictor import MetrisPredictor
from reference_model.scoring.predictors import CallablePredictor, FilePredictor, Predictor, callable_from
from reference_model.scoring.protocols import PROTOCOLS, Protocol
from reference_model.scoring.results import Predictions, write_row
from reference_model.scoring.table import score_table


@dataclass(frozen=True)
class Stream:
    """A split whose records are never listed."""

    reader: Reader
    split: str

    def __iter__(self) -> Iterator[Record]:
        return self.reader.stream(self.split)


def evaluate(config: EvaluateConfig) -> dict[str, dict[str, Scores]]:
    """Run the command ``evaluate``: {split: {"METRIS": scores, baseline: scores}}, fractions 0 to 1.

    Another model or a file stands under its own name. Among the scores of each are ``evaluation``, which says
    what was scored and how, and, if asked for, ``intervals``, ``by category`` and ``by length``. The
    precision-recall curves go to a file of their own, NAME_curves.json beside ``out``.

    Raises:
        InputError: The model, the predictions or the data cannot be used, or a value is out of its range.
    """
    protocol = _checked(config)
    device = pick_device(config.device)
    reader = read(config.data)
    splits = {}
    for split in config.splits.split(","):
        splits[split] = Stream(reader, split) if reader.streamed else reader.records(split)
        if next(iter(splits[split]), None) is None:  # of a stream, this finds wrong names before long work
            raise InputError(f"{reader.source}: split {split!r} has no records; choose another")
    for path in (out := _out(config), config.results):
        if path is not None:
            refuse_unwritable(path)
    name, predictor = _predictor(config, splits, device)
    mean_mask = None
    if config.baselines:
        train = evenly(Stream(reader, "train"), reader.splits.get("train", 0))
        mean_mask = mean_mask_baseline(train, getattr(predictor, "image_size", protocol.size or 480))

    found: dict[str, dict[str, Scores]] = {}
    curves: dict[str, Curve] = {}
    with ExitStack() as stack:
        rows = None
        if config.results is not None:
            path = stack.enter_context(written_whole(config.results))
            rows = stack.enter_context(path.open("w", encoding="utf-8"))
        for split, records in splits.items():
            result, curve = _scored(config, protocol, reader, predictor, split, records, rows)
            found[split] = {name: result}
            if curve is not None:
                curves[split] = curve
            if mean_mask is not None:
                found[split] |= score_baselines(reader, records, mean_mask, protocol)

    _write(found, curves, out)
    print(json.dumps(found, indent=2) if config.json else f"{score_table(found)}\nprotocol {protocol}")
    aside = sys.stderr if config.json else sys.stdout
    for what, path in (("metrics", out), ("results", config.results)):
        if path is not None:
            print(f"{what}: {path}", file=aside)
    return found


def _scored(
    config: EvaluateConfig,
    protocol: Protocol,
    reader: Reader,
    predictor: Predictor,
    split: str,
    records: Iterable[Record],
    rows: TextIO | None,
) -> tuple[Scores, Curve | None]:
    """Score one split, and write its results."""
    evaluator = Evaluator(protocol, config.no_target_threshold, config.data.on_error)
    metrics, curve = SegmentationMetrics(protocol), PrecisionRecall()
    breakdown = Breakdown(protocol, reader.categories)
    total = reader.splits.get(split)
    for scored in evaluator.outcomes(predictor, records, metrics, curve, title=split, total=total):
        breakdown.add(scored.record, scored.outcome)
        if rows is not None:
            write_row(rows, scored.record, scored.outcome, scored.mask, protocol, scored.no_target)
    if not metrics.tallies[0]:
        raise InputError(f"{reader.source}: nothing of split {split!r} could be decoded; mend the data")
    result = computed(metrics)
    found = computed(curve) if curve.histogram.any() else None
    if found is not None:
        result["AUC-PR"] = found.area
    result["evaluation"] = _provenance(config, reader, protocol)
    return result | breakdown.scores(intervals=config.intervals, groups=config.breakdowns), found


def _checked(config: EvaluateConfig) -> Protocol:
    """Refuse values out of their range, and give the protocol."""
    given = [key for key in ("checkpoint", "model", "predictions") if getattr(config, key) is not None]
    if len(given) != 1:
        got = f"got {' and '.join(given)}" if given else "got none"
        raise InputError(f"evaluate: give one of --checkpoint, --model or --predictions, {got}")
    if config.batch_size < 1:
        raise InputError(f"batch_size: must be >= 1, got {config.batch_size}")
    if config.data.workers < 0:
        raise InputError(f"data.workers: must be >= 0, got {config.data.workers}")
    protocol = PROTOCOLS[config.protocol]
    if config.threshold is not None:
        protocol = replace(protocol, threshold=config.threshold)
    if config.sentences is not None:
        protocol = replace(protocol, sentences=config.sentences)
    for name, value in (("threshold", protocol.cutoff), ("no_target_threshold", config.no_target_threshold)):
        if not 0 < value < 1:
            raise InputError(f"{name}: must be in (0, 1), got {value:g}; 0.5 is usual")
    return protocol


def _out(config: EvaluateConfig) -> Path | None:
    if config.out is None and config.checkpoint is not None:
        return config.checkpoint / "metrics.json"
    return config.out


def _predictor(
    config: EvaluateConfig, splits: dict[str, Iterable[Record]], device: Any
) -> tuple[str, Predictor]:
    """Load what is scored, and name it."""
    if config.model is not None:
        return config.model, CallablePredictor(
            callable_from(config.model), config.model, config.data.on_error
        )
    if config.predictions is not None:
        return config.predictions.name, FilePredictor(Predictions(config.predictions))
    checkpoint = load_checkpoint(config.checkpoint, device=device)
    listed = [record for found in splits.values() if isinstance(found, Sequence) for record in found]
    if listed:
        report_overlong(checkpoint.tokenizer, listed, checkpoint.config.max_tokens)
    return "METRIS", MetrisPredictor(
        checkpoint.model,
        checkpoint.tokenizer,
        image_size=checkpoint.config.image_size,
        max_tokens=checkpoint.config.max_tokens,
        batch_size=config.batch_size,
        workers=config.data.workers,
        device=device,
        on_error=config.data.on_error,
    )


def _provenance(config: EvaluateConfig, reader: Reader, protocol: Protocol) -> dict[str, Any]:
    """Say what was scored on what, and how."""
    data, root = config.data, config.data.root
    named = data.dataset in reader.source.parts
    return {
        "data": str(reader.source),
        "dataset": data.dataset if named else root.stem if root.is_file() else root.name,
        "split_by": data.split_by if named else None,
        "generated": (root / GENERATED).is_file(),
        **{
            key: str(value)
            for key in ("checkpoint", "model", "predictions")
            if (value := getattr(config, key))
        },
        "protocol": protocol.name,
        "threshold": protocol.cutoff,
        "sentences": protocol.sentences,
        "no_target_threshold": config.no_target_threshold,
    }


def _write(found: dict[str, dict[str, Scores]], curves: dict[str, Curve], out: Path | None) -> None:
    if out is None:
        return
    with written_whole(out) as path:
        path.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    if curves:
        plain = {
            split: {key: value.round(6).tolist() for key, value in curve._asdict().items()}
            for split, curve in curves.items()
        }
        with written_whole(out.with_name(f"{out.stem}_curves.json")) as path:
            path.write_text(json.dumps(plain) + "\n", encoding="utf-8")
