"""Programs: the meaning of a sentence as nested tuples, and what they pick in a scene.

    ("all",)                                    every object
    ("filter", attribute, value, pool)          attribute is shape, colour or size
    ("location", side, pool)                    side of the picture: left, right, top, bottom
    ("superlative", key, "min" | "max", pool)   key is x, y or scale
    ("relation", side, anchor, pool)            left, right, top (above) or bottom (below) of the one anchor

What an outermost part can be, in sentences about several objects (see `targets`):

    ("every", pool)                             all of the pool, which holds none or two and more
    ("count", number, pool)                     all of the pool, which holds none or so many, two or more
    ("and", one, other)                         both, each of which picks one object

The margins make "unambiguous" a matter of sight rather than of decimals. A decision about places holds only
where it would still hold if an object were moved by `POSITION_MARGIN` of the picture: objects of the pool
that near to the middle line (location), to the anchor's own line (relation) or to the winner (superlative)
make the whole program undecided. A decision about sizes holds only where the winner's `scale` differs from
the next one's by a factor of at least 1 + `SCALE_MARGIN`. With that factor area and diameter agree about
which of two shapes is the larger one, whatever the shapes.
"""

from collections.abc import Iterator, Sequence
from itertools import combinations
from random import Random

from reference_model.data.synthetic.scene import SceneObject

POSITION_MARGIN = 0.06
"""Fraction of the picture's side."""

SCALE_MARGIN = 0.22
"""Fraction of the smaller scale."""

AXES = {"left": ("x", -1), "right": ("x", 1), "top": ("y", -1), "bottom": ("y", 1)}
"""Side -> axis and the sign of its direction."""

OPPOSITE = {"left": "right", "right": "left", "top": "bottom", "bottom": "top"}

Program = tuple


def execute(program: Program, scene: Sequence[SceneObject]) -> tuple[int, ...] | None:
    """Run a program on a scene.

    Returns:
        Indices of the objects it picks, ascending; None where an object within a margin, or an anchor, a
        number or a plural that the scene contradicts, leaves it undecided.
    """
    if program == ("all",):
        return tuple(range(len(scene)))
    operation, *rest, inner = program
    pool = execute(inner, scene)
    if pool is None:
        return None
    if operation == "every":
        return pool if len(pool) != 1 else None
    if operation == "count":
        return pool if len(pool) in (0, *rest) else None
    if operation == "and":
        one = execute(rest[0], scene)
        both = set(pool) | set(one or ())
        return tuple(sorted(both)) if one is not None and len(one) == len(pool) == 1 < len(both) else None
    if operation == "filter":
        attribute, value = rest
        return tuple(i for i in pool if getattr(scene[i], attribute) == value)
    if operation == "superlative":
        return _extreme(*rest, pool, scene)
    side = AXES[rest[0]]
    if operation == "location":
        return _beyond(side, 0.5, pool, scene)
    anchor = execute(rest[1], scene)
    if anchor is None or len(anchor) != 1:
        return None
    others = tuple(i for i in pool if i != anchor[0])
    return _beyond(side, getattr(scene[anchor[0]], side[0]), others, scene)


def _extreme(key: str, end: str, pool: tuple[int, ...], scene: Sequence[SceneObject]) -> tuple | None:
    ranked = sorted(pool, key=lambda i: getattr(scene[i], key), reverse=end == "max")
    if len(ranked) > 1:
        low, high = sorted(getattr(scene[i], key) for i in ranked[:2])
        if high < (low * (1 + SCALE_MARGIN) if key == "scale" else low + POSITION_MARGIN):
            return None
    return tuple(ranked[:1])


def _beyond(
    side: tuple[str, int], line: float, pool: tuple[int, ...], scene: Sequence[SceneObject]
) -> tuple | None:
    axis, sign = side
    offsets = [sign * (getattr(scene[i], axis) - line) for i in pool]
    if any(abs(offset) < POSITION_MARGIN for offset in offsets):
        return None
    return tuple(i for i, offset in zip(pool, offsets) if offset > 0)


def reductions(program: Program) -> Iterator[Program]:
    """Every program that lacks exactly one part of this one; an anchor's own parts stay."""
    *head, inner = program
    if not head:
        return
    yield inner
    for less in reductions(inner):
        yield (*head, less)


def singles_out(program: Program, scene: Sequence[SceneObject], target: int) -> bool:
    """Say whether the program picks the target alone and needs each of its parts for that.

    A part is needed if the program without it picks two or more objects. Below a superlative, which never
    does, it must pick another object or be undecided between several. An undecided location or relation
    does not count. An anchor's own parts are not asked about: `describe` makes it by this same rule.
    """
    answer = (target,)
    if execute(program, scene) != answer:
        return False
    refused = (answer,) if program[0] == "superlative" else (answer, None)
    return all(execute(less, scene) not in refused for less in reductions(program))


def family_of(program: Program) -> str:
    """Name the family: attribute, location, corner (two locations), superlative (of size) or relation."""
    operation, first, *_, inner = program
    if operation == "filter":
        return "attribute"
    if operation == "superlative" and first != "scale":
        return "location"
    return "corner" if operation == inner[0] == "location" else operation


def describe(
    target: int, scene: Sequence[SceneObject], family: str, attributes: tuple[str, ...], rng: Random
) -> Program | None:
    """Propose programs of a family in random order; return the first that singles out the target, if any."""
    pools = named(scene[target], attributes, rng)
    for heads in _heads(target, scene, family, attributes, rng):
        for program in pools:
            for head in heads:
                program = (*head, program)
            if program != ("all",) and singles_out(program, scene, target):
                return program
    return None


def _heads(
    target: int, scene: Sequence[SceneObject], family: str, attributes: tuple[str, ...], rng: Random
) -> Iterator[tuple[tuple, ...]]:
    """What a family wraps round the filters, inmost first; each is true of the target, or nearly so."""
    item = scene[target]
    across, down = "left" if item.x < 0.5 else "right", "top" if item.y < 0.5 else "bottom"
    if family == "attribute":
        yield ()
    elif family == "superlative":
        yield (("superlative", "scale", "max" if item.size == "large" else "min"),)
    elif family == "corner":
        yield ("location", down), ("location", across)
    elif family == "location":
        sides = [(("location", side),) for side in (across, down)]
        ends = [(("superlative", key, end),) for key in "xy" for end in ("min", "max")]
        yield from rng.sample(sides + ends, len(sides + ends))
    elif family == "relation":
        for index in rng.sample(range(len(scene)), len(scene)):
            anchor = describe(index, scene, "attribute", attributes, rng) if index != target else None
            if anchor:
                yield (("relation", direction(item, scene[index]), anchor),)


def direction(item: SceneObject, anchor: SceneObject) -> str:
    """Side of the anchor on which the item lies, by the longer way: far up and a bit to the left is top."""
    dx, dy = item.x - anchor.x, item.y - anchor.y
    if abs(dx) > abs(dy):
        return "left" if dx < 0 else "right"
    return "top" if dy < 0 else "bottom"


def named(item: SceneObject, attributes: tuple[str, ...], rng: Random) -> list[Program]:
    """Filters by every subset of an object's attributes, those with the shape rather first."""
    subsets = [names for count in range(len(attributes) + 1) for names in combinations(attributes, count)]
    subsets.sort(key=lambda names: rng.random() + 0.5 * ("shape" not in names))
    programs = []
    for names in subsets:
        program: Program = ("all",)
        for name in names:
            program = ("filter", name, getattr(item, name), program)
        programs.append(program)
    return programs
