"""Scores by category and by length of the sentence, and their intervals."""

from typing import Any

import numpy as np

from reference_model.data.records import Record
from reference_model.scoring.bootstrap import interval, resampled_sums
from reference_model.scoring.outcome import Outcome, scores, tally
from reference_model.scoring.protocols import Protocol

LENGTHS = {2: "1-2 words", 5: "3-5 words", 8: "6-8 words", 10**9: "9 words or more"}
"""Classes of sentence length: most words of each, parted at blanks -> its name."""


class Breakdown:
    """Sums by image, category and length, of which intervals and breakdowns are made.

    Args:
        protocol: How masks are compared.
        categories: Category id -> name; those without a name go by their id.
    """

    def __init__(self, protocol: Protocol, categories: dict[int, str]) -> None:
        self.protocol, self.categories = protocol, categories
        self._sums: dict[str, dict[Any, np.ndarray]] = {"image": {}, "category": {}, "length": {}}

    def add(self, record: Record, outcome: Outcome) -> None:
        """Add one sentence: to each of its categories, if its target has several."""
        row = tally(outcome, self.protocol)
        words = len(record.expression.split())
        ids = record.category_id if isinstance(record.category_id, tuple) else (record.category_id,)
        names = {str(self.categories.get(id, id)) for id in ids} or {"no target"}
        keys = [("image", record.image_id), ("length", next(m for m in LENGTHS if words <= m))]
        for kind, key in [*keys, *(("category", name) for name in names)]:
            sums = self._sums[kind]
            sums[key] = sums[key] + row if key in sums else row

    def scores(self, *, intervals: bool, groups: bool) -> dict[str, Any]:
        """Give ``intervals``, and ``by category``, the most frequent first, and ``by length``, as asked."""
        found: dict[str, Any] = {"intervals": self.intervals()} if intervals else {}
        if groups:
            categories = sorted(self._sums["category"].items(), key=lambda item: (-item[1][0], item[0]))
            found["by category"] = {name: scores(sums, self.protocol) for name, sums in categories}
            lengths = sorted(self._sums["length"].items())
            found["by length"] = {LENGTHS[most]: scores(sums, self.protocol) for most, sums in lengths}
        return found

    def intervals(self, *, resamples: int = 10_000, seed: int = 0) -> dict[str, list[float]]:
        """Give the 95 per cent interval of each score, images resampled (percentile bootstrap)."""
        by_image = self._sums["image"]
        sums = np.stack([by_image[image] for image in sorted(by_image)])
        absent = bool((sums[:, 0] != sums[:, 1]).any())
        drawn = resampled_sums(sums, resamples=resamples, seed=seed)
        found = scores(drawn, self.protocol, no_target=absent)
        return {name: interval(values) for name, values in found.items() if name != "count"}
