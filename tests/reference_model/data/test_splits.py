"""Parts by seen and unseen classes: exactly the records of those classes, in the order of the file."""

import json
from types import MappingProxyType

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reference_model.data.readers.reader import Reader
from reference_model.data.records import Record
from reference_model.data.splits import COCO, LISTS, SEEN, UNSEEN, part_of, seen_and_unseen
from reference_model.files import InputError

ids = st.integers(0, 95)
numbers = ids | st.lists(ids, max_size=3).map(tuple)


class InMemory(Reader):
    """Records of given classes: split -> their category ids."""

    def __init__(self, source, by_split, categories=MappingProxyType({})):
        super().__init__(source)
        self.by_split = by_split
        self.splits = {split: len(found) for split, found in by_split.items()}
        self.categories = dict(categories)

    def _stream(self, split):
        for index, category_id in enumerate(self.by_split[split]):
            yield Record(
                image=b"",
                height=1,
                width=1,
                expression="it",
                segmentation=[],
                split=split,
                ref_id=index,
                ann_id=index,
                image_id=index,
                sent_id=index,
                category_id=category_id,
            )


def test_lists_are_those_of_the_open_vocabulary_benchmark():
    assert len(SEEN) == 48 and len(UNSEEN) == 17
    assert not set(SEEN) & set(UNSEEN) and set(SEEN) | set(UNSEEN) < set(COCO)
    assert {id: COCO[id] for id in UNSEEN} == UNSEEN
    left = {COCO[id] for id in set(COCO) - set(SEEN) - set(UNSEEN)}
    assert len(left) == 15 and {"potted plant", "cell phone", "wine glass"} <= left


@given(st.lists(st.tuples(st.sampled_from(["train", "val", "testA", "testB"]), numbers), max_size=30))
@settings(deadline=None, max_examples=100)
def test_parts_hold_exactly_the_records_of_their_classes(tmp_path_factory, drawn):
    by_split: dict[str, list] = {split: [] for split in ("train", "val", "testA", "testB")}
    for split, category in drawn:
        by_split[split].append(category)
    data = InMemory(tmp_path_factory.getbasetemp() / "refs.p", by_split)
    whole = {"test": ("testA", "testB")} | {split: (split,) for split in by_split}
    for name, splits in whole.items():
        for kind, classes in (("seen", SEEN), ("unseen", UNSEEN)):
            expected = []
            for split in splits:
                for index, category in enumerate(by_split[split]):
                    several = category if isinstance(category, tuple) else (category,)
                    if several and all(one in classes for one in several):
                        expected.append((split, index))
            if expected:
                found = [(r.split, r.ref_id) for r in data.records(f"{name}_{kind}")]
                assert found == expected
            else:
                with pytest.raises(InputError, match=rf"no record of .* is of {kind} classes only"):
                    data.records(f"{name}_{kind}")


@pytest.mark.parametrize(
    ("name", "splits"),
    [
        ("train_seen", ("train",)),
        ("test_unseen", ("testA", "testB")),
        ("testA_seen", ("testA",)),
        ("val_Seen", None),
        ("test", None),
        ("_seen", None),
        ("tes_seen", None),
        ("other_unseen", None),
    ],
)
def test_name_of_a_part_stands_for_whole_splits(name, splits):
    part = part_of(name, ["train", "val", "testA", "testB"])
    assert (part.splits if part else None) == splits
    assert part is None or part.seen == name.endswith("_seen")


def test_a_split_of_that_very_name_is_itself(tmp_path):
    data = InMemory(tmp_path / "refs.p", {"val": [5, 1], "val_seen": [5]})
    assert [r.category_id for r in data.records("val_seen")] == [5]
    assert [r.category_id for r in data.records("val_unseen")] == [5]
    with pytest.raises(InputError, match=r"refs.p: no split 'vall_seen'; did you mean"):
        data.records("vall_seen")


def test_other_categories_need_lists_of_their_own(tmp_path):
    data = InMemory(tmp_path / "refcoco/refs.p", {"val": [1, 2, 5]}, {1: "square", 5: "circle"})
    with pytest.raises(InputError, match=r"category 1 is 'square', not COCO's 'person'.*classes.json"):
        data.records("val_seen")
    for place in (tmp_path, tmp_path / "refcoco"):
        place.mkdir(exist_ok=True)
        (place / LISTS).write_text(json.dumps({"seen": [5], "unseen": [1]}))
        assert [r.category_id for r in data.records("val_seen")] == [5]
        assert [r.category_id for r in data.records("val_unseen")] == [1]
        (place / LISTS).unlink()


@pytest.mark.parametrize(
    "lists", [{"seen": [1], "unseen": [1]}, {"seen": [1]}, [], {"seen": ["1"], "unseen": []}, 5]
)
def test_malformed_lists_are_refused(tmp_path, lists):
    (tmp_path / LISTS).write_text(json.dumps(lists))
    with pytest.raises(InputError, match=r"classes.json"):
        seen_and_unseen(tmp_path / "refs.p", {})


def test_coco_names_and_no_names_take_the_lists_of_coco(tmp_path):
    # Also where none of the ids that are held out is named.
    with pytest.raises(InputError, match=r"category 1 is 'circle', not COCO's 'person'"):
        seen_and_unseen(tmp_path / "refs.p", {1: "circle", 2: "square", 3: "triangle"})
    for categories in ({}, COCO, {1: "person", 200: "dragon"}):
        found = seen_and_unseen(tmp_path / "refs.p", categories)
        assert found == {True: frozenset(SEEN), False: frozenset(UNSEEN)}
