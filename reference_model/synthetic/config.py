"""The settings of `generate`. Torch-free: importing this module loads the standard library alone."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class GenerateConfig:
    """Generate a data set of procedural scenes in the layout of REFER, gRefCOCO or another.

    The files depend on every field but `root`, `workers` and `json`.
    """

    root: Path
    """Folder to write, as one piece; it must be absent, empty, or made with these very settings."""

    scenes: Literal["easy", "standard", "refcoco", "refcoco+", "gref", "grefcoco", "hard"] = "easy"
    """`easy`: 2-4 large objects, 4 shapes, 4 colours, short sentences without relations.
    `standard`: 4-8 objects, 10 shapes, 8 colours, 2 sizes, all families of sentences.
    In the others objects may bear stripes, spots or a core of a second colour; they take 96 pixels or more.
    `refcoco`: short sentences, half of them with words of absolute location.
    `refcoco+`: appearance alone, no word of location; data.dataset refcoco+.
    `gref`: long sentences, each with one or two relations; data.dataset refcocog, data.split_by umd.
    `grefcoco`: any number of targets; data.dataset grefcoco.
    `hard`: 4-6 of the eight looks that a pattern, a second colour and a shape or a body's colour make, two
    values each, so that most sentences need the pattern or the second colour, and two words or more."""

    targets: Literal["one", "any"] | None = None
    """`one`: each sentence means one object. `any`: some 59 per cent of the sentences mean one object, 29
    several and 12 none, as gRefCOCO's do. A sentence that means none is true of the picture but for one word.
    None: `any` for the scenes grefcoco, `one` for all others."""

    layout: Literal["refer", "grefer", "grefer-pickle", "refzom", "cris", "parquet", "jsonl"] | None = None
    """`refer`: <dataset>/refs(unc).p, where G-Ref's dataset is refcocog and its file refs(umd).p.
    `grefer`: grefcoco/grefs(unc).json. `grefer-pickle`: grefcoco/grefs(unc).p.
    `refzom`: ref-zom/refs(final).p. `cris`: anns/<set>/<split>.json and masks/<set>/<ref>.png.
    `parquet`: data/<split>-*.parquet as on the Hub; takes pyarrow. `jsonl`: data.jsonl.
    None: `refer` where targets is one, else `grefer`. refer, cris and parquet hold targets one alone."""

    size: int = 128
    """Height and width of every picture, pixels, in [32, 2048]."""

    train: int = 2000
    """Pictures of the train split, at least 0."""

    val: int = 200
    """Pictures of the val split, at least 0."""

    test: int = 200
    """Pictures of testA and of testB, each, or of G-Ref's one test split, at least 0. Targets are of the
    first half of the scenes' shapes in testA (where RefCOCO has people) and of the second half in testB."""

    unseen: int = 0
    """Shapes that no sentence of the train split is about or mentions, though its pictures may show them; at
    most all but two. A file classes.json tells them, for the parts val_unseen, test_seen and so on."""

    seed: int = 0
    """At least 0. Picture i of a split draws from (seed, split, i) alone."""

    workers: int = 1
    """Processes that make pictures, at least 1; the bytes are the same for any number."""

    json: bool = False
    """Print the result as JSON."""
