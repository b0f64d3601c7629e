"""What objects can look like: colours, and outlines of shapes and of what lies on them."""

import math

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

PATTERNS = ("plain", "striped", "spotted", "cored")
"""What may lie on the body of an object, in a second colour: nothing, stripes, spots, or one disc."""

CLASHES = frozenset(
    frozenset(pair.split())
    for pair in ("red orange", "orange yellow", "yellow white", "blue purple", "purple black", "purple red")
)
"""Colours that no object has both of: as thin stripes they are hard to tell apart."""

TILT = 12
"""Objects are turned by this much at most, degrees either way: a turned square is no diamond."""


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


def rotated(points: np.ndarray, angle: float) -> np.ndarray:
    cosine, sine = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    return points @ np.array([[cosine, sine], [-sine, cosine]])


def middle(points: np.ndarray) -> np.ndarray:
    """Middle of the bounding box."""
    return (points.min(axis=0) + points.max(axis=0)) / 2


def turned(points: np.ndarray, angle: float) -> np.ndarray:
    """Rotate by degrees, then centre the bounding box on the origin."""
    turned = rotated(points, angle)
    return turned - middle(turned)


def _stripes() -> list[np.ndarray]:
    ends = np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)])
    return [ends * (0.06, 1) + (x, 0) for x in (-0.34, 0, 0.34)]


def _spots() -> list[np.ndarray]:
    middles = [(x, y) for y in (-0.48, 0, 0.48) for x in (-0.6, -0.3, 0, 0.3, 0.6)]
    middles += [(x, y) for y in (-0.24, 0.24) for x in (-0.45, -0.15, 0.15, 0.45)]
    return [_arc(0.085, 0, 2 * math.pi, points=17)[:-1] + middle for middle in middles]


def _core(points: np.ndarray) -> list[np.ndarray]:
    middle, radius = _inscribed(points)
    return [_arc(0.62 * radius, 0, 2 * math.pi)[:-1] + middle]


def _inscribed(points: np.ndarray) -> tuple[np.ndarray, float]:
    """Middle and radius of about the largest circle in an outline."""
    spots = np.stack(np.meshgrid(*[np.linspace(-1, 1, 101)] * 2), axis=-1).reshape(-1, 1, 2)
    along = np.roll(points, -1, axis=0) - points
    share = np.clip(((spots - points) * along).sum(axis=-1) / (along**2).sum(axis=-1), 0, 1)
    distance = np.hypot(*np.moveaxis(spots - points - share[..., None] * along, -1, 0)).min(axis=1)
    # A spot lies inside if a ray from it crosses the outline an odd number of times.
    (x, y), (x1, y1), (dx, dy) = (np.moveaxis(a, -1, 0) for a in (spots, points, along))
    with np.errstate(divide="ignore", invalid="ignore"):
        crossed = ((y1 > y) != (y1 + dy > y)) & (x < x1 + (y - y1) * dx / dy)
    # Of many as good, as in a bar, the one nearest to the middle.
    best = (np.where(crossed.sum(axis=1) % 2, distance, 0) - 1e-3 * np.hypot(x, y)[:, 0]).argmax()
    return spots[best, 0], float(distance[best])


OUTLINES = _unit_outlines()
AREAS = {shape: _area(points) for shape, points in OUTLINES.items()}
RADII = {
    shape: max(float(np.hypot(*turned(points, angle).T).max()) for angle in range(-TILT, TILT + 1))
    for shape, points in OUTLINES.items()
}
MARKINGS = {
    (pattern, shape): marks
    for shape, points in OUTLINES.items()
    for pattern, marks in zip(PATTERNS, ([], _stripes(), _spots(), _core(points)))
}
"""Pattern and shape -> outlines in the frame of `OUTLINES`; they may reach beyond the shape's own."""
