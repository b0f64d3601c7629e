"""The kinds of scenes that can be made: which objects, how many, and what is said of them."""

from dataclasses import dataclass, field
from functools import cached_property
from itertools import combinations
from typing import Any

from reference_model.synthetic.looks import COLOURS


@dataclass(frozen=True)
class Preset:
    """What scenes and sentences are made of."""

    shapes: tuple[str, ...]
    colours: tuple[str, ...]
    counts: dict[int, float]
    """Number of objects -> weight."""
    scales: dict[str, tuple[float, float]]
    """Size word -> range of `SceneObject.scale`; ranges lie further apart than `program.SCALE_MARGIN`."""
    spacing: float
    """Least distance of two centres, in sums of their radii; below 1 they may overlap a little."""
    attributes: tuple[str, ...]
    """What a sentence may name."""
    families: dict[str, float]
    """Family of sentences -> weight; a family that fits no object of the scene gives way to another."""
    patterns: dict[str, float] = field(default_factory=lambda: {"plain": 1.0})
    """Pattern -> weight. Where there are others than plain, spacing is 1 or more, so that all of it shows."""
    altered: dict[str, float] = field(default_factory=dict)
    """What a planned distractor has otherwise than the object it copies -> weight; "nothing" is a twin, and
    "swap" exchanges its two colours. Empty: distractors share shape, colour or both."""
    crossed: bool = False
    """Objects are a choice of all combinations of three things that each take two values, so that hardly a
    word alone tells one from the others."""
    detail: float = 0.0
    """By how much each needed attribute more makes a description preferred, in [0, 1]."""
    any_targets: bool = False
    """Sentences may be about several objects or none, unless the settings say otherwise."""
    dataset: str = "refcoco"
    """The benchmark whose name and splits the files bear, where each sentence is about one object."""
    unsaid: tuple[str, ...] = ()
    """Shapes that no sentence is about, or mentions."""

    @cached_property
    def subsets(self) -> dict[tuple[str, ...], float]:
        """Attributes that a description may name -> what it is put back by, in a random order."""
        known = self.attributes
        subsets = [names for count in range(len(known) + 1) for names in combinations(known, count)]
        return {names: 0.5 * ("shape" not in names) - self.detail * len(names) for names in subsets}

    @property
    def splits(self) -> tuple[str, ...]:
        """Those of the benchmark."""
        return ("train", "val", "test") if self.dataset == "refcocog" else ("train", "val", "testA", "testB")

    def targets(self, split: str) -> tuple[str, ...]:
        """Shapes whose objects a sentence of this split may refer to."""
        half = len(self.shapes) // 2
        shapes = {"testA": self.shapes[:half], "testB": self.shapes[half:]}.get(split, self.shapes)
        return tuple(shape for shape in shapes if shape not in self.unsaid)

    def unseen(self, count: int) -> tuple[str, ...]:
        """So many shapes, from the ends of testA's and of testB's in turns."""
        half = len(self.shapes) // 2
        turns = zip(reversed(self.shapes[:half]), reversed(self.shapes[half:]))
        return tuple(shape for pair in turns for shape in pair)[:count]


_MANY: dict[str, Any] = {
    "shapes": ("circle", "square", "triangle", "diamond", "bar", "star", "heart", "cross", "moon", "fish"),
    "colours": tuple(COLOURS),
    "counts": {4: 0.2, 5: 0.3, 6: 0.3, 7: 0.2},
    "scales": {"small": (0.14, 0.175), "large": (0.215, 0.27)},
    "spacing": 1.0,
    "attributes": ("shape", "colour", "size", "pattern", "second"),
}

PRESETS = {
    "easy": Preset(
        shapes=("circle", "square", "triangle", "star"),
        colours=("red", "green", "blue", "yellow"),
        counts={2: 0.1, 3: 0.4, 4: 0.5},
        scales={"small": (0.17, 0.21), "large": (0.28, 0.35)},
        spacing=1.0,
        attributes=("shape", "colour"),
        families={"attribute": 0.55, "location": 0.15, "superlative": 0.3},
    ),
    "standard": Preset(
        shapes=("circle", "square", "triangle", "diamond", "bar", "star", "heart", "cross", "moon", "fish"),
        colours=tuple(COLOURS),
        counts={4: 0.1, 5: 0.2, 6: 0.3, 7: 0.2, 8: 0.2},
        scales={"small": (0.105, 0.14), "large": (0.2, 0.27)},
        spacing=0.85,
        attributes=("shape", "colour", "size"),
        families={"attribute": 0.23, "location": 0.15, "corner": 0.1, "superlative": 0.25, "relation": 0.27},
    ),
    "refcoco": Preset(
        **_MANY,
        families={"attribute": 0.35, "location": 0.4, "corner": 0.15, "superlative": 0.1},
        patterns={"plain": 0.7, "striped": 0.1, "spotted": 0.1, "cored": 0.1},
        altered={"nothing": 0.3, "second": 0.1, "pattern": 0.1, "colour": 0.2, "shape": 0.2, "size": 0.1},
    ),
    "refcoco+": Preset(
        **_MANY,
        families={"attribute": 0.8, "superlative": 0.2},
        patterns={"plain": 0.4, "striped": 0.2, "spotted": 0.2, "cored": 0.2},
        altered={"second": 0.25, "pattern": 0.2, "swap": 0.1, "colour": 0.15, "shape": 0.15, "size": 0.15},
        detail=0.3,
        dataset="refcoco+",
    ),
    "gref": Preset(
        **_MANY,
        families={"relation": 0.25, "relations": 0.25, "hop": 0.5},
        patterns={"plain": 0.5, "striped": 0.2, "spotted": 0.15, "cored": 0.15},
        altered={"nothing": 0.5, "second": 0.15, "pattern": 0.1, "colour": 0.1, "shape": 0.1, "size": 0.05},
        detail=0.3,
        dataset="refcocog",
    ),
    "grefcoco": Preset(
        **_MANY,
        families={"attribute": 0.4, "location": 0.3, "corner": 0.1, "superlative": 0.1, "relation": 0.1},
        patterns={"plain": 0.7, "striped": 0.1, "spotted": 0.1, "cored": 0.1},
        altered={"nothing": 0.2, "second": 0.1, "pattern": 0.1, "colour": 0.25, "shape": 0.25, "size": 0.1},
        any_targets=True,
    ),
    "hard": Preset(
        shapes=("circle", "square", "heart", "triangle", "diamond", "star"),
        colours=("red", "green", "blue", "yellow", "white", "black"),
        counts={4: 0.2, 5: 0.4, 6: 0.4},
        scales={"small": (0.18, 0.205), "large": (0.255, 0.3)},
        spacing=1.0,
        attributes=("shape", "colour", "pattern", "second"),
        families={"attribute": 0.75, "relation": 0.25},
        patterns={"striped": 0.34, "spotted": 0.33, "cored": 0.33},
        crossed=True,
        detail=0.5,
    ),
}
