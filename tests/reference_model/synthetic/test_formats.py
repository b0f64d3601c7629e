"""One made set in every layout: each reader finds the same records in files that it had no part in."""

import json
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from reference_model.data.config import DataConfig
from reference_model.data.datasets import read
from reference_model.files import InputError
from reference_model.synthetic import generate as export
from reference_model.synthetic import writers as layouts
from reference_model.synthetic.config import GenerateConfig
from reference_model.synthetic.generate import generate
from reference_model.synthetic.render import painted_ids, visible_ids
from reference_model.synthetic.scene import SceneObject
from reference_model.synthetic.writers import HOLD_ONE, LAYOUTS

SMALL = GenerateConfig(root=Path(), size=48, train=10, val=14, test=10, seed=7, unseen=2)


def reading(layout: str, root: Path, scenes: str) -> DataConfig:
    """What a user would set to read a layout."""
    own = {"refcoco+": ("refcoco+", "unc"), "gref": ("refcocog", "umd")}.get(scenes, ("refcoco", "unc"))
    dataset, split_by = {
        "grefer": ("grefcoco", "unc"),
        "grefer-pickle": ("grefcoco", "unc"),
        "refzom": ("ref-zom", "final"),
    }.get(layout, own)
    return DataConfig(
        root=root / "data.jsonl" if layout == "jsonl" else root, dataset=dataset, split_by=split_by
    )


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """A made set of scenes in a layout, made when asked for; None where pyarrow is missing."""
    made = {}

    def get(scenes, targets, layout):
        key = scenes, targets, layout
        if layout == "parquet":
            pytest.importorskip("pyarrow")
        if key not in made:
            root = tmp_path_factory.mktemp("formats") / "data"
            made[key] = generate(replace(SMALL, root=root, scenes=scenes, targets=targets, layout=layout))
        return made[key]

    return get


def sentences(root: Path) -> list[tuple]:
    """(split, picture, sentence, mask) of a REFER or gRefCOCO set, by plain loops over its files."""
    (file,) = [*root.glob("*/refs(*).p"), *root.glob("*/grefs(*).json")]
    refs = pickle.loads(file.read_bytes()) if file.suffix == ".p" else json.loads(file.read_text())
    size = json.loads((root / "generated.json").read_text())["size"]
    masks = {}
    for scene in json.loads((root / "scenes.json").read_text()):
        items = [SceneObject(**{k: v for k, v in o.items() if k != "ann_id"}) for o in scene["objects"]]
        ids = visible_ids(painted_ids(items, size))
        masks |= {o["ann_id"]: ids == k + 1 for k, o in enumerate(scene["objects"])}
    found = []
    for ref in refs:
        targets = ref["ann_id"] if type(ref["ann_id"]) is list else [ref["ann_id"]]
        mask = np.zeros((size, size), bool)
        for target in targets:
            mask |= masks.get(target, False)
        targets = () if targets == [-1] else tuple(targets)
        for sentence in ref["sentences"]:
            found.append(
                (
                    ref["split"],
                    ref["image_id"],
                    ref["ref_id"],
                    sentence["sent_id"],
                    sentence["sent"],
                    targets,
                    mask,
                )
            )
    return found


CASES = [("refcoco+", "one"), ("gref", "one"), ("standard", "one"), ("grefcoco", "any"), ("easy", "any")]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("scenes", "targets"), CASES)
def test_reader_of_every_layout_finds_the_same_records(sets, scenes, targets, layout):
    if targets == "any" and layout in HOLD_ONE:
        pytest.skip("holds one target a sentence")
    wanted = sentences(sets(scenes, targets, "refer" if targets == "one" else "grefer"))
    root = sets(scenes, targets, layout)
    data = read(reading(layout, root, scenes))
    splits = list(dict.fromkeys(split for split, *_ in wanted))
    assert set(data.splits) == set(splits)
    records = [record for split in splits for record in data.records(split)]
    assert len(records) == len(wanted) == sum(data.splits.values())
    for record, (split, image_id, ref_id, sent_id, text, ann_ids, mask) in zip(records, wanted, strict=True):
        assert (record.split, record.image_id, record.ref_id) == (split, image_id, ref_id)
        assert (record.sent_id, record.expression) == (sent_id, text)
        np.testing.assert_array_equal(record.mask(), mask)
        assert (record.height, record.width) == mask.shape
        assert Path(record.image).is_file() and Path(record.image).name.endswith(f"{image_id:012d}.jpg")
        if layout != "cris":  # it keeps no number of an annotation
            found = record.ann_id if type(record.ann_id) is tuple else (record.ann_id,)
            assert found == ann_ids
        assert record.no_target == (not mask.any())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("scenes", "targets"), [("standard", "one"), ("grefcoco", "any")])
def test_parts_of_seen_and_unseen_shapes_divide_each_split(sets, scenes, targets, layout):
    if targets == "any" and layout in HOLD_ONE:
        pytest.skip("holds one target a sentence")
    data = read(reading(layout, sets(scenes, targets, layout), scenes))
    unseen = {5, 10}  # the last of testA's shapes and of testB's
    key = lambda record: (record.ref_id, record.sent_id)
    for split in ("val", "testA", "testB"):
        seen_part, unseen_part = (data.records(f"{split}_{kind}") for kind in ("seen", "unseen"))
        by_class = {True: [], False: []}
        for record in data.records(split):
            classes = set(record.category_id if type(record.category_id) is tuple else (record.category_id,))
            if classes and (classes <= unseen or not classes & unseen):
                by_class[classes <= unseen].append(key(record))
        assert [key(r) for r in seen_part] == by_class[False] and by_class[False]
        assert [key(r) for r in unseen_part] == by_class[True] and by_class[True]
    with pytest.raises(InputError):
        data.records("train_unseen")


def test_cris_files_are_as_its_own_tools_write_them(sets):
    root = sets("gref", "one", "cris")
    refs = {
        r["ref_id"]: r
        for r in pickle.loads((sets("gref", "one", "refer") / "refcocog/refs(umd).p").read_bytes())
    }
    instances = json.loads((sets("gref", "one", "refer") / "refcocog/instances.json").read_text())
    annotations = {a["id"]: a for a in instances["annotations"]}
    assert {p.name for p in (root / "anns/refcocog_u").iterdir()} == {"train.json", "val.json", "test.json"}
    for path in (root / "anns/refcocog_u").iterdir():
        for entry in json.loads(path.read_text()):
            ref = refs.pop(entry["segment_id"])
            assert list(entry) == ["bbox", "cat", "segment_id", "img_name", "sentences", "sentences_num"]
            x, y, width, height = annotations[ref["ann_id"]]["bbox"]
            assert entry["bbox"] == [x, y, x + width, y + height] and entry["cat"] == ref["category_id"] - 1
            assert [list(s) for s in entry["sentences"]] == [["idx", "sent_id", "sent"]] * entry[
                "sentences_num"
            ]
            assert [s["idx"] for s in entry["sentences"]] == list(range(len(ref["sentences"])))
            with Image.open(root / f"masks/refcocog_u/{entry['segment_id']}.png") as mask:
                assert mask.mode == "L" and set(np.unique(mask)) == {0, 255}
    assert not refs


def test_parquet_files_have_the_columns_and_splits_of_the_hub(sets):
    parquet = pytest.importorskip("pyarrow.parquet")
    root = sets("standard", "one", "parquet")
    files = {p.name.split("-")[0]: parquet.read_table(p) for p in (root / "data").iterdir()}
    assert set(files) == {"train", "validation", "test", "testB"}  # as published: testA is called test
    columns = (
        "sent_ids file_name ann_id ref_id image_id split sentences category_id raw_anns raw_image_info "
        "raw_sentences image_path bbox captions global_image_id anns_id"
    )
    for table in files.values():
        assert table.column_names == columns.split()
        for row in table.to_pylist():
            assert json.loads(row["raw_anns"])["id"] == row["ann_id"]
            assert row["captions"] == [s["sent"] for s in json.loads(row["raw_sentences"])]
    assert set(files["test"]["split"].to_pylist()) == {"testA"}


def test_ref_zom_says_how_many_and_gives_one_as_a_number(sets):
    refs = pickle.loads((sets("easy", "any", "refzom") / "ref-zom/refs(final).p").read_bytes())
    kinds = {"zero": [], "one": [], "many": []}
    for ref in refs:
        kinds[ref["source"]].append(ref["ann_id"])
    assert all(kinds.values())
    assert all(type(a) is int for a in kinds["one"]) and all(a == [] for a in kinds["zero"])
    assert all(type(a) is list and len(a) > 1 for a in kinds["many"])


def test_jsonl_has_lists_only_where_there_are_several(sets):
    lines = [json.loads(line) for line in (sets("easy", "any", "jsonl") / "data.jsonl").open()]
    for line in lines:
        assert type(line["expression"]) is (list if type(line["sent_id"]) is list else str)
        assert (line["mask"] is None) == (line["ann_id"] == [])
        assert type(line["ann_id"]) is int or len(line["ann_id"]) != 1
    assert {type(line["expression"]) for line in lines} == {str, list}
    assert {type(line["ann_id"]) for line in lines} == {int, list}


def test_pickle_of_grefcoco_holds_what_its_json_holds(sets):
    written = json.loads((sets("easy", "any", "grefer") / "grefcoco/grefs(unc).json").read_text())
    assert (
        pickle.loads((sets("easy", "any", "grefer-pickle") / "grefcoco/grefs(unc).p").read_bytes()) == written
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_is_part_of_what_a_set_is(tmp_path, layout, monkeypatch):
    if layout == "parquet":
        pytest.importorskip("pyarrow")
    config = replace(SMALL, root=tmp_path / "set", layout=layout, train=2, val=0, test=0, unseen=0)
    generate(config)
    monkeypatch.setattr(export, "picture", None)
    assert generate(config) == config.root  # up to date
    other = "jsonl" if layout != "jsonl" else "cris"
    with pytest.raises(InputError, match=rf"layout=.* \(asked for '{other}'\)"):
        generate(replace(config, layout=other))


def test_missing_pyarrow_is_told_before_any_picture_is_made(tmp_path, monkeypatch):
    monkeypatch.setattr(layouts, "find_spec", lambda name: None)
    monkeypatch.setattr(export, "picture", None)
    with pytest.raises(
        InputError, match=r"layout parquet needs pyarrow; pip install 'metris-blocks\[data\]'"
    ):
        generate(replace(SMALL, root=tmp_path / "set", layout="parquet"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "parquet"])
def test_layouts_give_the_same_bytes_for_any_number_of_workers(tmp_path, layout):
    def contents(root):
        return {p.relative_to(root): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}

    config = replace(SMALL, train=34, val=0, test=0, layout=layout)
    alone, shared = (replace(config, root=tmp_path / str(n), workers=n) for n in (1, 2))
    assert contents(generate(alone)) == contents(generate(shared))
