"""The command ``figures``: the paper's figures, drawn from runs (METRIS Fig. 2, 4 to 8 and 15)."""

import csv
import json
import re
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from reference_model.checkpoints.checkpoint import Checkpoint, load_checkpoint
from reference_model.data.records import Record
from reference_model.data.transforms import resize_mask
from reference_model.files import InputError, refuse_unwritable
from reference_model.processes import pick_device
from reference_model.scoring.answers import resized
from reference_model.scoring.curves import Curve, PrecisionRecall
from reference_model.scoring.metrics import SegmentationMetrics
from reference_model.scoring.metris_predictor import answers_of
from reference_model.scoring.protocols import PROTOCOLS
from reference_model.scoring.table import aligned
from reference_model.viewing.config import FiguresConfig
from reference_model.viewing.explain import Encoded, encode, explain, with_ratio
from reference_model.viewing.runs import (
    answered,
    data_of,
    image_of,
    picture,
    spaced_images,
    truth_at,
    usable,
)

_NO_VE = "this model has no visual expression, it curates nothing"
_PIXELS = 300
"""Most pixels of each kind in a t-SNE."""


class Sweep(NamedTuple):
    """A run scored with several r."""

    scores: dict[float, dict[str, Any]]
    """r -> scores as fractions."""
    curve: Curve
    """With the run's own r."""


def figures(config: FiguresConfig) -> dict[str, Any]:
    """Run the command ``figures`` and return what ``--json`` prints: files, and the numbers in them.

    Raises:
        InputError: A run or the data cannot be used, a value is out of range, or matplotlib is missing.
    """
    ratios = _checked(config)
    draw = drawing()
    device = pick_device(config.device)
    paths = [config.checkpoint, *(Path(path) for path in (config.against or "").split(",") if path)]
    names = _names(paths)
    runs = {name: load_checkpoint(path, device=device) for name, path in zip(names, paths, strict=True)}
    out = config.checkpoint / "figures" if config.out is None else config.out
    refuse_unwritable(out / "comparison.png")
    reader = data_of(config.checkpoint, config.data)
    groups, unread = usable(spaced_images(reader, config.split, config.limit), reader.on_error)
    main, extracts = runs[names[0]], runs[names[0]].model.guidance.extractor is not None
    own = {name: run.config.ratio for name, run in runs.items()}
    sweeps = {
        name: sweep(run, groups, ratios if name == names[0] and extracts else (), title=name)
        for name, run in runs.items()
    }
    about = f"{config.split}, {len(groups)} images"
    drawn = {"comparison": _comparison(draw, runs, groups, config.count)}
    drawn |= _tokens(draw, main, groups, config.count)
    near = {name: _embedded(run, groups, config.seed) for name, run in runs.items()}
    drawn["embeddings"] = _map_of(draw, near, len(groups), config.seed)
    curves = {name: (found.curve.precision, found.curve.recall) for name, found in sweeps.items()}
    drawn["precision_recall"] = draw.precision_recall(curves, title=f"Precision and recall ({about})")
    swept = {r: found["oIoU"] for r, found in sorted(sweeps[names[0]].scores.items())}
    series = (
        {"this run, r changed at test time": (list(swept), list(swept.values()), None)} if extracts else {}
    )
    if config.ablation is not None:
        series["trained with each r"] = trained(config.ablation, config.split)
    chosen = own[names[0]] if extracts else None
    drawn["ratio"] = (
        draw.score_by_ratio(series, chosen=chosen, title=f"oIoU by r ({about})") if series else _NO_VE
    )
    left_out = {stem: why for stem, why in drawn.items() if isinstance(why, str)}
    for stem, why in left_out.items():
        warnings.warn(f"{stem}: not drawn, {why}", stacklevel=2)
    result = {
        "files": [
            str(path)
            for stem, figure in drawn.items()
            if stem not in left_out
            for path in draw.save(figure, out / stem)
        ],
        "not drawn": left_out,
        "images": len(groups),
        "sentences left out": unread,
        "AUC-PR": {name: found.curve.area for name, found in sweeps.items()},
        "oIoU": {name: sweeps[name].scores[own[name]]["oIoU"] for name in names},
        "oIoU by r": {f"{r:g}": score for r, score in swept.items()} if extracts else {},
        "silhouette": {name: None if one is None else one[1] for name, one in near.items()},
    }
    print(json.dumps(result, indent=2) if config.json else _text(result))
    return result


def drawing() -> Any:
    """Import `reference_model.figures`, which the library and most commands do without.

    Raises:
        InputError: matplotlib or scikit-learn is missing.
    """
    try:
        import sklearn  # noqa: F401

        from reference_model import figures as draw
    except ModuleNotFoundError as error:
        raise InputError(f"figures: needs {error.name}; pip install 'metris-blocks[report]'") from error
    return draw


def _checked(config: FiguresConfig) -> tuple[float, ...]:
    if config.limit < 1:
        raise InputError(f"limit: must be >= 1, got {config.limit}")
    if not 1 <= config.count <= 12:
        raise InputError(f"count: must be in [1, 12], got {config.count}")
    if not 0 <= config.seed < 2**31:
        raise InputError(f"seed: must be in [0, 2^31), got {config.seed}")
    try:
        ratios = tuple(float(text) for text in config.ratios.split(","))
    except ValueError as error:
        raise InputError(f"ratios {config.ratios}: expected numbers such as 0.1,0.3,0.5") from error
    for ratio in ratios:
        if not 0 < ratio <= 1:
            raise InputError(f"ratios: each must be in (0, 1], got {ratio:g}; 30 per cent is 0.3")
    return ratios


def _names(paths: Sequence[Path]) -> list[str]:
    """Name runs by as many of their last folders as it takes to tell them apart."""
    if len(set(map(Path.resolve, paths))) < len(paths):
        raise InputError("against: names a run twice; give each once")
    for depth in range(1, 64):
        names = ["/".join(path.resolve().parts[-depth:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    raise InputError("against: the runs cannot be told apart by name; copy one to a shorter path")


def sweep(
    checkpoint: Checkpoint, groups: Sequence[list[Record]], ratios: Sequence[float], *, title: str = "score"
) -> Sweep:
    """Score a model with its own r and with others, each image encoded once for all of them.

    Args:
        checkpoint: A loaded model.
        groups: Records, image by image.
        ratios: Values of r besides its own; () where it has no extractor.
        title: Of the progress bar.
    """
    protocol, own = PROTOCOLS["metris"], checkpoint.config.ratio
    models = {own: checkpoint.model} | {
        r: with_ratio(checkpoint.model, r) for r in dict.fromkeys(ratios) if r != own
    }
    metrics = {r: SegmentationMetrics(protocol) for r in models}
    curve = PrecisionRecall()
    for records in tqdm(groups, desc=title, unit="image", leave=False, disable=None):
        truths = [record.mask() for record in records]
        features = checkpoint.encode(image_of(records[0]))
        sentences = [record.expression for record in records]
        for ratio, model in models.items():
            output = replace(checkpoint, model=model).refer(features, sentences)
            for record, truth, answer in zip(records, truths, answers_of(output), strict=True):
                found, probability = resized(answer, *truth.shape, protocol)
                withdrawn = None if answer.no_target is None else answer.no_target > 0.5
                metrics[ratio].update(found, truth, target=not record.no_target, withdrawn=withdrawn)
                if ratio == own:
                    curve.update(probability, truth)
    return Sweep({r: metric.compute() for r, metric in metrics.items()}, curve.compute())


def _comparison(draw: Any, runs: dict[str, Checkpoint], groups: Sequence[list[Record]], count: int) -> Any:
    """Draw sentences about different objects of few images, two of each and ``count`` in all."""
    several = [one for one in (_of_objects(group) for group in groups) if len(one) > 1] or list(groups)
    picked = _spaced(several, -(-count // 2))
    rows = [record for group in picked for record in group[:2]][:count]
    images = {record.image_id: image_of(record) for record in rows}
    shown = [picture(images[record.image_id]) for record in rows]
    predictions = {}
    for name, run in runs.items():
        encoded = {image_id: encode(run, image) for image_id, image in images.items()}
        predictions[name] = [
            answered(explain(run, encoded[record.image_id], [record.expression])[0], *seen.shape[:2])
            for record, seen in zip(rows, shown)
        ]
    truths = [truth_at(record, *seen.shape[:2]) for record, seen in zip(rows, shown)]
    return draw.comparison(shown, [record.expression for record in rows], truths, predictions)


def _of_objects(group: Sequence[Record]) -> list[Record]:
    """Keep the first sentence of each object."""
    return list({record.ref_id: record for record in reversed(group)}.values())[::-1]


def _spaced(items: Sequence[Any], count: int) -> list[Any]:
    return [items[i] for i in np.linspace(0, len(items) - 1, min(count, len(items))).round().astype(int)]


def _tokens(draw: Any, run: Checkpoint, groups: Sequence[list[Record]], count: int) -> dict[str, Any]:
    """Draw relevance, curated tokens and attention of one sentence, and the sums of attention of several.

    In place of a figure that does not apply to the model stands why.
    """
    rows = [next((r for r in group if not r.no_target), group[0]) for group in _spaced(groups, count)]
    images = [image_of(record) for record in rows]
    found = [explain(run, encode(run, image), [r.expression])[0] for r, image in zip(rows, images)]
    seen = [picture(image) for image in images]
    # The longest sentence shows most words.
    i = max(range(len(found)), key=lambda i: len(found[i].tokens))
    one, title = found[i], f"“{found[i].expression}”"
    drawn: dict[str, Any] = {"relevance": _NO_VE, "curated": _NO_VE}
    if one.scores is not None:
        drawn["relevance"] = draw.relevance(seen[i], one.tokens, one.scores, title=f"Relevance: {title}")
        drawn["curated"] = draw.curated_tokens(
            seen[i], one.tokens, one.curated, title=f"Curated tokens, r = {run.config.ratio:.0%}: {title}"
        )
    finest = lambda maps: None if maps is None else maps[-1]
    drawn["attention_words"] = "no word of the sentence has a token that the decoder attends to"
    if one.to_language is not None or one.visual_tokens:
        drawn["attention_words"] = draw.attention_to_words(
            seen[i],
            one.tokens,
            finest(one.to_language),
            finest(one.to_visual),
            visual_words=one.visual_tokens,
            title=f"Attention of pixels to each token: {title}",
        )
    drawn["attention"] = "the decoder of this model does not attend to both LE and VE"
    if one.to_language is not None and one.to_visual is not None:
        drawn["attention"] = draw.attention_sums(
            seen,
            [x.expression for x in found],
            [truth_at(record, *image.shape[:2]) for record, image in zip(rows, seen)],
            [answered(x, *image.shape[:2]) for x, image in zip(found, seen)],
            [x.to_language[-1].sum(axis=0) for x in found],
            [x.to_visual[-1].sum(axis=0) for x in found],
        )
    return drawn


def embeddings(
    checkpoint: Checkpoint, encoded: Encoded, expression: str, truth: np.ndarray, *, seed: int = 0
) -> Any:
    """Take pixels and guidance tokens out of the finest stage's attention: queries and keys, where they meet.

    Args:
        checkpoint: A loaded model.
        encoded: The image.
        expression: The sentence.
        truth: (h, w) bool, of any size.
        seed: Of the choice of pixels, at most 300 of each kind.

    Returns:
        `reference_model.figures.Embeddings`; None where the target covers no cell, or every one.
    """
    attention, caught = checkpoint.model.decoder.stages[-1].attention, []
    hook = attention.register_forward_pre_hook(lambda _, inputs: caught.append(inputs))
    try:
        (found,) = explain(checkpoint, encoded, [expression])
    finally:
        hook.remove()
    x, context = caught[0][:2]
    with torch.inference_mode():
        pixels, tokens = (
            y[0].float().cpu().numpy() for y in (attention.q_proj(x), attention.k_proj(context))
        )
    grid = encoded.features.maps[0].shape[-2:]
    target = resize_mask(truth, *grid).ravel()
    rng, kept = np.random.default_rng(seed), []
    for kind in (True, False):
        (places,) = np.nonzero(target == kind)
        if not len(places):
            return None
        kept.append(rng.permutation(places)[:_PIXELS])
    kept = np.sort(np.concatenate(kept))
    l, language, visual = len(found.tokens), found.to_language is not None, found.to_visual is not None
    none = tokens[:0]
    return drawing().Embeddings(
        pixels[kept],
        target[kept],
        tokens[:l] if language else none,
        tokens[-l:][found.expressed] if visual else none,
    )


def _embedded(run: Checkpoint, groups: Sequence[list[Record]], seed: int) -> tuple[Any, float] | None:
    """Give one sentence's embeddings, the first that can be had, and the mean silhouette over the images.

    None where no target covers a cell and leaves one.
    """
    draw, first, found = drawing(), None, []
    for group in tqdm(groups, desc="silhouette", unit="image", leave=False, disable=None):
        record = next((r for r in group if not r.no_target), None)
        if record is None:
            continue
        encoded = encode(run, image_of(record))
        one = embeddings(run, encoded, record.expression, record.mask(), seed=seed)
        if one is not None:
            first = one if first is None else first
            found.append(draw.silhouette(one.pixels, one.target))
    return None if first is None else (first, float(np.mean(found)))


def _map_of(draw: Any, near: dict[str, tuple[Any, float] | None], images: int, seed: int) -> Any:
    """Draw the t-SNE of the runs that have one, or say why there is none."""
    had = {name: one for name, one in near.items() if one is not None}
    if not had:
        return "no target covers a cell of the decoder's grid and leaves one; choose another split"
    for name in near.keys() - had.keys():
        warnings.warn(f"embeddings: without {name}, of whose grid no target covers a cell", stacklevel=3)
    means = ", ".join(f"{mean:+.2f}" for _, mean in had.values())
    return draw.embedding_map(
        {name: first for name, (first, _) in had.items()},
        seed=seed,
        title=f"Pixels, LE and VE (t-SNE); over {images} images\nmean silhouette {means}",
    )


def trained(path: Path, split: str) -> tuple[list[float], list[float], list[float] | None]:
    """Read r, mean oIoU and half its 95 % interval over the seeds from a table-fig6.csv.

    Raises:
        InputError: The file cannot be read, or has no row of the split that names its r.
    """
    from scipy import stats

    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        by_ratio: dict[float, list[float]] = {}
        for row in rows:
            match = re.fullmatch(r"ratio_(\d*\.?\d+)", row["row"])
            if match and row["split"] == split:
                by_ratio.setdefault(float(match[1]), []).append(float(row["oIoU"]))
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"ablation {path}: not a table of runs ({error}); give a table-fig6.csv") from error
    if not by_ratio:
        raise InputError(f"ablation {path}: no row ratio_... of split {split}; give a table-fig6.csv")
    ratios = sorted(by_ratio)
    seeds = min(map(len, by_ratio.values()))
    halves = None
    if seeds > 1:
        spread = lambda found: float(np.std(found, ddof=1) / np.sqrt(len(found)))
        halves = [float(stats.t.ppf(0.975, len(by_ratio[r]) - 1)) * spread(by_ratio[r]) for r in ratios]
    return ratios, [float(np.mean(by_ratio[r])) for r in ratios], halves


def _text(result: dict[str, Any]) -> str:
    names = list(result["AUC-PR"])
    cell = lambda value: f"{100 * value:.2f}"
    rows = [["run", "oIoU %", "AUC-PR %", "silhouette of target pixels"]]
    for name in names:
        mean = result["silhouette"][name]
        silhouette = "-" if mean is None else f"{mean:+.3f}"
        rows.append([name, cell(result["oIoU"][name]), cell(result["AUC-PR"][name]), silhouette])
    lines = [aligned(rows, left=1)]
    if result["oIoU by r"]:
        lines.append(
            "oIoU % by r: " + "  ".join(f"{r}: {cell(score)}" for r, score in result["oIoU by r"].items())
        )
    return "\n".join([*lines, *(f"figure: {path}" for path in result["files"])])
