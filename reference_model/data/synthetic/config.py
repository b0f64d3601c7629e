"""The settings of `generate`. Torch-free: importing this module loads the standard library alone."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class GenerateConfig:
    """Generate a data set of procedural scenes in the layout of REFER or gRefCOCO.

    The files depend on every field but `root`, `workers` and `json`.
    """

    root: Path
    """Folder to write, as one piece; it must be absent, empty, or made with these very settings."""

    scenes: Literal["easy", "standard"] = "easy"
    """`easy`: 2-4 large objects, 4 shapes, 4 colours, short sentences without relations.
    `standard`: 4-8 objects, 10 shapes, 8 colours, 2 sizes, all families of sentences."""

    targets: Literal["one", "any"] = "one"
    """`one`: each sentence means one object; REFER's layout, data.dataset refcoco.
    `any`: some 59 per cent of the sentences mean one object, 29 several and 12 none, as gRefCOCO's do; its
    layout, data.dataset grefcoco. A sentence that means none is true of the picture but for one word."""

    size: int = 128
    """Height and width of every picture, pixels, in [32, 2048]."""

    train: int = 2000
    """Pictures of the train split, at least 0."""

    val: int = 200
    """Pictures of the val split, at least 0."""

    test: int = 200
    """Pictures of testA and of testB, each, at least 0. Targets are of the first half of the preset's
    shapes in testA (where RefCOCO has people) and of the second half in testB."""

    seed: int = 0
    """At least 0. Picture i of a split draws from (seed, split, i) alone."""

    workers: int = 1
    """Processes that make pictures, at least 1; the bytes are the same for any number."""

    json: bool = False
    """Print the result as JSON."""
