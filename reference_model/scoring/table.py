"""Scores laid out for a person."""

from collections.abc import Iterable, Sequence
from typing import Any

from reference_model.files import printable

_PRECISIONS = tuple(f"P@0.{tenths}" for tenths in (5, 6, 7, 8, 9))
_COLUMNS = ("mIoU", "oIoU", *_PRECISIONS, "AUC-PR", "gIoU", "cIoU", "N-acc", "T-acc")


def score_table(found: dict[str, dict[str, dict[str, Any]]]) -> str:
    """Lay out {split: {what: scores}} in per cent, intervals and breakdowns below what they belong to."""
    given = {key for by_name in found.values() for scores in by_name.values() for key in scores}
    keys = [key for key in _COLUMNS if key in given]
    line = lambda first, second, scores: [
        *(first, second),
        *(f"{100 * scores[key]:.2f}" if key in scores else "-" for key in keys),
        str(scores.get("count", "")),
    ]
    rows = [["split", "prediction", *keys, "sentences"]]
    for split, by_name in found.items():
        for name, scores in by_name.items():
            rows.append(line(split, name, scores))
            for bound, side in enumerate(("2.5 %", "97.5 %")) if "intervals" in scores else ():
                rows.append(
                    line("", f"  {side}", {k: both[bound] for k, both in scores["intervals"].items()})
                )
            for kind in ("by category", "by length"):
                rows += [line("", f"  {group}", of) for group, of in scores.get(kind, {}).items()]
    return aligned(rows, left=2)


def aligned(rows: Iterable[Sequence[str]], *, left: int) -> str:
    """Pad the cells of each column to one width, the first ``left`` columns to the left.

    What a terminal would act on, such as line ends and escape sequences, is written out.
    """
    rows = [[printable(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths))
        )
        for row in rows
    )
