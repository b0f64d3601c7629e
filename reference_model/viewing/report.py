"""The command ``report``: one HTML file about a run that a person can read, complete in itself."""

import base64
import html
import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

from reference_model.checkpoints.checkpoint import CONFIG, load_checkpoint
from reference_model.data.readers.reader import Reader
from reference_model.data.records import Record
from reference_model.files import InputError, refuse_unwritable, written_whole
from reference_model.processes import pick_device
from reference_model.scoring.breakdowns import Breakdown
from reference_model.scoring.curves import PrecisionRecall
from reference_model.scoring.evaluator import Evaluator, computed
from reference_model.scoring.metrics import SegmentationMetrics
from reference_model.scoring.metris_predictor import MetrisPredictor
from reference_model.scoring.protocols import PROTOCOLS
from reference_model.viewing.config import ReportConfig
from reference_model.viewing.paper_figures import drawing
from reference_model.viewing.runs import (
    METRICS,
    data_of,
    image_of,
    log_of,
    losses,
    picture,
    spaced_images,
    truth_at,
)

FAILED = 0.5
"""IoU below which a sentence counts as failed: it misses P@0.5."""
_SIDE = 160
_COLUMNS = ("mIoU", "oIoU", "P@0.5", "P@0.7", "P@0.9", "AUC-PR", "gIoU", "cIoU", "N-acc", "T-acc")


class Sample(NamedTuple):
    """One sentence, scored."""

    record: Record
    iou: float
    """As gIoU has it: 1 for right silence."""
    rle: dict[str, Any]
    """The predicted mask, at the image's own size; empty where it was withdrawn."""


def report(config: ReportConfig) -> Path:
    """Run the command ``report`` and return the file it wrote.

    Raises:
        InputError: The run or its data cannot be used, or a value is out of range.
    """
    if not 1 <= config.count <= 48:
        raise InputError(f"count: must be in [1, 48], got {config.count}")
    if config.limit is not None and config.limit < 1:
        raise InputError(f"limit: must be >= 1, got {config.limit}")
    out = config.run / "report.html" if config.out is None else config.out
    if out.suffix.lower() not in (".html", ".htm"):
        raise InputError(f"out {out}: must name an HTML file, such as report.html")
    draw = drawing()
    device = pick_device(config.device)
    checkpoint = load_checkpoint(config.run, device=device)
    refuse_unwritable(out)
    reader = data_of(config.run, config.data)
    groups = spaced_images(reader, config.split, config.limit or 10**9)
    predictor = MetrisPredictor(
        checkpoint.model,
        checkpoint.tokenizer,
        image_size=checkpoint.config.image_size,
        max_tokens=checkpoint.config.max_tokens,
        device=device,
        on_error=reader.on_error,
    )
    protocol = PROTOCOLS["metris"]
    metrics, curve = SegmentationMetrics(protocol), PrecisionRecall()
    breakdown, samples = Breakdown(protocol, reader.categories), []
    records = [record for group in groups for record in group]
    for scored in Evaluator(protocol, on_error=reader.on_error).outcomes(
        predictor, records, metrics, curve, title="report"
    ):
        breakdown.add(scored.record, scored.outcome)
        withdrawn = scored.no_target is not None and scored.no_target > 0.5
        mask = scored.mask & (not withdrawn)
        rle = coco_mask.encode(np.asfortranarray(mask.view(np.uint8)))
        samples.append(Sample(scored.record, scored.outcome.giou, rle))
    found = computed(metrics)
    line = computed(curve)
    found["AUC-PR"] = line.area
    found |= breakdown.scores(intervals=True, groups=True)
    samples.sort(key=lambda sample: (sample.iou, sample.record.split, sample.record.sent_id))

    parts = [
        _head(config, checkpoint.model, found, len(groups), reader),
        _section("Scores", _scores(found, config.split), _breakdowns(found)),
        _section("As metris evaluate scored it", _metrics(config.run)),
        _section(
            "Curves",
            *_losses(draw, config.run),
            _figure(
                draw.precision_recall(
                    {config.split: (line.precision, line.recall)}, title=f"All pixels of {config.split}"
                ),
                "Precision over recall, at thresholds 0 to 1",
            ),
        ),
        *_galleries(draw, samples, config.count),
        _section("Data", _counts(reader)),
        _section("Ablations", *_ablations(config)),
        _section("Config", _config(config.run)),
    ]
    page = _PAGE.format(title=html.escape(f"METRIS: {config.run}"), body="\n".join(filter(None, parts)))
    with written_whole(out) as fresh:
        fresh.write_text(page, encoding="utf-8")
    size = out.stat().st_size
    said = {"report": str(out), "bytes": size, "split": config.split, "sentences": len(samples)}
    said["failures"] = sum(sample.iou < FAILED for sample in samples)
    print(json.dumps(said) if config.json else f"report: {out} ({size / 2**20:.1f} MiB)")
    return out


# ------------------------------------------------------------------------------------------------ sections


def _head(config: ReportConfig, model: Any, found: dict[str, Any], images: int, reader: Reader) -> str:
    size = sum(p.numel() for p in model.parameters()) / 1e6
    low, high = (100 * bound for bound in found["intervals"]["mIoU"])
    said = (
        f"mIoU {100 * found['mIoU']:.2f} % (95 % interval {low:.2f} to {high:.2f}), oIoU "
        f"{100 * found['oIoU']:.2f} %, on {found['count']} sentences about {images} images of "
        f"{config.split}. {size:.2f} M parameters. Data: {reader.source}."
    )
    return f"<h1>METRIS: {html.escape(str(config.run))}</h1>\n<p>{html.escape(said)}</p>"


def _scores(found: dict[str, Any], split: str) -> str:
    keys = [key for key in _COLUMNS if key in found]
    rows = []
    for key in keys:
        between = found["intervals"].get(key)
        shown = "" if between is None else f"{100 * between[0]:.2f} to {100 * between[1]:.2f}"
        rows.append([key, f"{100 * found[key]:.2f}", shown])
    caption = f"{split}, {found['count']} sentences, per cent; intervals resample images 10,000 times"
    return _table(["score", "%", "95 % interval"], rows, caption)


def _breakdowns(found: dict[str, Any]) -> str:
    tables = []
    for kind in ("by category", "by length"):
        groups = found.get(kind, {})
        keys = [key for key in ("mIoU", "oIoU", "P@0.5") if all(key in scores for scores in groups.values())]
        rows = [
            [name, str(of["count"]), *(f"{100 * of[key]:.2f}" for key in keys)] for name, of in groups.items()
        ]
        tables.append(_table([kind.removeprefix("by "), "sentences", *keys], rows, f"{kind}, per cent"))
    return "".join(tables)


def _metrics(run: Path) -> str:
    """Lay out what ``metris evaluate`` left in the run, baselines among it."""
    path = run / METRICS
    if not path.is_file():
        return ""
    try:
        splits = json.loads(path.read_text(encoding="utf-8"))
        scored = [
            (split, name, of)
            for split, by_name in splits.items()
            for name, of in by_name.items()
            if isinstance(of, dict) and "mIoU" in of
        ]
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(f"{path}: cannot be read ({error}); write it again with metris evaluate") from error
    keys = [key for key in _COLUMNS if any(key in of for _, _, of in scored)]
    rows = [
        [
            split,
            name,
            *(f"{100 * of[key]:.2f}" if key in of else "" for key in keys),
            str(of.get("count", "")),
        ]
        for split, name, of in scored
    ]
    return _table(["split", "prediction", *keys, "sentences"], rows, f"{path.name}, per cent") if rows else ""


def _losses(draw: Any, run: Path) -> list[str]:
    rows = log_of(run)
    steps, named = losses(rows)
    if not len(steps) or not named:
        return []
    return [_figure(draw.training_curves(steps, named), "Losses, as the run logged them")]


def _galleries(draw: Any, samples: Sequence[Sample], count: int) -> list[str]:
    failed = [sample for sample in samples if sample.iou < FAILED]
    picked = np.linspace(0, len(failed) - 1, min(4 * count, len(failed))).round().astype(int)
    some = [failed[i] for i in picked]
    kinds = {
        "best": ("Best samples", samples[: -count - 1 : -1], "the highest IoU first"),
        "worst": ("Worst samples", samples[:count], "the lowest IoU first"),
        "failures": (
            "Failures",
            some,
            f"{len(failed)} of {len(samples)} sentences have an IoU below {FAILED}; {len(some)} of them, "
            "evenly spaced, by rising IoU",
        ),
    }
    return [
        _section(title, f"<p>{said}.</p>", _gallery(draw, name, chosen))
        for name, (title, chosen, said) in kinds.items()
    ]


def _gallery(draw: Any, name: str, samples: Iterable[Sample]) -> str:
    cards = []
    for record, iou, rle in samples:
        image = picture(image_of(record), side=_SIDE)
        h, w = image.shape[:2]
        mask = np.asarray(
            Image.fromarray(coco_mask.decode(rle)).resize((w, h), Image.Resampling.NEAREST), dtype=bool
        )
        panels = [
            (image, "image"),
            (draw.marked(image, truth_at(record, h, w), draw.TRUTH), "truth"),
            (draw.marked(image, mask, draw.COLOURS[0]), "prediction"),
        ]
        pictures = "".join(
            f'<img src="{_picture(panel)}" alt="{what}" title="{what}" width="{w}" height="{h}">'
            for panel, what in panels
        )
        said = html.escape(record.expression) + " <i>(no target)</i>" * record.no_target
        cards.append(
            f'<figure data-iou="{iou:.6f}">{pictures}<figcaption>IoU {iou:.2f} · “{said}” '
            f"<small>sentence {record.sent_id}</small></figcaption></figure>"
        )
    return f'<div class="gallery" id="{name}">{"".join(cards) or "<p>None.</p>"}</div>'


def _counts(reader: Reader) -> str:
    rows = []
    for split in reader.splits:
        images, objects, sentences, absent = set(), set(), 0, 0
        for record in reader.stream(split):
            images.add(record.image_id)
            objects.add(record.ref_id)
            sentences, absent = sentences + 1, absent + record.no_target
        rows.append([split, *map(str, (len(images), len(objects), sentences, absent))])
    return _table(["split", "images", "objects", "sentences", "without target"], rows, str(reader.source))


def _ablations(config: ReportConfig) -> list[str]:
    places = [config.run, config.run.parent, config.run.parent / "ablations"]
    places = places if config.ablations is None else [config.ablations]
    tables = sorted({path.resolve() for place in places for path in place.glob("table-*.md")})
    if config.ablations is not None and not tables:
        raise InputError(f"ablations {config.ablations}: has no table-*.md; give what metris ablate wrote")
    parts = []
    for path in tables:
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, ValueError) as error:
            raise InputError(
                f"{path}: cannot be read ({error}); write it again with metris ablate"
            ) from error
        title = next((line.removeprefix("# ") for line in lines if line.startswith("# ")), path.stem)
        note = " ".join(line for line in lines if line and line[0] not in "#|")
        cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line[:1] == "|"]
        if len(cells) > 2:
            parts.append(_table(cells[0], cells[2:], f"{title}; {note}"))
    return parts


def _config(run: Path) -> str:
    text = html.escape((run / CONFIG).read_text(encoding="utf-8"))
    return f"<details><summary>{CONFIG}, complete</summary><pre>{text}</pre></details>"


# --------------------------------------------------------------------------------------------------- pieces


def _section(title: str, *parts: str) -> str:
    """Put a heading over what there is; nothing where there is nothing."""
    inside = "".join(parts)
    return f"<section><h2>{title}</h2>{inside}</section>" if inside else ""


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], caption: str) -> str:
    cell = lambda tag, text: f"<{tag}>{html.escape(text)}</{tag}>"
    top = "".join(cell("th", text) for text in head)
    body = "".join(f"<tr>{''.join(cell('td', text) for text in row)}</tr>" for row in rows)
    said = f"<caption>{html.escape(caption)}</caption>"
    return f"<table>{said}<thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"


def _figure(figure: Any, said: str) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, metadata={"Software": None})
    return f'<img src="{_uri(buffer, "png")}" alt="{html.escape(said)}" style="max-width:100%">'


def _picture(image: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="JPEG", quality=85)
    return _uri(buffer, "jpeg")


def _uri(buffer: io.BytesIO, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem;
  color: #222 }}
table {{ border-collapse: collapse; margin: 0 2rem 1rem 0; font-variant-numeric: tabular-nums;
  display: inline-table; vertical-align: top }}
caption {{ text-align: left; color: #555; font-size: 13px }}
td, th {{ padding: .15rem .6rem; border-bottom: 1px solid #ddd; text-align: right }}
td:first-child, th:first-child {{ text-align: left }}
.gallery {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(320px, 1fr)); gap: 1rem }}
figure {{ margin: 0 }}
figure img {{ width: 32%; height: auto; margin-right: 1%; image-rendering: pixelated }}
figcaption {{ font-size: 13px }}
small {{ color: #777 }}
pre {{ overflow: auto; background: #f6f6f6; padding: 1rem }}
</style></head><body>
{body}
</body></html>
"""
