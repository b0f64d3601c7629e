"""What makes the sentences of made sets hard: counts, and scores of listeners deaf to a part of them.

    python -m reference_model.synthetic.audit ROOT [ROOT ...]

A listener knows the scene graph, so that only what it is deaf to can mislead it: it takes one of the objects
that the rest of the sentence fits, at random. Objects share no pixel, so its expected mIoU is the mean of
1 / candidates where the target is among them, and 0 elsewhere. A table of them says which property of the
scenes a model must see; what it cannot say is how hard that is to see.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from reference_model.data.untrusted import read_plain_json, read_plain_pickle
from reference_model.files import InputError
from reference_model.synthetic.program import AXES
from reference_model.synthetic.scene import SceneObject, outline_area

PARTS = {"pattern": "marks", "second": "marks", "shape": "shape", "colour": "colour", "size": "size"}
"""Attribute -> kind of information; marks are stripes, spots and cores with their colours."""

KINDS = ("shape", "colour", "marks", "size", "place", "relation")
"""Kinds of information in a sentence: of size and place also the superlatives."""

Objects = list[dict[str, Any]]


def audit(root: Path | str) -> dict[str, float]:
    """Measure the sentences of a made set that are about one object.

    Args:
        root: A set with its programs: of layout refer, grefer, grefer-pickle or refzom.

    Raises:
        InputError: There is no such set.
    """
    said = list(_sentences(Path(root)))
    share = lambda answers: sum(answers) / len(said)
    scores = lambda deaf: share(_score(fits(p, o, deaf), t) for p, o, t in said)
    named = [kinds_of(program) for program, _, _ in said]
    table = {
        "sentences": len(said),
        "objects in the picture": share(len(objects) for _, objects, _ in said),
        "others of the target's shape and colour": share(
            len(_alike(o, t, "shape", "colour")) for _, o, t in said
        ),
    }
    for names in (("shape",), ("colour",), ("shape", "colour"), ("pattern", "second")):
        label = f"target alone in {' and '.join(names)}".replace("pattern and second", "marks")
        table[label] = share(not _alike(o, t, *names) for _, o, t in said)
    table["target is the largest object"] = share(_largest(o) == t for _, o, t in said)
    all_but_place = frozenset(KINDS) - {"place"}
    table["told by place alone"] = share(fits(p, o, all_but_place) == [t] for p, o, t in said)
    for kind in KINDS:
        table[f"names {kind}"] = share(kind in kinds for kinds in named)
    for kind in KINDS:
        table[f"ambiguous or wrong without {kind}"] = share(
            fits(p, o, frozenset({kind})) != [t] for p, o, t in said
        )
    table["mIoU: any object"] = share(1 / len(objects) for _, objects, _ in said)
    table["mIoU: the largest object"] = table["target is the largest object"]
    table["mIoU: hears shape and colour"] = scores(frozenset(KINDS) - {"shape", "colour"})
    for kind in KINDS:
        table[f"mIoU: deaf to {kind}"] = scores(frozenset({kind}))
    table["mIoU: hears all"] = scores(frozenset())
    return table


def fits(program: list, objects: Objects, deaf: frozenset[str]) -> list[int]:
    """Numbers of the objects that fit what is heard of a program; margins aside.

    With an anchor that could be several objects, any of them will do.
    """
    if program[0] == "all":
        return [o["ann_id"] for o in objects]
    pool = fits(program[-1], objects, deaf)
    if _kind(program) in deaf:
        return pool
    by_id = {o["ann_id"]: o for o in objects}
    operation, first, *rest = program[:-1]
    if operation == "filter":
        return [i for i in pool if _value(by_id[i], first) == rest[0]]
    if operation == "superlative":
        ends = sorted(pool, key=lambda i: by_id[i][first], reverse=rest[0] == "max")
        return ends[:1]
    axis, sign = AXES[first]
    if operation == "location":
        return [i for i in pool if sign * (by_id[i][axis] - 0.5) > 0]
    anchors = fits(rest[0], objects, deaf)
    beyond = lambda i, a: i != a and sign * (by_id[i][axis] - by_id[a][axis]) > 0
    return [i for i in pool if any(beyond(i, a) for a in anchors)]


def kinds_of(program: list) -> set[str]:
    """Kinds of information in a sentence, its anchors' included."""
    if program[0] == "all":
        return set()
    anchor = kinds_of(program[2]) if program[0] == "relation" else set()
    return {_kind(program)} | anchor | kinds_of(program[-1])


def _kind(program: list) -> str:
    operation, first = program[:2]
    if operation == "filter":
        return PARTS[first]
    if operation == "superlative" and first == "scale":
        return "size"
    return "relation" if operation == "relation" else "place"


def _value(item: dict[str, Any], name: str) -> Any:
    return item.get(name, {"pattern": "plain", "second": ""}.get(name))


def _alike(objects: Objects, target: int, *names: str) -> list[int]:
    """Other objects that are as the target in all of these."""
    (item,) = (o for o in objects if o["ann_id"] == target)
    same = [o for o in objects if all(_value(o, name) == _value(item, name) for name in names)]
    return [o["ann_id"] for o in same if o is not item]


def _largest(objects: Objects) -> int:
    areas = {o["ann_id"]: outline_area(SceneObject(**{k: o[k] for k in o if k != "ann_id"})) for o in objects}
    return max(areas, key=areas.__getitem__)


def _score(candidates: list[int], target: int) -> float:
    return 1 / len(candidates) if target in candidates else 0.0


def _sentences(root: Path) -> Iterator[tuple[list, Objects, int]]:
    """Yield program, objects of the picture and target of every sentence about one object."""
    found = [*sorted(root.glob("*/refs(*).p")), *sorted(root.glob("*/grefs(*)*"))]
    if not found or not (root / "scenes.json").is_file():
        raise InputError(f"{root}: holds no refs with programs; generate it with layout refer or grefer")
    scenes = {s["image_id"]: s["objects"] for s in read_plain_json(root / "scenes.json")}
    read = read_plain_json if found[0].suffix == ".json" else read_plain_pickle
    for ref in read(found[0]):
        targets = ref["ann_id"] if isinstance(ref["ann_id"], list) else [ref["ann_id"]]
        if len(targets) == 1 and targets != [-1]:
            for sentence in ref["sentences"]:
                yield sentence["program"], scenes[ref["image_id"]], targets[0]


def main(roots: list[str]) -> int:
    """Print a column for each set."""
    try:
        tables = [audit(root) for root in roots]
    except InputError as error:
        print(f"audit: error: {error}", file=sys.stderr)
        return 2
    if not tables:
        print((__doc__ or "").strip())
        return 2
    print(" " * 42, *(f"{Path(root).name:>10.10}" for root in roots))
    for row in tables[0]:
        cells = (f"{t[row]:10.0f}" if row == "sentences" else f"{t[row]:10.3f}" for t in tables)
        print(f"{row:42}", *cells)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
