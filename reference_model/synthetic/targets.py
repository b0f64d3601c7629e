"""Sentences about one object, several or none: gRefCOCO's three kinds (`generate --targets any`)."""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from random import Random
from typing import NamedTuple

from reference_model.synthetic.kinds import Preset
from reference_model.synthetic.program import (
    AXES,
    OPPOSITE,
    Program,
    anchored,
    describe,
    direction,
    execute,
    named,
    reductions,
)
from reference_model.synthetic.scene import Scene

KINDS = {"one": 0.6, "several": 0.28, "none": 0.12}
"""Kind of target -> its share of the references; gRefCOCO has all three, its own shares were not at hand."""

SEVERAL = {"attribute": 0.35, "location": 0.25, "relation": 0.1, "pair": 0.3}
"""Family of sentences about several objects -> weight; relation only where the preset has it."""


class Described(NamedTuple):
    """What a sentence means, and the objects that it picks: indices, ascending."""

    targets: tuple[int, ...]
    program: Program


def describe_any(
    kind: str, scene: Scene, allowed: Sequence[int], preset: Preset, rng: Random
) -> Described | None:
    """Describe targets of a kind (a key of `KINDS`), all among ``allowed``; None where the scene has none."""
    tried = {"one": _one, "several": _several, "none": _none}[kind]
    return next(tried(scene, allowed, preset, rng), None)


def describe_again(targets: tuple[int, ...], scene: Scene, preset: Preset, rng: Random) -> Described | None:
    """Describe the very targets of another sentence; where it has none, something else that is not there."""
    tried = {0: _none, 1: _one}.get(len(targets), _several)
    return next((found for found in tried(scene, targets, preset, rng) if found.targets == targets), None)


def _one(scene: Scene, allowed: Sequence[int], preset: Preset, rng: Random) -> Iterator[Described]:
    for family in _drawn(preset.families, rng):
        for target in allowed:
            program = describe(target, scene, family, preset, rng)
            if program is not None:
                yield Described((target,), program)


def _several(scene: Scene, allowed: Sequence[int], preset: Preset, rng: Random) -> Iterator[Described]:
    weights = {k: v for k, v in SEVERAL.items() if k != "relation" or k in preset.families}
    for family in _drawn(weights, rng):
        found = _pairs(scene, allowed, preset, rng)
        if family != "pair":
            found = _plurals(scene, allowed, family, preset, rng)
        for program in found:
            targets = execute(program, scene)
            if targets is not None and len(targets) > 1 and set(targets) <= set(allowed):
                yield Described(targets, program)


def _pairs(scene: Scene, allowed: Sequence[int], preset: Preset, rng: Random) -> Iterator[Program]:
    """Two single objects; by attributes alone, since "... and the star on the left" could mean both."""
    items = rng.sample(allowed, len(allowed))
    for one, other in pairwise(items):
        both = [describe(item, scene, "attribute", preset, rng) for item in (one, other)]
        if None not in both:
            yield ("and", *both)


def _plurals(
    scene: Scene, allowed: Sequence[int], family: str, preset: Preset, rng: Random
) -> Iterator[Program]:
    """All objects of a description that needs each of its parts."""
    for item in rng.sample(allowed, len(allowed)):
        for head in _heads(scene, item, family, preset, rng):
            for inner in named(scene[item], preset, rng):
                pool = (*head, inner) if head else inner
                picked = execute(pool, scene)
                if picked is None or any(execute(less, scene) in (picked, None) for less in reductions(pool)):
                    continue
                if family == "relation" and not _the_longer_way(picked, pool, scene):
                    continue
                yield ("count", len(picked), pool) if rng.random() < 0.5 else ("every", pool)


def _heads(scene: Scene, item: int, family: str, preset: Preset, rng: Random) -> Iterator[tuple]:
    """What a family wraps round the filters."""
    if family == "attribute":
        yield ()
    elif family == "location":
        yield from (("location", side) for side in rng.sample(list(AXES), len(AXES)))
    else:
        yield from anchored(item, scene, "attribute", preset, rng)


def _the_longer_way(picked: tuple[int, ...], pool: Program, scene: Scene) -> bool:
    _, side, anchor, _ = pool
    (index,) = execute(anchor, scene)
    return all(direction(scene[i], scene[index]) == side for i in picked)


def _none(scene: Scene, allowed: Sequence[int], preset: Preset, rng: Random) -> Iterator[Described]:
    """Alter one value of a true description so that nothing matches; or give up on the scene.

    In six of ten tries the new value must be one that another object has: where a word alone, true of nothing
    in the picture, gives a sentence away, there is little to learn.
    """
    wanted = rng.random() < 0.6
    for _ in range(10):
        altered = _alterations(_true(scene, preset, rng), scene, preset)
        false = [
            program
            for known, program in altered
            if known == wanted and execute(program, scene) == () and _thinkable(program)
        ]
        if false:
            yield Described((), rng.choice(false))


def _true(scene: Scene, preset: Preset, rng: Random) -> Program:
    """Draw what could be said of the scene, uniquely or not.

    Half of it names two attributes or more, needed or not: only then can each be found in the picture, and no
    object have all.
    """
    items = [i for i in rng.sample(range(len(scene)), len(scene)) if scene[i].shape not in preset.unsaid]
    if items and rng.random() < 0.5:
        full = [p for p in named(scene[items[0]], preset, rng) if len(list(reductions(p))) > 1]
        return full[0]
    tried = _one if rng.random() < 0.7 else _several
    return next((found.program for found in tried(scene, items, preset, rng)), ("all",))


def _alterations(program: Program, scene: Scene, preset: Preset) -> Iterator[tuple[bool, Program]]:
    """Every program with one value changed, and whether some object of the scene has the new value.

    A value is a filter's or the side of a location or relation; anchors and pairs stay: one that names
    nothing leaves the program undecided.
    """
    if program == ("all",) or program[0] == "and":
        return
    *head, inner = program
    if head[0] == "filter":
        values = _values(preset)[head[1]]
        present = {getattr(item, head[1]) for item in scene}
        yield from (
            (value in present, ("filter", head[1], value, inner)) for value in values if value != head[2]
        )
    elif head[0] in ("location", "relation"):
        yield True, (head[0], OPPOSITE[head[1]], *head[2:], inner)
    yield from ((known, (*head, altered)) for known, altered in _alterations(inner, scene, preset))


def _values(preset: Preset) -> dict[str, tuple[str, ...]]:
    """Attribute -> what a sentence may say of it."""
    return {
        "shape": tuple(shape for shape in preset.shapes if shape not in preset.unsaid),
        "colour": preset.colours,
        "size": tuple(preset.scales),
        "pattern": tuple(preset.patterns),
        "second": preset.colours,
    }


def _thinkable(program: Program) -> bool:
    """Say whether an object could be so; no plain star has red spots, and no red one."""
    said = {}
    while program != ("all",):
        if program[0] == "filter":
            said[program[1]] = program[2]
        program = program[-1]
    second = said.get("second")
    return second is None or (said.get("colour") != second and said.get("pattern") != "plain")


def _drawn(weights: dict[str, float], rng: Random) -> Iterator[str]:
    """Draw all keys by weight, one after another."""
    left = dict(weights)
    while left:
        key = rng.choices(list(left), list(left.values()))[0]
        del left[key]
        yield key
