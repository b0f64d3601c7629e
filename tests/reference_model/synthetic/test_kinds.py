"""What each kind of scenes is for: words and places, marks on bodies, hops, hard scenes, unseen shapes."""

import dataclasses
import itertools
import json
import pickle
from collections import defaultdict

import numpy as np
import pytest
from PIL import Image, ImageDraw

from reference_model.files import InputError
from reference_model.synthetic.config import GenerateConfig
from reference_model.synthetic.generate import generate
from reference_model.synthetic.kinds import PRESETS
from reference_model.synthetic.looks import MARKINGS, OUTLINES, PATTERNS
from reference_model.synthetic.render import marked_ids, painted_ids
from reference_model.synthetic.scene import SceneObject
from tests.reference_model.synthetic.test_generate import (
    MEANINGS,
    NAMED_COLOURS,
    PATTERNED,
    SIDES,
    Made,
    contents,
    operations,
    picks,
    small,
)


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """A made set of each preset about single objects, made when asked for."""
    sets = {}

    def get(scenes):
        if scenes not in sets:
            config = GenerateConfig(root=tmp_path_factory.mktemp("sets") / scenes, scenes=scenes, train=90)
            config = dataclasses.replace(config, targets="one", layout="refer", val=10, test=10, size=96)
            generate(config)
            sets[scenes] = Made(config)
        return sets[scenes]

    return get


LOCATION = set().union(*(MEANINGS[side] for side in SIDES)) | {"far", "furthest", "closest", "side", "half"}


def test_refcoco_plus_has_no_word_of_location(sets):
    for _, _, sentence in sets("refcoco+").sentences():
        assert not LOCATION & set(sentence["tokens"]), sentence
        assert all(
            op[0] == "filter" or op[:2] == ["superlative", "scale"] for op in operations(sentence["program"])
        )


def test_refcoco_is_short_and_mostly_says_where(sets):
    said = [s for _, _, s in sets("refcoco").sentences()]
    assert np.mean([bool(LOCATION & set(s["tokens"])) for s in said]) > 0.5
    assert np.mean([len(s["tokens"]) for s in said]) < 5
    assert not any(op[0] == "relation" for s in said for op in operations(s["program"]))


def test_gref_is_long_and_relational_with_hops(sets):
    said = [(o, s) for _, o, s in sets("gref").sentences()]
    assert np.mean([len(s["tokens"]) for _, s in said]) > 9
    assert all(s["program"][0] == "relation" for _, s in said)
    hops = [(o, s) for o, s in said if s["program"][2][0] == "relation"]
    both = [s for _, s in said if s["program"][-1][0] == "relation"]
    assert len(hops) > 0.15 * len(said) and len(both) > 0.08 * len(said)
    for objects, sentence in hops:
        # Not "the star below the circle that is above the star".
        program = sentence["program"]
        assert picks(program[2][2], objects, True) != picks(program, objects, True)
        assert "that is" in sentence["sent"]
    assert all(" and " in s["sent"] for s in both)


def test_hard_is_decided_by_the_marks(sets):
    """Most sentences fit several objects without stripes, spots and cores; no word alone tells the target."""

    def unmarked(program):
        if program == ["all"]:
            return program
        head = [
            unmarked(part) if part is program[2] and program[0] == "relation" else part for part in program
        ]
        if program[0] == "filter" and program[1] in ("pattern", "second"):
            return unmarked(program[-1])
        return [*head[:-1], unmarked(program[-1])]

    said = list(sets("hard").sentences())
    alone = {names: [] for names in (("shape", "colour"), ("shape",), ("colour",), ("pattern",), ("second",))}
    for ref, objects, _ in said:
        (target,) = (o for o in objects if o["ann_id"] == ref["ann_id"])
        for names, found in alone.items():
            found.append(sum(all(o[n] == target[n] for n in names) for o in objects) == 1)
    assert np.mean(alone["shape", "colour"]) < 0.2 and max(map(np.mean, alone.values())) < 0.35
    ambiguous = [picks(unmarked(s["program"]), o, margins=False) != [r["ann_id"]] for r, o, s in said]
    assert np.mean(ambiguous) > 0.85
    assert all(o["second"] for _, objects, _ in said for o in objects)


def test_no_two_objects_of_a_crossed_scene_look_the_same(sets):
    names = ("shape", "colour", "pattern", "second")
    for scene in sets("hard").scenes.values():
        looks = [tuple(o[name] for name in names) for o in scene["objects"]]
        values = [len(set(column)) for column in zip(*looks)]
        assert len(set(looks)) == len(looks) and max(values) <= 2


@pytest.mark.parametrize("scenes", PATTERNED)
def test_pictures_show_both_colours_of_an_object(sets, scenes):
    """By the nearest named colour of each pixel; of the border, whose pixels are mixed, as few as may be."""
    made, named = sets(scenes), np.array(list(NAMED_COLOURS.values()))
    names, pixels = list(NAMED_COLOURS), {}
    for image in made.images.values():
        with Image.open(made.root / "images/train2014" / image["file_name"]) as opened:
            found = np.asarray(opened).astype(int)
        pixels[image["id"]] = np.abs(found[:, :, None] - named).sum(axis=-1).argmin(axis=-1)
    shares = {pattern: [] for pattern in PATTERNS}
    for annotation, item, mask in made.masks():
        inner = mask.copy()
        for axis in (0, 1):
            inner &= np.roll(mask, 1, axis) & np.roll(mask, -1, axis)
        seen = np.bincount(pixels[annotation["image_id"]][inner], minlength=8)
        share = {name: count / seen.sum() for name, count in zip(names, seen)}
        if item.size == "small" and scenes != "hard":
            continue  # some 13 pixels wide
        if item.second:
            assert share[item.colour] > 0.3 and share[item.second] > 0.04, (item, share)
            shares[item.pattern].append(share[item.second] / share[item.colour])
        else:
            assert share[item.colour] > 0.85, (item, share)
    for pattern in PATTERNS[1:]:
        assert 0.2 < np.mean(shares[pattern]) < 0.9


def test_body_of_every_shape_shows_more_than_its_marks():
    for shape, pattern in itertools.product(OUTLINES, PATTERNS):
        item = SceneObject(shape, "red", "large", 0.5, 0.5, 0.6, 7.0, (0, 0, 0), pattern, "blue", (9, 9, 9))
        painted = painted_ids([item], 200)
        share = (marked_ids([item], painted) == 2).sum() / (painted == 1).sum()
        assert share == 0 if pattern == "plain" else 0.08 < share < 0.46, (shape, pattern, share)
        assert (marked_ids([item], painted) > 0).sum() == (painted == 1).sum()  # nothing on the background


def test_core_is_one_disc_inside_of_every_shape():
    for shape, points in OUTLINES.items():
        (core,) = MARKINGS["cored", shape]
        scale = 400
        canvas = Image.new("L", (scale, scale))
        draw = ImageDraw.Draw(canvas)
        draw.polygon(((points + 1) * scale / 2).ravel().tolist(), fill=1)
        whole_area = np.asarray(canvas).sum()
        draw.polygon(((core + 1) * scale / 2).ravel().tolist(), fill=1)
        assert np.asarray(canvas).sum() == whole_area, shape


def test_clashing_colours_never_meet_on_an_object(sets):
    found = {
        frozenset((o["colour"], o["second"]))
        for _, objects, _ in sets("refcoco+").sentences()
        for o in objects
    }
    assert all(len(pair) == 2 for pair in found)
    clashes = [
        {"red", "orange"},
        {"orange", "yellow"},
        {"yellow", "white"},
        {"blue", "purple"},
        {"red", "purple"},
    ]
    assert len(found) > 15 and not any(pair in found for pair in clashes)


def test_presets_with_patterns_hide_nothing():
    for preset in PRESETS.values():
        assert set(preset.patterns) == {"plain"} or preset.spacing >= 1


def test_scenes_grefcoco_have_any_targets_unless_told_otherwise(tmp_path):
    usual = small(tmp_path / "usual", scenes="grefcoco", train=3)
    generate(usual)
    generate(dataclasses.replace(usual, root=tmp_path / "any", targets="any", layout="grefer"))
    assert contents(tmp_path / "usual") == contents(tmp_path / "any")
    assert (tmp_path / "usual/grefcoco/grefs(unc).json").is_file()
    generate(dataclasses.replace(usual, root=tmp_path / "one", targets="one"))
    assert (tmp_path / "one/refcoco/refs(unc).p").is_file()


def test_files_bear_the_name_of_their_benchmark(sets):
    names = {scenes: sets(scenes).file for scenes in PATTERNED}
    assert names == {
        "refcoco": "refcoco/refs(unc).p",
        "refcoco+": "refcoco+/refs(unc).p",
        "gref": "refcocog/refs(umd).p",
        "hard": "refcoco/refs(unc).p",
    }


@pytest.mark.parametrize("scenes", ["gref", "hard"])
def test_patterned_scenes_give_the_same_bytes_for_any_number_of_workers(tmp_path, scenes):
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    generate(small(alone, scenes=scenes))
    generate(small(shared, scenes=scenes, workers=2))
    assert contents(alone) == contents(shared)


# ---- seen and unseen shapes ---------------------------------------------------------------------


@pytest.fixture(scope="module", params=[("standard", "one"), ("gref", "one"), ("grefcoco", "any")])
def unseen_set(request, tmp_path_factory):
    scenes, targets = request.param
    root = tmp_path_factory.mktemp("unseen") / scenes
    generate(small(root, scenes=scenes, targets=targets, train=70, val=24, test=24, unseen=4, size=32))
    return root


def refs_of(root):
    (file,) = [*root.glob("*/refs(*).p"), *root.glob("*/grefs(*).json")]
    refs = pickle.loads(file.read_bytes()) if file.suffix == ".p" else json.loads(file.read_text())
    return file, refs


def test_unseen_shapes_are_neither_meant_nor_mentioned_in_train(unseen_set):
    file, refs = refs_of(unseen_set)
    classes = json.loads((file.parent / "classes.json").read_text())
    names = {
        c["id"]: c["name"] for c in json.loads((file.parent / "instances.json").read_text())["categories"]
    }
    assert sorted(classes["seen"] + classes["unseen"]) == sorted(names) and len(classes["unseen"]) == 4
    unseen = {names[id] for id in classes["unseen"]}
    several = {"cross": "crosses", "fish": "fishes"}
    plurals = unseen | {several.get(name, f"{name}s") for name in unseen}
    meant, mentioned = defaultdict(set), defaultdict(set)
    for ref in refs:
        targets = ref["category_id"] if type(ref["category_id"]) is list else [ref["category_id"]]
        meant[ref["split"]] |= {names[id] for id in targets if id > 0}
        mentioned[ref["split"]] |= {word for s in ref["sentences"] for word in s["tokens"]}
    assert not meant["train"] & unseen and not mentioned["train"] & plurals
    assert meant["train"] == set(names.values()) - unseen
    for split in set(meant) - {"train"}:
        assert meant[split] & unseen and meant[split] - unseen and mentioned[split] & unseen, split


def test_pictures_of_train_still_show_unseen_shapes(unseen_set):
    file, _ = refs_of(unseen_set)
    classes = json.loads((file.parent / "classes.json").read_text())
    annotations = json.loads((file.parent / "instances.json").read_text())["annotations"]
    assert {a["category_id"] for a in annotations if a["image_id"] <= 70} > set(classes["unseen"])


def test_unseen_shapes_change_nothing_but_train(tmp_path):
    few, all_seen = (refs_of(generate(small(tmp_path / str(n), train=2, val=6, unseen=n)))[1] for n in (3, 0))
    said = lambda refs: [s["sent"] for ref in refs if ref["split"] != "train" for s in ref["sentences"]]
    assert said(few) == said(all_seen)
    assert not list((tmp_path / "0").rglob("classes.json"))
    assert json.loads((tmp_path / "3/generated.json").read_text())["unseen"] == 3
    with pytest.raises(InputError, match=r"holds a set with unseen=3 \(asked for 0\)"):
        generate(small(tmp_path / "3", train=2, val=6))
