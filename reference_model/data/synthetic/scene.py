"""Scene graphs: what is in a picture and where, before any pixel or word."""

import math
from dataclasses import dataclass
from random import Random
from typing import NamedTuple

import numpy as np

COLOURS = {
    "red": (212, 36, 40),
    "green": (40, 158, 62),
    "blue": (38, 84, 214),
    "yellow": (246, 218, 44),
    "purple": (142, 56, 182),
    "orange": (250, 132, 20),
    "white": (248, 248, 248),
    "black": (22, 22, 24),
}


TILT = 12
"""Objects are turned by this much at most, degrees either way: a turned square is no diamond."""


class SceneObject(NamedTuple):
    """One object of a scene. Lengths are fractions of the picture's side, x rightwards, y downwards.

    `x, y` is the middle of the bounding box of the whole object, hidden parts included.
    `scale` is the geometric mean of the object's diameter and of the square root of its area, so that a
    spiky shape and a compact one of equal `scale` look equally large. `angle` is in degrees.
    """

    shape: str
    colour: str
    size: str
    x: float
    y: float
    scale: float
    angle: float
    rgb: tuple[int, int, int]


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

    def targets(self, split: str) -> tuple[str, ...]:
        """Shapes whose objects a sentence of this split may refer to."""
        half = len(self.shapes) // 2
        return {"testA": self.shapes[:half], "testB": self.shapes[half:]}.get(split, self.shapes)


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
}


def _arc(radius: float, start: float, stop: float, x: float = 0.0, points: int = 48) -> np.ndarray:
    turn = np.linspace(start, stop, points)
    return np.stack([x + radius * np.cos(turn), radius * np.sin(turn)], axis=1)


def _unit_outlines() -> dict[str, np.ndarray]:
    """Shape -> upright outline (points, 2) of scale 1."""
    spikes = np.arange(10) * math.pi / 5 - math.pi / 2
    turn = np.linspace(0, 2 * math.pi, 60, endpoint=False)
    heart_y = 13 * np.cos(turn) - 5 * np.cos(2 * turn) - 2 * np.cos(3 * turn) - np.cos(4 * turn)
    star = np.stack([np.cos(spikes), np.sin(spikes)], axis=1) * np.where(np.arange(10) % 2, 0.46, 1)[:, None]
    # The horns of the moon are where its two circles cross: x = 0.45, y = ±0.893.
    horn, bite = math.atan2(0.893, 0.45), math.atan2(0.893, 0.45 - 0.62)
    outlines = {
        "circle": _arc(1, 0, 2 * math.pi)[:-1],
        "square": [(-1, -1), (1, -1), (1, 1), (-1, 1)],
        "triangle": [(0, -1), (1, 0.8), (-1, 0.8)],
        "diamond": [(0, -1.2), (0.88, 0), (0, 1.2), (-0.88, 0)],
        "bar": [(-2.1, -1), (2.1, -1), (2.1, 1), (-2.1, 1)],
        "star": star,
        "heart": np.stack([16 * np.sin(turn) ** 3, -heart_y], axis=1),
        "cross": [(0.36, 0.36), (0.36, 1), (-0.36, 1), (-0.36, 0.36), (-1, 0.36), (-1, -0.36), (-0.36, -0.36),
                  (-0.36, -1), (0.36, -1), (0.36, -0.36), (1, -0.36), (1, 0.36)],
        "moon": np.concatenate(
            [_arc(1, horn, 2 * math.pi - horn), _arc(0.909, -bite, bite - 2 * math.pi, x=0.62)[1:-1]]
        ),
        "fish": np.concatenate(
            [_arc(1, -2.7, 2.7) * (0.85, 0.68), [(-1.35, 0.62), (-1.15, 0), (-1.35, -0.62)]]
        ),
    }  # fmt: skip
    return {shape: _of_unit_scale(np.asarray(points, dtype=float)) for shape, points in outlines.items()}


def _area(points: np.ndarray) -> float:
    x, y = points.T
    return float(abs(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1))) / 2)


def _of_unit_scale(points: np.ndarray) -> np.ndarray:
    diameter = np.hypot(*(points[:, None] - points).transpose(2, 0, 1)).max()
    return points / math.sqrt(math.sqrt(_area(points)) * diameter)


def _turned(points: np.ndarray, angle: float) -> np.ndarray:
    """Rotate by degrees, then centre the bounding box on the origin."""
    cosine, sine = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    turned = points @ np.array([[cosine, sine], [-sine, cosine]])
    return turned - (turned.min(axis=0) + turned.max(axis=0)) / 2


OUTLINES = _unit_outlines()
AREAS = {shape: _area(points) for shape, points in OUTLINES.items()}
RADII = {
    shape: max(float(np.hypot(*_turned(points, angle).T).max()) for angle in range(-TILT, TILT + 1))
    for shape, points in OUTLINES.items()
}


def outline(item: SceneObject) -> np.ndarray:
    """Outline of an object as (points, 2) x and y, fractions of the picture's side."""
    return _turned(OUTLINES[item.shape], item.angle) * item.scale + (item.x, item.y)


def outline_area(item: SceneObject) -> float:
    """Area of the whole object, hidden parts included, as a fraction of the picture."""
    return AREAS[item.shape] * item.scale**2


def sample_scene(preset: Preset, rng: Random) -> tuple[SceneObject, ...]:
    """Draw a scene, in painter's order. Later objects often share shape or colour with an earlier one."""
    count = rng.choices(list(preset.counts), list(preset.counts.values()))[0]
    while True:
        items: list[SceneObject] = []
        while len(items) < count and (item := _placed(_look(items, preset, rng), items, preset, rng)):
            items.append(item)
        if len(items) == count:
            return tuple(items)


def _look(items: list[SceneObject], preset: Preset, rng: Random) -> tuple[str, str, str]:
    """Shape, colour and size word of the next object: free, or a planned distractor of an earlier one."""
    shape, colour = rng.choice(preset.shapes), rng.choice(preset.colours)
    size = rng.choice(tuple(preset.scales))
    if items and rng.random() < 0.75:
        other = rng.choice(items)
        shared = rng.choices(("shape", "colour", "both"), (0.45, 0.4, 0.15))[0]
        shape = shape if shared == "colour" else other.shape
        colour = colour if shared == "shape" else other.colour
    return shape, colour, size


def _placed(
    look: tuple[str, str, str], items: list[SceneObject], preset: Preset, rng: Random
) -> SceneObject | None:
    """Give an object its place, or None where 40 tries found no room."""
    shape, colour, size = look
    # Rounded here, so that the scene on disk is the scene that the programs were run on.
    scale = round(rng.uniform(*preset.scales[size]), 4)
    angle = round(rng.uniform(-TILT, TILT), 1)
    shine = rng.uniform(0.92, 1.05)
    rgb = tuple(min(255, max(0, round(c * shine + rng.uniform(-6, 6)))) for c in COLOURS[colour])
    radius = RADII[shape] * scale
    for _ in range(40):
        x = round(rng.uniform(radius + 0.01, 0.99 - radius), 4)
        y = round(rng.uniform(radius + 0.01, 0.99 - radius), 4)
        if all(
            math.hypot(x - o.x, y - o.y) >= preset.spacing * (radius + RADII[o.shape] * o.scale)
            for o in items
        ):
            return SceneObject(shape, colour, size, x, y, scale, angle, rgb)
    return None
