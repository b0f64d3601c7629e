"""Programs: the meaning of a sentence as nested tuples, and what they pick in a scene.

    ("all",)                                    every object
    ("filter", attribute, value, pool)          attribute is shape, colour, size, pattern or second (colour)
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

from reference_model.synthetic.kinds import Preset
from reference_model.synthetic.scene import Scene, SceneObject

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
    if not isinstance(scene, Scene):
        return _executed(program, scene)
    # Descriptions of one scene are tried by the hundred, and most of their parts are the same.
    if program not in scene.picked:
        scene.picked[program] = _executed(program, scene)
    return scene.picked[program]


def _executed(program: Program, scene: Sequence[SceneObject]) -> tuple[int, ...] | None:
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
    """Name the family: attribute, location, corner (two locations), superlative (of size), relation,
    relations (two of one object) or hop (the anchor of a relation is itself described by one)."""
    operation, first, *rest, inner = program
    if operation == "filter":
        return "attribute"
    if operation == "superlative" and first != "scale":
        return "location"
    if operation == "relation":
        return "hop" if rest[0][0] == "relation" else "relations" if inner[0] == "relation" else "relation"
    return "corner" if operation == inner[0] == "location" else operation


def describe(target: int, scene: Scene, family: str, preset: Preset, rng: Random) -> Program | None:
    """Propose programs of a family in random order; return the first that singles out the target, if any."""
    pools = _shuffled(_telling(target, scene, preset), preset, rng)
    for heads in _heads(target, scene, family, preset, rng):
        for program in pools:
            for head in heads:
                program = (*head, program)
            if program != ("all",) and singles_out(program, scene, target):
                return program
    return None


def _heads(
    target: int, scene: Scene, family: str, preset: Preset, rng: Random
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
    elif family == "relations":
        yield from combinations(anchored(target, scene, "attribute", preset, rng), 2)
    else:
        for head in anchored(target, scene, "relation" if family == "hop" else "attribute", preset, rng):
            yield (head,)


def anchored(target: int, scene: Scene, family: str, preset: Preset, rng: Random) -> Iterator[tuple]:
    """Relations of an object to others, described by a family; in random order, still without a pool."""
    for index in rng.sample(range(len(scene)), len(scene)):
        if index == target or scene[index].shape in preset.unsaid:
            continue
        side = direction(scene[target], scene[index])
        if family == "relation" and not _serves(index, side, target, scene, preset):
            continue
        anchor = describe(index, scene, family, preset, rng)
        # No way back: "the star below the circle that is above the star".
        if anchor and not (family == "relation" and execute(anchor[2], scene) == (target,)):
            yield ("relation", side, anchor)


def _serves(index: int, side: str, target: int, scene: Scene, preset: Preset) -> bool:
    """Say, before long work on its name, whether an anchor could tell the target from others like it."""
    line = getattr(scene[index], AXES[side][0])
    pools = [execute(pool, scene) or () for pool in _telling(target, scene, preset).values()]
    found = (tuple(i for i in pool if i != index) for pool in pools if len(pool) > 1)
    return any(_beyond(AXES[side], line, pool, scene) == (target,) for pool in found)


def direction(item: SceneObject, anchor: SceneObject) -> str:
    """Side of the anchor on which the item lies, by the longer way: far up and a bit to the left is top."""
    dx, dy = item.x - anchor.x, item.y - anchor.y
    if abs(dx) > abs(dy):
        return "left" if dx < 0 else "right"
    return "top" if dy < 0 else "bottom"


def named(item: SceneObject, preset: Preset, rng: Random) -> list[Program]:
    """Filters by every subset of an object's attributes, in the order of `_shuffled`."""
    return _shuffled(_all_filters(item, preset), preset, rng)


def _telling(target: int, scene: Scene, preset: Preset) -> dict[tuple[str, ...], Program]:
    """Subsets of an object's attributes, as filters, of which each tells something apart.

    A filter that does not is one too many, whatever goes round it.
    """
    if target not in scene.pools:
        scene.pools[target] = {
            names: pool
            for names, pool in _all_filters(scene[target], preset).items()
            if all(execute(less, scene) != execute(pool, scene) for less in reductions(pool))
        }
    return scene.pools[target]


def _all_filters(item: SceneObject, preset: Preset) -> dict[tuple[str, ...], Program]:
    return {names: _filters(item, names) for names in preset.subsets if item.second or "second" not in names}


def _shuffled(known: dict[tuple[str, ...], Program], preset: Preset, rng: Random) -> list[Program]:
    """Filters in random order: rather first come those with the shape, and, where a preset likes detail,
    those with more attributes."""
    places = {names: rng.random() + bias for names, bias in preset.subsets.items()}
    return [known[names] for names in sorted(known, key=places.__getitem__)]


def _filters(item: SceneObject, names: tuple[str, ...]) -> Program:
    program: Program = ("all",)
    for name in names:
        program = ("filter", name, getattr(item, name), program)
    return program
