"""The synthetic set: sentences that mean one object, masks that are exact, files that REFER readers read."""

import dataclasses
import io
import itertools
import json
import pickle
import random
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as coco_mask

from reference_model.files import InputError
from reference_model.synthetic import generate as export
from reference_model.synthetic.config import GenerateConfig
from reference_model.synthetic.generate import generate
from reference_model.synthetic.kinds import PRESETS
from reference_model.synthetic.looks import OUTLINES, PATTERNS
from reference_model.synthetic.program import execute
from reference_model.synthetic.render import painted_ids, polygons, visible_ids
from reference_model.synthetic.scene import SceneObject, outline_area
from reference_model.synthetic.targets import KINDS
from reference_model.synthetic.words import NUMBERS, PLURAL_VOCABULARY, VOCABULARY

SIDES = {"left": ("x", -1), "right": ("x", 1), "top": ("y", -1), "bottom": ("y", 1)}

NAMED_COLOURS = {
    "red": (210, 40, 40),
    "green": (40, 160, 60),
    "blue": (40, 80, 210),
    "yellow": (245, 220, 40),
    "purple": (140, 60, 180),
    "orange": (250, 130, 20),
    "white": (250, 250, 250),
    "black": (20, 20, 20),
}


class PlainUnpickler(pickle.Unpickler):
    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"asks for {module}.{name}")


class Made:
    """A generated set, read back with nothing of the package but the drawing of its masks."""

    def __init__(self, config):
        self.config, self.root = config, config.root
        (file,) = self.root.glob("*/refs(*).p")
        self.file, self.pickled = f"{file.parent.name}/{file.name}", file.read_bytes()
        self.refs = PlainUnpickler(io.BytesIO(self.pickled)).load()
        self.instances = json.loads((file.parent / "instances.json").read_text())
        self.annotations = {a["id"]: a for a in self.instances["annotations"]}
        self.images = {i["id"]: i for i in self.instances["images"]}
        self.scenes = {s["image_id"]: s for s in json.loads((self.root / "scenes.json").read_text())}

    def sentences(self):
        for ref in self.refs:
            for sentence in ref["sentences"]:
                yield ref, whole(self.scenes[ref["image_id"]]["objects"]), sentence

    def masks(self):
        """(annotation, object as stored, exact visible mask) of every object."""
        for scene in self.scenes.values():
            items = [SceneObject(**{k: v for k, v in o.items() if k != "ann_id"}) for o in scene["objects"]]
            ids = visible_ids(painted_ids(items, self.config.size))
            for k, stored in enumerate(scene["objects"]):
                yield self.annotations[stored["ann_id"]], items[k], ids == k + 1


def whole(objects):
    """Objects as stored, with what plain ones lack there."""
    return [{"pattern": "plain", "second": ""} | o for o in objects]


OLD = ("easy", "standard")
PATTERNED = ("refcoco", "refcoco+", "gref", "hard")


@pytest.fixture(scope="module", params=[*OLD, *PATTERNED])
def made(request, tmp_path_factory):
    root = tmp_path_factory.mktemp("synthetic") / request.param
    config = GenerateConfig(root=root, scenes=request.param, train=120, val=15, test=25)
    generate(config)
    return Made(config)


def picks(program, objects, margins):
    """Ids that a program picks, by plain loops; None where `margins` asks and they leave it undecided."""
    if program == ["all"]:
        return [o["ann_id"] for o in objects]
    inner = picks(program[-1], objects, margins)
    if inner is None:
        return None
    if program[0] == "every":
        return None if len(inner) == 1 else inner
    if program[0] == "count":
        return inner if len(inner) in (0, program[1]) else None
    if program[0] == "and":
        one = picks(program[1], objects, margins)
        return sorted(one + inner) if one and len(one) == len(inner) == 1 and one != inner else None
    pool = [o for o in objects if o["ann_id"] in inner]
    operation, first = program[0], program[1]
    if operation == "filter":
        return [o["ann_id"] for o in pool if o[first] == program[2]]
    if operation == "superlative":
        best = None
        for o in pool:
            if best is None or (o[first] > best[first] if program[2] == "max" else o[first] < best[first]):
                best = o
        for o in pool:
            if o is not best and margins:
                ratio = max(o[first], best[first]) / min(o[first], best[first])
                if ratio < 1.22 if first == "scale" else abs(o[first] - best[first]) < 0.06:
                    return None
        return [] if best is None else [best["ann_id"]]
    axis, sign = SIDES[first]
    line = 0.5
    if operation == "relation":
        anchors = picks(program[2], objects, margins)
        if anchors is None or len(anchors) != 1:
            return None
        line = next(o[axis] for o in objects if o["ann_id"] == anchors[0])
        pool = [o for o in pool if o["ann_id"] != anchors[0]]
    found = []
    for o in pool:
        if margins and abs(o[axis] - line) < 0.06:
            return None
        if sign * (o[axis] - line) > 0:
            found.append(o["ann_id"])
    return found


def without_one_part(program):
    """All ways to drop one part, the parts of an anchor excepted."""
    if program != ["all"]:
        yield program[-1]
        for less in without_one_part(program[-1]):
            yield [*program[:-1], less]


def operations(program):
    while program != ["all"]:
        yield program
        if program[0] == "relation":
            yield from operations(program[2])
        program = program[-1]


def test_every_sentence_picks_its_object_alone(made):
    for ref, objects, sentence in made.sentences():
        assert picks(sentence["program"], objects, margins=True) == [ref["ann_id"]], sentence


def test_every_part_of_a_sentence_is_needed(made):
    def check(program, objects, answer):
        assert program != ["all"]
        for less in without_one_part(program):
            found = picks(less, objects, margins=True)
            if program[0] == "superlative":
                assert found != answer, (program, less)
            else:
                assert found is not None and len(found) >= 2, (program, less)
            if less is program[-1]:
                assert len(found) >= 2, (program, less)

    for ref, objects, sentence in made.sentences():
        check(sentence["program"], objects, [ref["ann_id"]])
        for program in operations(sentence["program"]):
            if program[0] == "relation":
                check(program[2], objects, picks(program[2], objects, margins=True))


def test_sentence_survives_moving_and_resizing_within_the_margins(made):
    rng = random.Random(0)
    step, factor = 0.029, 1.1  # two objects: 0.058 < 0.06 and 1.21 < 1.22
    for ref, objects, sentence in made.sentences():
        for _ in range(6):
            moved = [
                o
                | {axis: o[axis] + rng.choice((-step, step)) for axis in "xy"}
                | {"scale": o["scale"] * rng.choice((1 / factor, factor))}
                for o in objects
            ]
            assert picks(sentence["program"], moved, margins=False) == [ref["ann_id"]], sentence


def test_relation_names_the_longer_way(made):
    def check(program, objects, target):
        while program != ["all"]:
            if program[0] == "relation":
                (index,) = picks(program[2], objects, True)
                anchor = next(o for o in objects if o["ann_id"] == index)
                gap = {axis: abs(target[axis] - anchor[axis]) for axis in "xy"}
                assert gap[SIDES[program[1]][0]] == max(gap.values())
                check(program[2], objects, anchor)
            program = program[-1]

    for ref, objects, sentence in made.sentences():
        check(sentence["program"], objects, next(o for o in objects if o["ann_id"] == ref["ann_id"]))


def test_larger_scale_means_larger_area_and_diameter_for_any_two_shapes():
    def area_and_diameter(points):
        x, y = points.T
        area = abs(sum(x[i - 1] * y[i] - x[i] * y[i - 1] for i in range(len(x)))) / 2
        return area, max(np.hypot(*(p - q)) for p in points for q in points)

    measured = {shape: area_and_diameter(points) for shape, points in OUTLINES.items()}
    for one, other in itertools.permutations(measured.values(), 2):
        assert one[0] * 1.22**2 > other[0] and one[1] * 1.22 > other[1]


MEANINGS = {
    "left": ("left", "leftmost"),
    "right": ("right", "rightmost"),
    "top": ("top", "topmost", "highest", "upper", "above", "higher"),
    "bottom": ("bottom", "lowest", "lower", "below", "under"),
    "max": ("largest", "biggest"),
    "min": ("smallest", "tiniest"),
    "small": ("small", "little"),
    "large": ("large", "big"),
    "striped": ("striped", "banded", "stripes", "bands"),
    "spotted": ("spotted", "dotted", "spots", "dots"),
    "cored": ("core", "cores"),
    "plain": ("plain",),
}


def test_words_say_what_the_program_says(made):
    meanings = {word: meaning for meaning, words in MEANINGS.items() for word in words}
    meanings |= {name: name for p in PRESETS.values() for name in (*p.shapes, *p.colours)}
    ends = {("x", "min"): "left", ("x", "max"): "right", ("y", "min"): "top", ("y", "max"): "bottom"}
    for _, _, sentence in made.sentences():
        said = Counter(meanings[word] for word in sentence["tokens"] if word in meanings)
        meant = Counter()
        for operation, first, *rest in operations(sentence["program"]):
            if operation == "filter":
                meant[rest[0]] += 1
            elif operation == "superlative":
                meant[ends.get((first, rest[0]), rest[0])] += 1
            else:
                meant[first] += 1
        assert said == meant, sentence


def test_vocabulary_is_closed_small_and_lower_case(made):
    words = {word for _, _, sentence in made.sentences() for word in sentence["tokens"]}
    assert words <= VOCABULARY and len(VOCABULARY) <= 90
    assert all(word.isascii() and word.isalpha() and word.islower() for word in VOCABULARY)
    assert max(len(sentence["tokens"]) for _, _, sentence in made.sentences()) <= 18


def test_families_of_the_preset_all_occur(made):
    scenes, programs = made.config.scenes, [s["program"] for _, _, s in made.sentences()]
    heads = Counter(program[0] for program in programs)
    heads["size"] = sum(program[:2] == ["superlative", "scale"] for program in programs)
    heads["place"] = heads["location"] + heads["superlative"] - heads["size"]
    wanted = {
        "easy": {"filter": 0.1, "size": 0.1, "place": 0.1},
        "standard": {"filter": 0.1, "size": 0.1, "place": 0.1, "relation": 0.1},
        "refcoco": {"filter": 0.1, "place": 0.5},
        "refcoco+": {"filter": 0.5, "size": 0.05},
        "gref": {"relation": 1.0},
        "hard": {"filter": 0.5, "relation": 0.15},
    }[scenes]
    assert all(heads[head] >= share * len(programs) for head, share in wanted.items()), heads
    assert {head for head in heads if heads[head]} <= {*wanted, "location", "superlative"} | (
        {"size"} if scenes == "refcoco" else set()
    )
    said = {op[1] for program in programs for op in operations(program) if op[0] == "filter"}
    assert said == set(PRESETS[scenes].attributes)


def test_guessing_the_largest_object_is_a_poor_baseline(made):
    areas = defaultdict(dict)
    for annotation in made.annotations.values():
        areas[annotation["image_id"]][annotation["id"]] = annotation["area"]
    hits = [max(a, key=a.get) == ref["ann_id"] for ref in made.refs for a in [areas[ref["image_id"]]]]
    assert np.mean(hits) < 0.5
    assert np.mean([len(a) >= 3 for a in areas.values()]) > 0.8


def test_splits_share_no_picture_and_test_splits_share_no_target_shape(made):
    config, splits, shapes = made.config, defaultdict(set), defaultdict(set)
    names = {c["id"]: c["name"] for c in made.instances["categories"]}
    for ref in made.refs:
        splits[ref["split"]].add(ref["image_id"])
        shapes[ref["split"]].add(names[ref["category_id"]])
    sizes = {split: len(ids) for split, ids in splits.items()}
    tests = ["test"] if config.scenes == "gref" else ["testA", "testB"]
    assert sizes == {"train": config.train, "val": config.val} | dict.fromkeys(tests, config.test)
    assert len(set().union(*splits.values())) == sum(sizes.values()) == len(made.images)
    ordered = PRESETS[config.scenes].shapes
    half = len(ordered) // 2
    if config.scenes == "gref":
        assert shapes["test"] == set(ordered)
    else:
        assert shapes["testA"] == set(ordered[:half]) and shapes["testB"] == set(ordered[half:])
    pictures = [(made.root / "images/train2014" / i["file_name"]).read_bytes() for i in made.images.values()]
    assert len(set(pictures)) == len(pictures)


def test_refs_are_plain_and_join_with_the_instances(made):
    def plain(value):
        if type(value) is dict:
            return all(type(k) is str and plain(v) for k, v in value.items())
        return type(value) in (int, str) or (type(value) is list and all(map(plain, value)))

    assert made.pickled[:2] == b"\x80\x02" and type(made.refs) is list and plain(made.refs)
    sent_ids = [i for ref in made.refs for i in ref["sent_ids"]]
    assert len(set(sent_ids)) == len(sent_ids)
    assert len({ref["ref_id"] for ref in made.refs}) == len({ref["ann_id"] for ref in made.refs})
    per_image = Counter(ref["image_id"] for ref in made.refs)
    assert set(per_image.values()) == {2, 3, 4}
    for ref in made.refs:
        annotation = made.annotations[ref["ann_id"]]
        assert (annotation["image_id"], annotation["category_id"]) == (ref["image_id"], ref["category_id"])
        stem = made.images[ref["image_id"]]["file_name"].removesuffix(".jpg")
        assert ref["file_name"] == f"{stem}_{ref['ann_id']}.jpg"
        assert [s["sent_id"] for s in ref["sentences"]] == ref["sent_ids"] and 1 <= len(ref["sent_ids"]) <= 3
        assert all(s["tokens"] == s["sent"].split() and s["sent"] in s["raw"] for s in ref["sentences"])
        assert len({s["sent"] for s in ref["sentences"]}) == len(ref["sentences"])


def decoded(rings, height, width):
    runs = coco_mask.frPyObjects([[float(v) for v in ring] for ring in rings], height, width)
    return coco_mask.decode(coco_mask.merge(runs)).astype(bool)


def test_polygons_decode_to_the_exact_visible_mask(made):
    size = made.config.size
    for annotation, _, mask in made.masks():
        rows, columns = np.nonzero(mask)
        left, top = columns.min(), rows.min()
        assert annotation["bbox"] == [left, top, columns.max() + 1 - left, rows.max() + 1 - top]
        assert annotation["area"] == mask.sum()
        np.testing.assert_array_equal(decoded(annotation["segmentation"], size, size), mask)


@given(st.integers(1, 7), st.integers(1, 7), st.integers(0, 2**49 - 1))
@settings(deadline=None)
def test_polygons_of_any_mask_cover_it_and_fill_holes_alone(height, width, bits):
    mask = np.array([bits >> k & 1 for k in range(height * width)], dtype=bool).reshape(height, width)
    rings = polygons(mask)
    if not mask.any():
        assert rings == []
        return
    outside, border = np.zeros((height + 2, width + 2), dtype=bool), [(0, 0)]
    padded = np.pad(mask, 1)
    while border:
        y, x = border.pop()
        if 0 <= y < height + 2 and 0 <= x < width + 2 and not padded[y, x] and not outside[y, x]:
            outside[y, x] = True
            border += [(y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)]
    covered = decoded(rings, height, width)
    assert (covered >= mask).all() and not (covered & outside[1:-1, 1:-1]).any()


def test_polygons_go_round_each_piece_once():
    frame = np.array([[1, 1, 1, 0, 0], [1, 0, 1, 0, 1], [1, 1, 1, 0, 0]], dtype=bool)
    assert polygons(frame) == [[0, 0, 3, 0, 3, 3, 0, 3], [4, 1, 5, 1, 5, 2, 4, 2]]


def test_scene_that_hides_an_object_is_drawn_anew(tmp_path, monkeypatch):
    crowded = dataclasses.replace(PRESETS["standard"], spacing=0.3)
    monkeypatch.setitem(PRESETS, "standard", crowded)
    config = small(tmp_path / "crowded", size=128)
    generate(config)
    shares = [mask.sum() / outline_area(item) / config.size**2 for _, item, mask in Made(config).masks()]
    assert 0.7 <= min(shares) < 0.85  # much is hidden, and never too much


def test_objects_are_seen_and_lie_where_the_scene_says(made):
    size = made.config.size
    for annotation, item, mask in made.masks():
        assert mask.sum() >= 0.7 * outline_area(item) * size**2
        if made.config.scenes == "easy":  # nothing overlaps there, so all of an object is seen
            assert mask.mean() >= 0.015
            x, y, width, height = annotation["bbox"]
            assert abs((x + width / 2) / size - item.x) <= 2 / size
            assert abs((y + height / 2) / size - item.y) <= 2 / size
            assert x > 0 and y > 0 and x + width < size and y + height < size


def test_pictures_show_each_object_in_its_colour(made):
    pixels = {}
    for image in made.images.values():
        with Image.open(made.root / "images/train2014" / image["file_name"]) as opened:
            assert opened.size == (image["width"], image["height"]) and opened.mode == "RGB"
            pixels[image["id"]] = np.asarray(opened).astype(int)
    for annotation, item, mask in made.masks():
        picture = pixels[annotation["image_id"]]
        if item.second:
            continue
        assert np.abs(np.median(picture[mask], axis=0) - item.rgb).max() <= 14, item
        nearest = {
            colour: np.abs(np.median(picture[mask], axis=0) - named).sum()
            for colour, named in NAMED_COLOURS.items()
        }
        assert min(nearest, key=nearest.get) == item.colour


def contents(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def small(root, **changes):
    return GenerateConfig(
        **{"root": root, "scenes": "standard", "size": 48, "train": 36, "val": 2, "test": 2} | changes
    )


def test_same_settings_give_same_bytes_for_any_number_of_workers(tmp_path):
    alone, again, shared = (tmp_path / name for name in ("alone", "again", "shared"))
    generate(small(alone))
    generate(small(again))
    generate(small(shared, workers=2))
    assert contents(alone) == contents(again) == contents(shared)


def test_picture_depends_on_seed_split_and_index_alone(tmp_path):
    def pictures(name, **changes):
        root = generate(small(tmp_path / name, **changes))
        found = defaultdict(list)
        for scene in json.loads((root / "scenes.json").read_text()):
            file = root / "images/train2014" / f"COCO_train2014_{scene['image_id']:012d}.jpg"
            found[scene["split"]].append(file.read_bytes())
        return found

    few, many, other = pictures("few", train=2), pictures("many", train=5, val=4), pictures("other", seed=1)
    for split in few:
        assert many[split][:2] == few[split]
        assert not set(few[split]) & set(other[split])


@pytest.mark.parametrize("scenes", ["easy", "standard"])
def test_smallest_size_still_shows_every_object(tmp_path, scenes):
    made = Made(small(generate(small(tmp_path / "tiny", scenes=scenes, size=32)), scenes=scenes, size=32))
    assert all(annotation["area"] >= 4 for annotation in made.annotations.values())
    for annotation, _, mask in made.masks():
        np.testing.assert_array_equal(decoded(annotation["segmentation"], 32, 32), mask)


def test_root_made_with_same_settings_is_left_alone(tmp_path, monkeypatch, capsys):
    root = generate(small(tmp_path / "set", train=2))
    monkeypatch.setattr(export, "picture", None)
    assert generate(small(root, train=2, workers=2)) == root
    assert f"{root}: up to date" in capsys.readouterr().err


def test_root_that_holds_something_else_is_refused_and_kept(tmp_path):
    root = generate(small(tmp_path / "set", train=2))
    before = contents(root)
    with pytest.raises(InputError, match=r"holds a set with train=2 \(asked for 3\), seed=0 \(asked for 5\)"):
        generate(small(root, train=3, seed=5))
    assert contents(root) == before
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("mine")
    for place in (foreign, foreign / "thesis.txt"):
        with pytest.raises(InputError, match="was not made by generate; choose another root"):
            generate(small(place))
    assert contents(foreign) == {"thesis.txt": b"mine"}


def test_interrupted_run_leaves_nothing(tmp_path, monkeypatch):
    drawn = []

    def interrupted(*args):
        drawn.append(args)
        if len(drawn) == 3:
            raise KeyboardInterrupt
        return export_picture(*args)

    export_picture = export.picture
    monkeypatch.setattr(export, "picture", interrupted)
    with pytest.raises(KeyboardInterrupt):
        generate(small(tmp_path / "set"))
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    (tmp_path / "set").mkdir()  # an empty folder is a place like any other
    assert len(contents(generate(small(tmp_path / "set", train=2)))) == 2 + 2 + 2 * 2 + 4


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"size": 31}, r"size must be a whole number in \[32, 2048\], got 31"),
        ({"size": 64.0}, r"size must be a whole number in \[32, 2048\], got 64.0"),
        ({"train": -1}, r"train must be a whole number in \[0, \d+\], got -1"),
        ({"val": -5}, r"val must be .* got -5"),
        ({"test": -1}, r"test must be .* got -1"),
        ({"seed": -1}, r"seed must be .* got -1"),
        ({"workers": 0}, r"workers must be a whole number in \[1, \d+\], got 0"),
        ({"scenes": "harder"}, r"scenes must be one of \['easy', 'standard', .*'hard'\], got 'harder'"),
        ({"layout": "coco"}, r"layout must be one of \['refer', .*'jsonl'\], got 'coco'"),
        ({"targets": "any", "layout": "cris"}, "layout cris holds .* targets is any; use layout grefer, "),
        ({"scenes": "grefcoco", "layout": "refer"}, "layout refer holds sentences about one object alone"),
        ({"unseen": 9}, r"unseen must be a whole number in \[0, 8\], got 9"),
        ({"unseen": True}, r"unseen must be a whole number in \[0, 8\], got True"),
        ({"scenes": "easy", "unseen": 3}, r"unseen must be a whole number in \[0, 2\], got 3"),
        ({"targets": "two"}, "targets must be one or any, got 'two'"),
        ({"train": 0, "val": 0, "test": 0}, "train, val and test are all 0"),
    ],
)
def test_nonsense_is_refused_by_name(tmp_path, changes, says):
    with pytest.raises(InputError, match=says):
        generate(small(tmp_path / "set", **changes))
    assert list(tmp_path.iterdir()) == []


def test_config_needs_no_torch_and_no_numpy():
    code = (
        "import sys, reference_model.synthetic.config\nprint(*{'torch', 'numpy', 'PIL'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


# ---- any number of targets: gRefCOCO's layout ---------------------------------------------------


class MadeAny:
    """A set of any targets, read back with nothing of the package."""

    def __init__(self, config):
        self.config, self.root = config, config.root
        self.refs = json.loads((self.root / "grefcoco" / "grefs(unc).json").read_text())
        self.instances = json.loads((self.root / "grefcoco" / "instances.json").read_text())
        self.annotations = {a["id"]: a for a in self.instances["annotations"]}
        self.scenes = {s["image_id"]: s for s in json.loads((self.root / "scenes.json").read_text())}

    def sentences(self, kind=None):
        for ref in self.refs:
            targets = [] if ref["ann_id"] == [-1] else ref["ann_id"]
            if kind in (None, "none" if not targets else "one" if len(targets) == 1 else "several"):
                for sentence in ref["sentences"]:
                    yield targets, whole(self.scenes[ref["image_id"]]["objects"]), sentence


@pytest.fixture(scope="module", params=[*OLD, "grefcoco"])
def made_any(request, tmp_path_factory):
    root = tmp_path_factory.mktemp("any") / request.param
    config = GenerateConfig(
        root=root, scenes=request.param, size=32, train=160, val=10, test=25, targets="any"
    )
    generate(config)
    return MadeAny(config)


def test_every_sentence_picks_exactly_its_targets(made_any):
    for targets, objects, sentence in made_any.sentences():
        assert picks(sentence["program"], objects, margins=True) == targets, sentence


def test_shares_of_the_kinds_are_those_of_grefcoco(made_any):
    found = {kind: len(list(made_any.sentences(kind))) for kind in KINDS}
    for kind, share in {"one": 0.597, "several": 0.288, "none": 0.116}.items():
        assert abs(found[kind] / sum(found.values()) - share) < 0.06, found
    several = Counter(s["program"][0] for _, _, s in made_any.sentences("several"))
    assert set(several) == {"every", "count", "and"} and min(several.values()) > 0.1 * several.total()


def with_one_value_changed(program, preset):
    """All programs with one filter's value or one side turned round; those of an anchor excepted."""
    if program != ["all"]:
        if program[0] == "filter":
            values = {
                "shape": preset.shapes,
                "colour": preset.colours,
                "size": ["small", "large"],
                "pattern": PATTERNS,
                "second": preset.colours,
            }[program[1]]
            yield from ([*program[:2], value, program[3]] for value in values if value != program[2])
        if program[0] in ("location", "relation"):
            opposite = {"left": "right", "right": "left", "top": "bottom", "bottom": "top"}[program[1]]
            yield [program[0], opposite, *program[2:]]
        for changed in with_one_value_changed(program[-1], preset):
            yield [*program[:-1], changed]


def test_sentence_without_target_is_one_word_from_a_true_one(made_any):
    preset, familiar = PRESETS[made_any.config.scenes], []
    for _, objects, sentence in made_any.sentences("none"):
        program = sentence["program"]
        assert any(picks(c, objects, margins=True) for c in with_one_value_changed(program, preset)), sentence
        filters = [op for op in operations(program) if op[0] == "filter"]
        familiar.append(all(any(o[name] == value for o in objects) for _, name, value, _ in filters))
        filters = {op[1]: op[2] for op in filters}
        if "second" in filters:  # no "plain star with red spots", no "red star with red spots"
            assert filters.get("pattern") != "plain" and filters.get("colour") != filters["second"]
    assert 0.3 < np.mean(familiar) < 0.9  # each word fits some object of the picture, and yet none fits all


def test_sentence_about_several_survives_moving_and_resizing_within_the_margins(made_any):
    rng = random.Random(0)
    for targets, objects, sentence in [*made_any.sentences("several"), *made_any.sentences("none")]:
        for _ in range(3):
            moved = [
                o
                | {axis: o[axis] + rng.choice((-0.029, 0.029)) for axis in "xy"}
                | {"scale": o["scale"] * rng.choice((1 / 1.1, 1.1))}
                for o in objects
            ]
            assert picks(sentence["program"], moved, margins=False) == targets, sentence


def test_plural_needs_each_of_its_parts(made_any):
    for targets, objects, sentence in made_any.sentences("several"):
        operation, *_, pool = sentence["program"]
        if operation != "and":
            assert all(
                picks(less, objects, margins=True) not in (targets, None) for less in without_one_part(pool)
            )


def test_plural_and_number_are_in_the_words(made_any):
    for targets, _, sentence in made_any.sentences("several"):
        words, operation = sentence["tokens"], sentence["program"][0]
        numbers = [2 + NUMBERS.index(word) for word in words if word in NUMBERS] + [2] * words.count("both")
        plural = sum(word in PLURAL_VOCABULARY - {"cores"} and word.endswith("s") for word in words)
        if operation == "count":
            assert numbers == [sentence["program"][1]] == [len(targets)] and plural == 1, sentence
        elif operation == "every":
            assert numbers == [] and plural == (words[0] != "every") and words[0] in ("all", "the", "every")
        else:
            assert numbers == [] and plural == 0 and "and the" in sentence["sent"] and len(targets) == 2
            assert "with" not in sentence["sent"].split(" and the ")[1] or sentence["sent"].count("with") == 2
    for _, _, sentence in made_any.sentences("one"):
        assert not set(sentence["tokens"]) & (PLURAL_VOCABULARY | {"and"})


def test_words_of_all_sentences_are_a_closed_small_set(made_any):
    words = {word for _, _, sentence in made_any.sentences() for word in sentence["tokens"]}
    assert words <= VOCABULARY | PLURAL_VOCABULARY and not VOCABULARY & PLURAL_VOCABULARY
    assert all(word.isascii() and word.isalpha() and word.islower() for word in PLURAL_VOCABULARY)
    assert max(len(sentence["tokens"]) for _, _, sentence in made_any.sentences()) <= 18


def test_refs_have_the_fields_of_grefcoco(made_any):
    ids = [s["sent_id"] for ref in made_any.refs for s in ref["sentences"]]
    assert ids == list(range(1, len(ids) + 1)) == [i for ref in made_any.refs for i in ref["sent_ids"]]
    said, targets_of = defaultdict(list), defaultdict(list)
    names = {i["id"]: i["file_name"] for i in made_any.instances["images"]}
    for ref in made_any.refs:
        assert ref["no_target"] is (ref["ann_id"] == [-1]) and ref["file_name"] == names[ref["image_id"]]
        found = [made_any.annotations[i] for i in ref["ann_id"] if not ref["no_target"]]
        assert ref["category_id"] == ([a["category_id"] for a in found] or [-1])
        assert all(a["image_id"] == ref["image_id"] for a in found)
        said[ref["image_id"]] += [s["sent"] for s in ref["sentences"]]
        targets_of[ref["image_id"]].append(tuple(ref["ann_id"]))
    for each in (*said.values(), *targets_of.values()):
        assert len(set(each)) == len(each)  # no sentence and no choice of targets twice in a picture


def test_targets_of_test_splits_are_of_their_shapes(made_any):
    names = {c["id"]: c["name"] for c in made_any.instances["categories"]}
    preset = PRESETS[made_any.config.scenes]
    for ref in made_any.refs:
        if not ref["no_target"]:
            assert {names[i] for i in ref["category_id"]} <= set(preset.targets(ref["split"]))


def test_any_targets_give_the_same_bytes_for_any_number_of_workers(tmp_path):
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    generate(small(alone, targets="any"))
    generate(small(shared, targets="any", workers=2))
    assert contents(alone) == contents(shared)


def test_sets_made_before_there_were_targets_stay_up_to_date(tmp_path, monkeypatch, capsys):
    root = generate(small(tmp_path / "set", train=2, targets="one"))
    written = (root / "generated.json").read_text()
    assert written == (
        '{"version":1,"scenes":"standard","size":48,"train":2,"val":2,"test":2,"seed":0}'  # as it was then
    )
    monkeypatch.setattr(export, "picture", None)
    assert generate(small(root, train=2)) == root
    assert f"{root}: up to date" in capsys.readouterr().err
    with pytest.raises(InputError, match=r"holds a set with targets='one' \(asked for 'any'\); choose"):
        generate(small(root, train=2, targets="any"))


def test_set_of_any_targets_is_not_taken_for_one_of_single_targets(tmp_path):
    root = generate(small(tmp_path / "set", train=2, targets="any"))
    assert json.loads((root / "generated.json").read_text())["targets"] == "any"
    with pytest.raises(InputError, match=r"holds a set with targets='any' \(asked for 'one'\); choose"):
        generate(small(root, train=2))


@pytest.mark.parametrize(
    ("program", "answer"),
    [
        (("every", ("filter", "colour", "red", ("all",))), (0, 1)),
        (("every", ("filter", "colour", "blue", ("all",))), None),  # there is one
        (("every", ("filter", "colour", "green", ("all",))), ()),
        (("count", 2, ("filter", "colour", "red", ("all",))), (0, 1)),
        (("count", 3, ("filter", "colour", "red", ("all",))), None),
        (("count", 2, ("filter", "colour", "green", ("all",))), ()),
        (("and", ("filter", "colour", "blue", ("all",)), ("filter", "shape", "star", ("all",))), (1, 2)),
        (("and", ("filter", "colour", "blue", ("all",)), ("filter", "colour", "red", ("all",))), None),
        (("and", ("filter", "colour", "green", ("all",)), ("filter", "shape", "star", ("all",))), None),
        (("and", ("filter", "colour", "blue", ("all",)), ("filter", "shape", "square", ("all",))), None),
    ],
)
def test_number_and_plural_must_fit_the_scene(program, answer):
    looks = (("circle", "red"), ("star", "red"), ("square", "blue"))
    scene = [
        SceneObject(*look, "large", 0.2 + 0.3 * k, 0.5, 0.2, 0.0, (0, 0, 0)) for k, look in enumerate(looks)
    ]
    assert execute(program, scene) == answer
    stored = [item._asdict() | {"ann_id": k} for k, item in enumerate(scene)]
    found = picks(json.loads(json.dumps(program)), stored, margins=True)
    assert found == (None if answer is None else list(answer))
