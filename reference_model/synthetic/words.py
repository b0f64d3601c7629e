"""From a program to a sentence: lower-case words out of a small, closed vocabulary."""

from random import Random

from reference_model.synthetic.kinds import PRESETS
from reference_model.synthetic.program import Program

NOUNS = ("object", "shape", "thing")
SIZES = {"small": ("small", "little"), "large": ("large", "big")}
EXTREMES = {
    ("scale", "max"): ("largest", "biggest"),
    ("scale", "min"): ("smallest", "tiniest"),
    ("x", "min"): ("leftmost", "left most"),
    ("x", "max"): ("rightmost", "right most"),
    ("y", "min"): ("topmost", "highest"),
    ("y", "max"): ("lowest", "bottom most"),
}
FAR = {
    ("x", "min"): ("on the far left", "furthest left"),
    ("x", "max"): ("on the far right", "furthest right"),
    ("y", "min"): ("at the very top", "closest to the top"),
    ("y", "max"): ("at the very bottom", "closest to the bottom"),
}
SIDES = {
    "left": ("on the left", "on left", "on the left side", "in the left half"),
    "right": ("on the right", "on right", "on the right side", "in the right half"),
    "top": ("at the top", "at top", "in the upper half"),
    "bottom": ("at the bottom", "at bottom", "in the lower half"),
}
CORNERS = ("in the {down} {across}", "at the {down} {across}", "at {down} {across}")
RELATIONS = {
    "left": ("left of", "to the left of"),
    "right": ("right of", "to the right of"),
    "top": ("above", "higher than"),
    "bottom": ("below", "under", "lower than"),
}

MARKED = {"plain": ("plain",), "striped": ("striped", "banded"), "spotted": ("spotted", "dotted")}
"""Pattern -> adjectives, where nothing is said of the second colour."""
MARKS = {"striped": ("stripes", "bands"), "spotted": ("spots", "dots"), "": ("markings",)}
"""Pattern, or nothing said of it -> what is in the second colour; a core is the only one that is single."""

NUMBERS = ("two", "three", "four", "five", "six", "seven", "eight")
"""From 2 on."""
# "fishes", or "the fish" could be one or several.
PLURALS = {"cross": "crosses", "fish": "fishes"}


def sentence(program: Program, rng: Random) -> str:
    """Word a program; the article is left out now and then, as people do."""
    operation, *rest, inner = program if program != ("all",) else ("", program)
    if operation == "and":
        # The second article always: in "the red star and circle" both could be red.
        one, other = _noun_phrase(rest[0], rng), _noun_phrase(inner, rng)
        if " with " in other:  # "the star and the circle with spots" could mean two with spots
            one, other = other, one
        return ("the " if rng.random() < 0.7 else "") + f"{one} and the {other}"
    if operation == "every":
        words = rng.choice(("all", "all the", "the", "every"))
        return f"{words} {_noun_phrase(inner, rng, plural=words != 'every')}"
    if operation == "count":
        number = NUMBERS[rest[0] - 2]
        words = rng.choice((f"the {number}", number, "both" if number == "two" else f"all {number}"))
        return f"{words} {_noun_phrase(inner, rng, plural=True)}"
    return ("the " if rng.random() < 0.7 else "") + _noun_phrase(program, rng)


def _noun_phrase(program: Program, rng: Random, *, plural: bool = False, nested: bool = False) -> str:
    adjectives: dict[str, str] = {}
    noun, front, behind, sides = rng.choice(NOUNS), [], [], []
    said: dict[str, str] = {}
    relations: list[str] = []
    while program != ("all",):
        operation, first, *rest, inner = program
        if operation == "filter" and first == "shape":
            noun = rest[0]
        elif operation == "filter" and first in ("pattern", "second"):
            said[first] = rest[0]
        elif operation == "filter":
            adjectives[first] = rest[0] if first == "colour" else rng.choice(SIZES[rest[0]])
        elif operation == "superlative":
            place_it_behind = first != "scale" and rng.random() < 0.4
            table, where = (FAR, behind) if place_it_behind else (EXTREMES, front)
            where.append(rng.choice(table[first, rest[0]]))
        elif operation == "location":
            sides.append(first)
        else:
            article = "the " if rng.random() < 0.9 else ""
            where = rng.choice(RELATIONS[first])
            relations.append(f"{where} {article}{_noun_phrase(rest[0], rng, nested=True)}")
        program = inner
    if relations:
        behind.append("that is " * nested + " and ".join(relations))
    if said:
        _say_pattern(said, adjectives, behind, rng, plural=plural)
    if len(sides) == 2:
        behind.append(rng.choice(CORNERS).format(across=sides[0], down=sides[1]))
    elif sides and rng.random() < 0.3:
        front.append(sides[0])
    elif sides:
        behind.append(rng.choice(SIDES[sides[0]]))
    if len(adjectives) and noun in NOUNS and rng.random() < 0.5:
        noun = "one"
    noun = PLURALS.get(noun, f"{noun}s") if plural else noun
    adjective = [adjectives[name] for name in ("size", "pattern", "colour") if name in adjectives]
    return " ".join([*front, *adjective, noun, *behind])


def _say_pattern(
    said: dict[str, str], adjectives: dict[str, str], behind: list[str], rng: Random, *, plural: bool
) -> None:
    """Word a pattern, a second colour or both, as an adjective or first of what stands behind the noun."""
    pattern, second = said.get("pattern", ""), said.get("second", "")
    if pattern in MARKED and not second:
        adjectives["pattern"] = rng.choice(MARKED[pattern])
        return
    if pattern == "cored":
        article = "an" if second == "orange" else "a"
        words = f"{second} cores" if plural else f"{article} {second} core"
    else:
        words = f"{second} {rng.choice(MARKS[pattern])}"
    behind.insert(0, " ".join(f"with {words}".split()))


def _vocabulary() -> frozenset[str]:
    tables = (SIZES, EXTREMES, FAR, SIDES, RELATIONS, MARKED, MARKS)
    phrases = [phrase for table in tables for phrases in table.values() for phrase in phrases]
    named = [name for preset in PRESETS.values() for name in (*preset.shapes, *preset.colours)]
    corners = " ".join(CORNERS).format(across="left", down="top")
    return frozenset(
        " ".join(["the one that is with a an core and", corners, *NOUNS, *phrases, *named]).split()
    )


VOCABULARY = _vocabulary()
"""Every word that a sentence of any preset can hold."""

PLURAL_VOCABULARY = frozenset(
    ["all", "both", "every", "cores", *NUMBERS]
    + [PLURALS.get(noun, f"{noun}s") for noun in ("one", *NOUNS, *PRESETS["standard"].shapes)]
)
"""Every other word that a sentence about several objects can hold."""
