"""Compare two files of results on the same sentences, paired: differences, their intervals, and cases."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from reference_model.data.untrusted import plain_field
from reference_model.files import InputError, shown
from reference_model.scoring.bootstrap import interval, resampled_sums, two_sided_p
from reference_model.scoring.config import CompareConfig
from reference_model.scoring.outcome import Outcome, scores, tally
from reference_model.scoring.protocols import PROTOCOLS
from reference_model.scoring.results import rows
from reference_model.scoring.table import aligned

_SHOWN = 5


class _Result(NamedTuple):
    image_id: int
    protocol: str
    sentences: str | None
    """Which of an object's were scored; None in files of old."""
    threshold: float | None
    """Of the mask; None where it was given as one."""
    size: list[int]
    """Height and width of the mask, pixels."""
    expression: str
    outcome: Outcome


def compare(config: CompareConfig) -> dict[str, Any]:
    """Run the command ``compare``: for each score a, b, b - a, its 95 per cent interval and its p-value.

    Images are resampled, the same ones for both files. p is two-sided: twice the share of resampled
    differences on the far side of zero. Of the sentences, ``wins`` are those where b has the higher IoU (for
    a sentence without target: the one that is rightly silent), and the ten that differ most are listed.

    Raises:
        InputError: A file cannot be read, or they do not hold the same sentences with the same true masks,
            scored by one protocol; or a value is out of its range.
    """
    if not 100 <= config.resamples <= 1_000_000:
        raise InputError(f"resamples: must be in [100, 1000000], got {config.resamples}")
    if not 0 <= config.seed < 2**31:
        raise InputError(f"seed: must be in [0, 2^31), got {config.seed}")
    a, b = _read(config.a), _read(config.b)
    _refuse_unlike(config, a, b)
    order = sorted(a, key=lambda key: (a[key].image_id, key))
    found = _differences([a[key] for key in order], [b[key] for key in order], config)
    gain = {key: b[key].outcome.giou - a[key].outcome.giou for key in order}
    sentence = lambda key: {
        "split": key[0],
        "sent_id": key[1],
        "image_id": a[key].image_id,
        "expression": a[key].expression,
        "a": a[key].outcome.giou,
        "b": b[key].outcome.giou,
    }
    ranked = sorted(order, key=gain.__getitem__)
    result = {
        "a": str(config.a),
        "b": str(config.b),
        "protocol": a[order[0]].protocol,
        "sentences": len(order),
        "images": len({found.image_id for found in a.values()}),
        "scores": found,
        "wins": sum(value > 0 for value in gain.values()),
        "ties": sum(value == 0 for value in gain.values()),
        "losses": sum(value < 0 for value in gain.values()),
        "worst": [sentence(key) for key in ranked[:_SHOWN] if gain[key] < 0],
        "best": [sentence(key) for key in ranked[: -_SHOWN - 1 : -1] if gain[key] > 0],
    }
    print(json.dumps(result, indent=2) if config.json else _text(result))
    return result


def _differences(a: list[_Result], b: list[_Result], config: CompareConfig) -> dict[str, dict[str, Any]]:
    """Compute both scores, their difference, and what resampling images makes of it."""
    protocol = PROTOCOLS[a[0].protocol]
    images = np.unique([found.image_id for found in a], return_inverse=True)[1]
    sums = []
    for results in (a, b):
        by_image = np.zeros((images.max() + 1, len(tally(results[0].outcome, protocol))), dtype=np.int64)
        np.add.at(by_image, images, np.stack([tally(found.outcome, protocol) for found in results]))
        sums.append(by_image)
    drawn = resampled_sums(np.concatenate(sums, axis=1), resamples=config.resamples, seed=config.seed)
    absent = not all(found.outcome.target for found in a)
    (score_a, drawn_a), (score_b, drawn_b) = (
        (scores(whole.sum(axis=0), protocol, no_target=absent), scores(part, protocol, no_target=absent))
        for whole, part in zip(sums, np.split(drawn, 2, axis=1))
    )
    return {
        name: {
            "a": score_a[name],
            "b": score_b[name],
            "difference": score_b[name] - score_a[name],
            "interval": interval(drawn_b[name] - drawn_a[name]),
            "p": two_sided_p(drawn_b[name] - drawn_a[name]),
        }
        for name in score_a
        if name != "count"
    }


def _read(path: Path) -> dict[tuple[str, int], _Result]:
    results: dict[tuple[str, int], _Result] = {}
    for where, _, row in rows(path):
        if "iou" not in row:
            raise InputError(f"{where}: has no 'iou'; compare takes what metris evaluate --results wrote")
        key = (plain_field(row, "split", str, where), row["sent_id"])
        if key in results:
            raise InputError(f"{where}: sent_id {key[1]} of split {key[0]} a second time; keep one of them")
        results[key] = _result(row, where)
    if not results:
        raise InputError(f"{path}: holds no results; write them with metris evaluate --results")
    return results


def _result(row: dict[str, Any], where: str) -> _Result:
    kinds = {"intersection": int, "union": int, "truth_area": int, "pooled_union": int}
    kinds |= {"iou": float, "target": bool, "answered": bool}
    found = Outcome(**{key: plain_field(row, key, kind, where) for key, kind in kinds.items()})
    protocol = plain_field(row, "protocol", str, where)
    if protocol not in PROTOCOLS:
        raise InputError(f"{where}: protocol {shown(protocol)} is none of {', '.join(PROTOCOLS)}")
    size = plain_field(plain_field(row, "mask", dict, where), "size", list, where)
    pixels = size[0] * size[1] if len(size) == 2 and {type(side) for side in size} == {int} else -1
    counts = found.intersection, found.truth_area, found.union, found.pooled_union
    if not (0 <= found.iou <= 1 and 0 <= min(counts) <= max(counts) <= pixels):  # NaN fails too
        raise InputError(
            f"{where}: iou {shown(found.iou)} and counts {shown(counts)} cannot be those of masks of size "
            f"{shown(size)}; write the results anew with metris evaluate --results"
        )
    image_id, expression = (plain_field(row, *it, where) for it in (("image_id", int), ("expression", str)))
    sentences = plain_field(row, "sentences", str, where) if "sentences" in row else None
    threshold = None if row.get("threshold") is None else plain_field(row, "threshold", float, where)
    return _Result(image_id, protocol, sentences, threshold, size, expression, found)


def _refuse_unlike(config: CompareConfig, a: dict[Any, _Result], b: dict[Any, _Result]) -> None:
    """Refuse files of other sentences, other truths or another protocol, naming the first that differs."""
    for one, other, has, lacks in ((a, b, config.a, config.b), (b, a, config.b, config.a)):
        missing = next((key for key in one if key not in other), None)
        if missing is not None:
            raise InputError(
                f"{lacks}: lacks sent_id {missing[1]} of split {missing[0]}, which {has} has; score both on "
                "the same splits"
            )
    for key, first in a.items():
        second = b[key]
        for what, ours, theirs in (
            ("protocol", first.protocol, second.protocol),
            ("sentences", first.sentences, second.sentences),
            ("threshold", first.threshold, second.threshold),
            ("image_id", first.image_id, second.image_id),
            ("expression", first.expression, second.expression),
            ("height and width", first.size, second.size),
            ("pixels of the true mask", first.outcome.truth_area, second.outcome.truth_area),
            ("target", first.outcome.target, second.outcome.target),
        ):
            if ours != theirs and None not in (ours, theirs):
                raise InputError(
                    f"{config.b}: sent_id {key[1]} of split {key[0]} has {what} {shown(theirs)}, but "
                    f"{shown(ours)} in {config.a}; score both on the same data by the same protocol"
                )
    if len({found.protocol for found in a.values()}) > 1:
        raise InputError(f"{config.a}: mixes protocols; score all of it by one")


def _text(result: dict[str, Any]) -> str:
    """Lay a comparison out for a person, scores and differences in per cent."""
    table = [["score", "a", "b", "b - a", "95 % interval", "p"]]
    for name, found in result["scores"].items():
        low, high = (f"{100 * bound:+.2f}" for bound in found["interval"])
        cells = (f"{100 * found['a']:.2f}", f"{100 * found['b']:.2f}", f"{100 * found['difference']:+.2f}")
        table.append([name, *cells, f"{low} .. {high}", f"{found['p']:.4f}"])
    lines = [f"a: {result['a']}", f"b: {result['b']}", aligned(table, left=1)]
    lines.append(
        f"{result['sentences']} sentences of {result['images']} images, protocol {result['protocol']}: "
        f"b is better on {result['wins']}, equal on {result['ties']}, worse on {result['losses']}"
    )
    for title, key in (("b gains most on", "best"), ("b loses most on", "worst")):
        cases = [
            [
                f"  {case['split']} {case['sent_id']}",
                f"{case['a']:.2f} -> {case['b']:.2f}",
                case["expression"],
            ]
            for case in result[key]
        ]
        lines += [title, aligned(cases, left=3)] if cases else []
    return "\n".join(lines)
