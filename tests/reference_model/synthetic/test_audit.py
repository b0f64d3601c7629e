"""The audit of made scenes: listeners who miss a part of a sentence, and which sets that hurts."""

from dataclasses import replace
from pathlib import Path

import pytest

from reference_model.files import InputError
from reference_model.synthetic.audit import audit, fits, main
from reference_model.synthetic.config import GenerateConfig
from reference_model.synthetic.generate import generate

KEYS = ("shape", "colour", "pattern", "second", "x", "y", "scale")
OBJECTS = [
    {"ann_id": number} | dict(zip(KEYS, values))
    for number, values in enumerate(
        [
            ("star", "red", "striped", "blue", 0.2, 0.2, 0.2),
            ("star", "red", "striped", "green", 0.8, 0.3, 0.3),
            ("star", "red", "cored", "blue", 0.8, 0.8, 0.2),
            ("circle", "blue", "plain", "", 0.5, 0.6, 0.25),
        ],
        start=1,
    )
]


def where(*filters):
    program = ["all"]
    for name, value in filters:
        program = ["filter", name, value, program]
    return program


STRIPED_STAR = where(("shape", "star"), ("pattern", "striped"), ("second", "blue"))


@pytest.mark.parametrize(
    ("program", "deaf", "candidates"),
    [
        (STRIPED_STAR, (), [1]),
        (STRIPED_STAR, ("marks",), [1, 2, 3]),
        (STRIPED_STAR, ("shape",), [1]),
        (where(("pattern", "plain")), (), [4]),
        (["location", "right", where(("shape", "star"))], (), [2, 3]),
        (["location", "right", where(("shape", "star"))], ("place",), [1, 2, 3]),
        (["superlative", "x", "min", ["all"]], ("size",), [1]),
        (["superlative", "x", "min", ["all"]], ("place",), [1, 2, 3, 4]),
        (["superlative", "scale", "max", ["all"]], ("place",), [2]),
        (["superlative", "scale", "max", ["all"]], ("size",), [1, 2, 3, 4]),
        (["relation", "top", where(("colour", "blue")), ["all"]], (), [1, 2]),
        (["relation", "top", where(("colour", "blue")), ["all"]], ("relation",), [1, 2, 3, 4]),
        (
            ["relation", "top", where(("second", "blue")), ["all"]],
            ("marks",),
            [1, 2, 4],
        ),  # any anchor will do
        (["relation", "left", where(("shape", "circle")), where(("shape", "star"))], ("shape",), [1, 4]),
    ],
)
def test_listener_keeps_what_fits_all_it_hears(program, deaf, candidates):
    assert fits(program, OBJECTS, frozenset(deaf)) == candidates


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    usual = GenerateConfig(root=Path(), size=32, train=100, val=0, test=0)
    made = {}
    for scenes in ("easy", "standard", "gref", "grefcoco", "hard"):
        root = tmp_path_factory.mktemp("audit") / scenes
        made[scenes] = audit(generate(replace(usual, root=root, scenes=scenes)))
    return made


def test_who_hears_all_is_always_right_and_who_hears_less_never_more(tables):
    for table in tables.values():
        assert table["mIoU: hears all"] == 1
        for kind in ("shape", "colour", "marks", "size", "place", "relation"):
            score, named = table[f"mIoU: deaf to {kind}"], table[f"names {kind}"]
            assert score <= 1 and (score == 1) == (
                named == 0 or table[f"ambiguous or wrong without {kind}"] == 0
            )
            assert table[f"ambiguous or wrong without {kind}"] <= named
        assert table["mIoU: any object"] < table["mIoU: hears shape and colour"] < 1


def test_hard_scenes_are_hard_by_their_marks_and_the_older_ones_have_none(tables):
    for scenes in ("easy", "standard"):
        assert tables[scenes]["mIoU: deaf to marks"] == 1
        assert tables[scenes]["target alone in shape and colour"] > 0.5
    hard = tables["hard"]
    assert hard["mIoU: deaf to marks"] < 0.5 < 0.7 < hard["mIoU: deaf to relation"]
    assert hard["target alone in shape and colour"] < 0.2
    assert (
        hard["others of the target's shape and colour"]
        > 2 * tables["standard"]["others of the target's shape and colour"]
    )
    worst = min(hard, key=lambda row: hard[row] if row.startswith("mIoU: deaf") else 2)
    assert worst == "mIoU: deaf to marks"


def test_gref_is_hard_by_its_relations(tables):
    table = tables["gref"]
    assert table["names relation"] == 1 and table["mIoU: deaf to relation"] < 0.5


def test_table_has_a_column_for_each_set(tmp_path, capsys):
    roots = []
    for scenes, layout in (("easy", "refer"), ("grefcoco", "grefer-pickle"), ("grefcoco", "refzom")):
        root = tmp_path / f"{scenes}-{layout}"
        roots.append(generate(GenerateConfig(root, scenes, layout=layout, size=32, train=9, val=0, test=0)))
    capsys.readouterr()
    assert main([str(root) for root in roots]) == 0
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split() == ["easy-refer", "grefcoco-g", "grefcoco-r"]
    assert rows[0].split()[0] == "sentences" and {len(row) for row in rows} == {len(head)}
    assert all(row.split()[-1] == row.split()[-2] for row in rows)  # the same sentences in two layouts


def test_set_without_programs_is_refused_in_a_line(tmp_path, capsys):
    root = generate(GenerateConfig(tmp_path / "set", layout="jsonl", size=32, train=2, val=0, test=0))
    for place in (root, tmp_path / "nowhere"):
        with pytest.raises(InputError, match="holds no refs with programs; generate it with layout refer or"):
            audit(place)
    assert main([str(root)]) == 2 and main([]) == 2
    assert (
        capsys.readouterr().err
        == f"audit: error: {root}: holds no refs with programs; generate it with layout refer or grefer\n"
    )
