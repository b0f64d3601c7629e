"""Scene graphs: what is in a picture and where, before any pixel or word."""

import math
from collections.abc import Iterable
from random import Random
from typing import Any, NamedTuple

import numpy as np

from reference_model.synthetic.kinds import Preset
from reference_model.synthetic.looks import (
    AREAS,
    CLASHES,
    COLOURS,
    MARKINGS,
    OUTLINES,
    RADII,
    TILT,
    middle,
    rotated,
    turned,
)


class SceneObject(NamedTuple):
    """One object of a scene. Lengths are fractions of the picture's side, x rightwards, y downwards.

    `x, y` is the middle of the bounding box of the whole object, hidden parts included.
    `scale` is the geometric mean of the object's diameter and of the square root of its area, so that a
    spiky shape and a compact one of equal `scale` look equally large. `angle` is in degrees.
    `colour` is that of the body, which shows more than `second`, the colour of its stripes, spots or core.
    """

    shape: str
    colour: str
    size: str
    x: float
    y: float
    scale: float
    angle: float
    rgb: tuple[int, ...]
    pattern: str = "plain"
    second: str = ""
    second_rgb: tuple[int, ...] = ()

    def stored(self) -> dict[str, Any]:
        """Fields as they are written to disk; a plain object lacks the last three."""
        fields = self._asdict()
        return fields if self.second else {k: fields[k] for k in SceneObject._fields[:-3]}


class Scene(tuple[SceneObject, ...]):
    """Objects in painter's order, with what describing them found out and will ask again."""

    picked: dict[tuple, tuple[int, ...] | None]
    """Program -> what it picks."""
    pools: dict[int, dict[tuple[str, ...], tuple]]
    """Object -> sets of its attributes that are worth naming together -> program."""

    def __init__(self, _: Iterable[SceneObject]) -> None:
        self.picked, self.pools = {}, {}


class Look(NamedTuple):
    """What an object looks like, but for its place and exact size; as in `SceneObject`."""

    shape: str
    colour: str
    size: str
    pattern: str = "plain"
    second: str = ""


def outline(item: SceneObject) -> np.ndarray:
    """Outline of an object as (points, 2) x and y, fractions of the picture's side."""
    return turned(OUTLINES[item.shape], item.angle) * item.scale + (item.x, item.y)


def markings(item: SceneObject) -> list[np.ndarray]:
    """Outlines of the stripes, spots or core of an object, as `outline`; they may reach beyond its own."""
    centre = middle(rotated(OUTLINES[item.shape], item.angle))
    return [
        (rotated(points, item.angle) - centre) * item.scale + (item.x, item.y)
        for points in MARKINGS[item.pattern, item.shape]
    ]


def outline_area(item: SceneObject) -> float:
    """Area of the whole object, hidden parts included, as a fraction of the picture."""
    return AREAS[item.shape] * item.scale**2


def sample_scene(preset: Preset, rng: Random) -> Scene:
    """Draw a scene, in painter's order. Later objects often share shape or colour with an earlier one."""
    count = rng.choices(list(preset.counts), list(preset.counts.values()))[0]
    while True:
        items: list[SceneObject] = []
        looks = _crossed(count, preset, rng) if preset.crossed else []
        while len(items) < count:
            look = looks[len(items)] if looks else _look(items, preset, rng)
            item = _placed(look, items, preset, rng)
            if item is None:
                break
            items.append(item)
        if len(items) == count:
            return Scene(items)


def _look(items: list[SceneObject], preset: Preset, rng: Random) -> Look:
    """Look of the next object: free, or a planned distractor of an earlier one."""
    look = Look(rng.choice(preset.shapes), rng.choice(preset.colours), rng.choice(tuple(preset.scales)))
    if preset.altered:
        return _planned(items, look, preset, rng)
    if items and rng.random() < 0.75:
        other = rng.choice(items)
        shared = rng.choices(("shape", "colour", "both"), (0.45, 0.4, 0.15))[0]
        look = look._replace(
            shape=look.shape if shared == "colour" else other.shape,
            colour=look.colour if shared == "shape" else other.colour,
        )
    return look


def _crossed(count: int, preset: Preset, rng: Random) -> list[Look]:
    """So many different looks of the eight that pattern, colours and a third thing make, two values each.

    The third thing is the shape, and the colours are one body with either of two on it, or two colours of
    which either may be the body's; or it is the body's colour, for one shape.
    """
    shapes, patterns = rng.sample(preset.shapes, 2), rng.sample(list(preset.patterns), 2)
    colour = rng.choice(preset.colours)
    one, other = rng.sample(_beside(colour, preset), 2)
    if rng.random() < 0.5:
        pairs = [(colour, one), rng.choice([(colour, other), (one, colour)])]
    else:
        shapes = shapes[:1]
        bodies = [c for c in _beside(one, preset) if c in _beside(other, preset) and c != colour]
        pairs = [(body, second) for body in (colour, rng.choice(bodies)) for second in (one, other)]
    cells = [(shape, pattern, *pair) for shape in shapes for pattern in patterns for pair in pairs]
    return [
        Look(shape, body, rng.choice(tuple(preset.scales)), pattern, second)
        for shape, pattern, body, second in rng.sample(cells, count)
    ]


def _planned(items: list[SceneObject], look: Look, preset: Preset, rng: Random) -> Look:
    """A free look with a pattern, or in four of five cases that of another object but for one thing."""
    if not items or rng.random() < 0.2:
        return _patterned(look, preset.patterns, preset, rng)
    other = rng.choice(items)
    look = Look(*(getattr(other, name) for name in Look._fields))
    change = rng.choices(list(preset.altered), list(preset.altered.values()))[0]
    if change in ("pattern", "second", "swap") and not look.second:
        change = "pattern"
    if change == "pattern":
        others = {k: weight for k, weight in preset.patterns.items() if k != look.pattern}
        return _patterned(look, others, preset, rng)
    if change == "swap":
        return look._replace(colour=look.second, second=look.colour)
    if change in ("colour", "second"):
        kept = look.second if change == "colour" else look.colour
        colours = [c for c in _beside(kept, preset) if c != getattr(look, change)]
        return look._replace(**{change: rng.choice(colours)})
    if change in ("shape", "size"):
        values = preset.shapes if change == "shape" else tuple(preset.scales)
        return look._replace(**{change: rng.choice([v for v in values if v != getattr(look, change)])})
    return look


def _patterned(look: Look, patterns: dict[str, float], preset: Preset, rng: Random) -> Look:
    """Draw another pattern, and a second colour where it needs one and there is none."""
    pattern = rng.choices(list(patterns), list(patterns.values()))[0]
    second = look.second or rng.choice(_beside(look.colour, preset))
    return look._replace(pattern=pattern, second="" if pattern == "plain" else second)


def _beside(colour: str, preset: Preset) -> list[str]:
    """Colours that an object may have beside this one; all beside none."""
    return [c for c in preset.colours if c != colour and frozenset((c, colour)) not in CLASHES]


def _placed(look: Look, items: list[SceneObject], preset: Preset, rng: Random) -> SceneObject | None:
    """Give an object its place, or None where 40 tries found no room."""
    shape, colour, size, pattern, second = look
    # Rounded here, so that the scene on disk is the scene that the programs were run on.
    scale = round(rng.uniform(*preset.scales[size]), 4)
    angle = round(rng.uniform(-TILT, TILT), 1)
    rgb = _shade(colour, rng)
    second_rgb = _shade(second, rng) if second else ()
    radius = RADII[shape] * scale
    for _ in range(40):
        x = round(rng.uniform(radius + 0.01, 0.99 - radius), 4)
        y = round(rng.uniform(radius + 0.01, 0.99 - radius), 4)
        if all(
            math.hypot(x - o.x, y - o.y) >= preset.spacing * (radius + RADII[o.shape] * o.scale)
            for o in items
        ):
            return SceneObject(shape, colour, size, x, y, scale, angle, rgb, pattern, second, second_rgb)
    return None


def _shade(colour: str, rng: Random) -> tuple[int, ...]:
    shine = rng.uniform(0.92, 1.05)
    return tuple(min(255, max(0, round(c * shine + rng.uniform(-6, 6)))) for c in COLOURS[colour])
