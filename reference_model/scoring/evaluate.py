"""Score METRIS, any other model, or a file of masks, and what needs no model, on the splits of a data set."""

import json
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from reference_model.checkpoints.checkpoint import load_checkpoint
from reference_model.configs import check_bounds
from reference_model.data.convert import made_of
from reference_model.data.datasets import read
from reference_model.data.readers.reader import Reader, Split, as_list
from reference_model.data.records import Record
from reference_model.data.untrusted import read_plain_json
from reference_model.files import InputError, refuse_unwritable, shown, written_whole
from reference_model.processes import joined, place
from reference_model.scoring.baselines import Baselines, evenly, mean_mask_baseline
from reference_model.scoring.breakdowns import Breakdown
from reference_model.scoring.config import EvaluateConfig
from reference_model.scoring.curves import Curve, PrecisionRecall
from reference_model.scoring.evaluator import Evaluator, ImageGroups, Scores, computed
from reference_model.scoring.gather import Rows, Seen, _refuse_repeated, gathered
from reference_model.scoring.metrics import SegmentationMetrics
from reference_model.scoring.metris_predictor import MetrisPredictor
from reference_model.scoring.predictors import CallablePredictor, FilePredictor, Predictor, callable_from
from reference_model.scoring.protocols import PROTOCOLS, Protocol
from reference_model.scoring.results import Predictions, result_line
from reference_model.scoring.table import score_table
from reference_model.tokens import report_overlong


def evaluate(config: EvaluateConfig) -> dict[str, dict[str, Scores]]:
    """Run the command ``evaluate``: {split: {"METRIS": scores, baseline: scores}}, fractions 0 to 1.

    Another model or a file stands under its own name. Among the scores of each are ``evaluation``, which says
    what was scored and how, with the count of sentences ``left_out`` under ``skip``, and, if asked for,
    ``intervals``, ``by category`` and ``by length``. The precision-recall curves go to a file of their own,
    NAME_curves.json beside ``out``. In the folder of a checkpoint both keep the splits scored before.

    Under torchrun each process scores its share of the images; all return, and the first writes and prints,
    what one process would, but for a model's own roundings where batches are others.

    Raises:
        InputError: The model, the predictions or the data cannot be used, or a value is out of its range.
    """
    protocol = _checked(config)
    with joined(config.device) as device:
        return _evaluate(config, protocol, device)


def _evaluate(
    config: EvaluateConfig, protocol: Protocol, device: torch.device
) -> dict[str, dict[str, Scores]]:
    first = place()[0] == 0
    reader = read(config.data, images=config.predictions is None)
    splits: dict[str, Split] = {}
    for split in (name.strip() for name in config.splits.split(",")):
        splits[split] = reader.split(split)
        splits[split].refuse_empty("choose another")
    for path in (out := _out(config), config.results):
        if path is not None:
            refuse_unwritable(path)
    kept = [_kept(config, path) for path in (out, _curves(out) if out else None)]
    if config.results is not None:
        _refuse_repeated(splits)
    name, predictor = _predictor(config, protocol, splits, device)
    mean_mask = None
    if config.baselines:
        train = evenly(reader.stream("train"), reader.splits.get("train", 0))
        size = getattr(predictor, "image_size", protocol.size or 480)
        mean_mask = mean_mask_baseline(train, size, on_error=config.data.on_error)

    found: dict[str, dict[str, Scores]] = {}
    curves: dict[str, Curve] = {}
    with ExitStack() as stack:
        rows = None
        if config.results is not None:
            path = stack.enter_context(written_whole(config.results)) if first else Path(os.devnull)
            rows = Rows(stack.enter_context(path.open("w", encoding="utf-8")))
        for split, records in splits.items():
            baselines = None if mean_mask is None else Baselines(reader, mean_mask, protocol)
            result, curve = _scored(config, protocol, reader, predictor, split, records, rows, baselines)
            found[split] = {name: result}
            if curve is not None:
                curves[split] = curve
            if baselines is not None:
                found[split] |= baselines.scores()

    if not first:
        return found
    _write(found, curves, out, *kept)
    if config.json:
        print(json.dumps(found, indent=2))
    else:
        print(score_table(found))
        told = {split: by_name[name]["evaluation"] for split, by_name in found.items()}
        cuts = {said["threshold"] for said in told.values()} - {None}
        shown_protocol = replace(protocol, threshold=cuts.pop()) if len(cuts) == 1 else protocol
        print(
            f"protocol {shown_protocol.said(given=all(said['threshold'] is None for said in told.values()))}"
        )
        for split, said in told.items():
            if said["left_out"]:
                print(f"{split}: {said['left_out']} sentences left out; every row is of the others")
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
    rows: Rows | None,
    baselines: Baselines | None,
) -> tuple[Scores, Curve | None]:
    """Score one split, and write its results."""
    evaluator = Evaluator(protocol, config.no_target_threshold, config.data.on_error)
    metrics, curve = SegmentationMetrics(protocol), PrecisionRecall()
    breakdown = Breakdown(protocol, reader.categories)
    total = reader.splits.get(split)
    cuts: set[float | None] = set()
    if rows is not None:
        rows.begin()

    def seen() -> Iterator[Seen]:
        for scored in evaluator.outcomes(predictor, records, metrics, curve, title=split, total=total):
            record, outcome, mask, _, no_target, threshold = scored
            if config.threshold is not None and threshold is None:
                raise InputError(f"threshold: does nothing to the bool masks of {config.model}; leave it out")
            if baselines is not None:
                baselines.add(scored)
            line = None
            if config.results is not None:
                line = result_line(record, outcome, mask, protocol, no_target, threshold)
            yield Seen(record, outcome, threshold, line)

    for one in gathered(seen()):
        breakdown.add(one.record, one.outcome)
        cuts.add(one.threshold)
        if rows is not None and one.line is not None:
            rows.add(one.record, one.line)
    if not cuts:
        raise InputError(f"{reader.source}: nothing of split {split!r} could be decoded; mend the data")
    result = computed(metrics)
    found = computed(curve)
    if found is not None:
        result["AUC-PR"] = found.area
    left_out = 0
    if config.data.on_error == "skip":
        left_out = _asked(reader, protocol, split, records) - result["count"]
    result["evaluation"] = _provenance(config, reader, protocol) | {
        "threshold": cuts.pop() if len(cuts) == 1 else None,
        "left_out": left_out,
    }
    return result | breakdown.scores(intervals=config.intervals, groups=config.breakdowns), found


def _asked(reader: Reader, protocol: Protocol, split: str, records: Iterable[Record]) -> int:
    """Count the sentences that were to be scored."""
    if reader.streamed and split in reader.splits and protocol.sentences == "all":
        return reader.splits[split]  # as the index says, those that cannot be read among them
    return sum(map(len, ImageGroups(records, protocol)))


def _checked(config: EvaluateConfig) -> Protocol:
    """Refuse values out of their range, and give the protocol."""
    check_bounds(config)
    config.check()
    protocol = PROTOCOLS[config.protocol]
    if config.threshold is not None:
        protocol = replace(protocol, threshold=config.threshold)
    if config.sentences is not None:
        protocol = replace(protocol, sentences=config.sentences)
    return protocol


def _out(config: EvaluateConfig) -> Path | None:
    if config.out is None and config.checkpoint is not None:
        return config.checkpoint / "metrics.json"
    return config.out


def _kept(config: EvaluateConfig, path: Path | None) -> dict[str, Any]:
    """Read what a file in the folder of a checkpoint has of splits that were scored before."""
    if path is None or config.out is not None or not path.is_file():
        return {}
    found = read_plain_json(path)
    if type(found) is not dict:
        raise InputError(f"{path}: holds {shown(found)}, expected scores by split; move it away")
    return found


def _curves(out: Path) -> Path:
    return out.with_name(f"{out.stem}_curves.json")


def _predictor(
    config: EvaluateConfig, protocol: Protocol, splits: dict[str, Iterable[Record]], device: Any
) -> tuple[str, Predictor]:
    """Load what is scored, and name it."""
    if config.model is not None:
        model, on_error = callable_from(config.model), config.data.on_error
        return config.model, CallablePredictor(model, config.model, on_error, config.batch_size)
    if config.predictions is not None:
        file = Predictions(config.predictions, config.protocol)
        for records in splits.values() if config.data.on_error == "stop" else ():
            if as_list(records) is not None:
                file.refuse_missing([record for group in ImageGroups(records, protocol) for record in group])
        return config.predictions.name, FilePredictor(file, config.data.on_error)
    checkpoint = load_checkpoint(config.checkpoint, device=device)
    listed = [record.expression for split in splits.values() for record in as_list(split) or ()]
    if listed and place()[0] == 0:
        report_overlong(checkpoint.tokenizer, listed, checkpoint.config.max_tokens)
    options = {"batch_size": config.batch_size, "workers": config.data.workers}
    return "METRIS", MetrisPredictor.of(checkpoint, **options, on_error=config.data.on_error)


def _provenance(config: EvaluateConfig, reader: Reader, protocol: Protocol) -> dict[str, Any]:
    """Say what was scored on what, and how."""
    made = made_of(reader, config.data)
    return {
        "data": str(reader.source),
        "dataset": made["dataset"] or config.data.root.name,
        "split_by": made["split_by"],
        "generated": made["generated"],
        **{
            key: str(value)
            for key in ("checkpoint", "model", "predictions")
            if (value := getattr(config, key))
        },
        "protocol": protocol.name,
        "sentences": protocol.sentences,
        "no_target_threshold": config.no_target_threshold,
    }


def _write(
    found: dict[str, dict[str, Scores]],
    curves: dict[str, Curve],
    out: Path | None,
    kept: dict[str, Any],
    kept_curves: dict[str, Any],
) -> None:
    if out is None:
        return
    with written_whole(out) as path:
        path.write_text(json.dumps(kept | found, indent=2) + "\n", encoding="utf-8")
    if curves:
        plain = {
            split: {key: value.round(6).tolist() for key, value in curve._asdict().items()}
            for split, curve in curves.items()
        }
        others = {split: curve for split, curve in kept_curves.items() if split not in found}
        with written_whole(_curves(out)) as path:
            path.write_text(json.dumps(others | plain) + "\n", encoding="utf-8")
