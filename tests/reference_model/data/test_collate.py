"""Batches: each image once, each sentence with its own mask and words, whatever it is batched with."""

import pickle
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader
from transformers import BertTokenizer

import reference_model.data.dataset as dataset_module
from reference_model.data.collate import Collate
from reference_model.data.dataset import ReferringDataset
from reference_model.data.images import open_image
from reference_model.data.records import Record
from reference_model.data.transforms import image_pixels, resize_mask
from reference_model.files import InputError
from reference_model.tokens import tokenize

PIECES = ["un", "##believ", "##able"]
WORDS = ["left", "right", "red", "blue", "the", "square", "circle", "of", "a", "on", "top", *PIECES]
VOCAB = {word: index for index, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS])}
TOKENIZER = BertTokenizer(vocab=VOCAB)
PAD, CLS, SEP = VOCAB["[PAD]"], VOCAB["[CLS]"], VOCAB["[SEP]"]
sentences = st.lists(st.sampled_from(WORDS[: -len(PIECES)]), min_size=1, max_size=12)


def box(left, top, right, bottom):
    return [[left, top, right, top, right, bottom, left, bottom]]


@pytest.fixture
def records(tmp_path):
    """Three images of unlike size and colour; sentences 0, 1 and 3 are about the first."""
    sizes = [(20, 30), (24, 16), (18, 18)]
    paths = [tmp_path / f"{index}.png" for index in range(3)]
    for index, (path, (height, width)) in enumerate(zip(paths, sizes, strict=True)):
        Image.new("RGB", (width, height), (80 * index, 10, 200 - 80 * index)).save(path)
    objects = {0: box(2, 2, 9, 9), 1: box(11, 4, 15, 18), 2: box(0, 0, 16, 8), 3: box(3, 3, 9, 12)}
    rows = [
        (0, 0, "the red square"),
        (0, 0, "left"),
        (1, 2, "blue circle on top of a square"),
        (0, 1, "right circle"),
        (2, 3, "unbelievable"),
    ]
    return [
        Record(
            image=paths[image],
            height=sizes[image][0],
            width=sizes[image][1],
            expression=expression,
            segmentation=objects[number],
            split="train",
            ref_id=number,
            ann_id=0,  # not unique on purpose: other readers have no such ids
            image_id=image,
            sent_id=index,
            category_id=1,
        )
        for index, (image, number, expression) in enumerate(rows)
    ]


@pytest.mark.parametrize("cache", [False, True])
@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4], [4, 3, 2, 1, 0], [1, 1, 3], [2]])
def test_batch_holds_each_image_once_and_every_sentence_its_own(records, cache, order):
    dataset = ReferringDataset(records, 12, cache=cache)
    for _ in range(2):  # the second time from the cache
        batch = Collate(TOKENIZER)(dataset.__getitems__(order))
        assert batch.records == [records[index] for index in order]
        assert len(batch.images) == len({records[index].image for index in order})
        for row, index in enumerate(order):
            record = records[index]
            expected = image_pixels(open_image(record.image), 12)
            torch.testing.assert_close(batch.images[batch.image_index[row]], expected, rtol=0, atol=0)
            torch.testing.assert_close(
                batch.masks[row], torch.from_numpy(resize_mask(record.mask(), 12, 12)), rtol=0, atol=0
            )
            words = batch.token_ids[row][batch.language_mask[row]]
            assert words.tolist() == TOKENIZER(record.expression)["input_ids"]


@pytest.mark.parametrize(("cache", "decodings"), [(False, [3, 6]), (True, [3, 3])])
def test_image_of_a_batch_is_decoded_once(records, monkeypatch, cache, decodings):
    opened = []
    monkeypatch.setattr(
        dataset_module, "open_image", lambda path, **kw: opened.append(path) or open_image(path, **kw)
    )
    dataset = ReferringDataset(records, 12, cache=cache)
    for count in decodings:
        loader = DataLoader(dataset, batch_size=5, collate_fn=Collate(TOKENIZER))
        assert len(next(iter(loader)).records) == 5
        assert len(opened) == count


@pytest.mark.parametrize(("cache", "drawings"), [(False, [4, 8]), (True, [4, 4])])
def test_mask_of_several_sentences_is_drawn_once_a_batch(records, monkeypatch, cache, drawings):
    drawn = []
    whole = Record.mask
    monkeypatch.setattr(Record, "mask", lambda self, *more: drawn.append(self) or whole(self, *more))
    dataset = ReferringDataset(records, 12, cache=cache)
    for count in drawings:
        dataset.__getitems__(range(5))  # 4 objects
        assert len(drawn) == count


def test_images_may_be_bytes_and_are_told_apart_by_their_numbers(records, tmp_path):
    held = [replace(record, image=record.image.read_bytes()) for record in records]
    # Equal bytes under two numbers are two images, as two files would be.
    held.append(replace(held[0], image_id=9))
    for source in (held, [replace(one, image=Path(str(one.image))) for one in records]):
        batch = Collate(TOKENIZER)(ReferringDataset(source, 12).__getitems__(range(len(source))))
        assert len(batch.images) == len({one.image_id for one in source})
        for row in range(5):
            expected = image_pixels(open_image(records[row].image), 12)
            torch.testing.assert_close(batch.images[batch.image_index[row]], expected, rtol=0, atol=0)


def test_broken_image_stops_or_is_left_out_with_one_warning(records):
    records[0].image.write_bytes(b"garbage")
    with pytest.raises(InputError, match=r"0.png: not an image"):
        ReferringDataset(records, 12).__getitems__(range(5))
    dataset = ReferringDataset(records, 12, on_error="skip")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            items = dataset.__getitems__(range(5))
            assert [item.record for item in items] == [records[2], records[4]]
            assert len(Collate(TOKENIZER)(items).images) == 2
    assert [str(one.message) for one in caught] == [
        f"{records[0].image}: not an image of a known kind; use JPEG or PNG; its sentences are left out"
    ]
    for _ in range(2):
        with pytest.raises(InputError, match="nothing is left"):
            dataset[3]


def test_batch_of_broken_images_takes_the_next_record_and_training_goes_on(records):
    """As many batches as without the defect, so that no process waits for another."""
    records[0].image.write_bytes(b"garbage")
    dataset = ReferringDataset(records, 12, on_error="skip")
    with pytest.warns(UserWarning, match=r"0.png: not an image"):
        batches = [dataset.__getitems__(indices) for indices in ([0, 1], [3])]
    assert [[item.record for item in items] for items in batches] == [[records[2]], [records[4]]]
    loader = DataLoader(dataset, batch_size=1, collate_fn=Collate(TOKENIZER))
    assert len(list(loader)) == len(records)
    for record in records:
        record.image.write_bytes(b"garbage")
    broken = ReferringDataset(records, 12, on_error="skip")
    with (
        pytest.warns(UserWarning, match="left out"),
        pytest.raises(InputError, match=r"not an image.*nothing is left of a batch"),
    ):
        broken.__getitems__([4])


def test_broken_mask_leaves_out_its_own_sentences(records, tmp_path):
    (tmp_path / "m.png").write_bytes(b"garbage")
    mask = tmp_path / "m.png"
    spoilt = [replace(record, segmentation=mask) if record.ref_id == 0 else record for record in records]
    with pytest.raises(InputError, match=r"m.png: "):
        ReferringDataset(spoilt, 12).__getitems__(range(5))
    with pytest.warns(UserWarning, match=r"m.png: .*; its sentences are left out") as caught:
        items = ReferringDataset(spoilt, 12, on_error="skip").__getitems__(range(5))
    assert [item.record for item in items] == spoilt[2:] and len(caught) == 1


def test_loader_goes_on_past_a_broken_image(records):
    records[0].image.write_bytes(b"garbage")
    dataset = ReferringDataset(records, 12, on_error="skip")
    loader = DataLoader(dataset, batch_size=3, collate_fn=Collate(TOKENIZER))
    with pytest.warns(UserWarning, match=r"0.png"):
        sizes = [len(batch.records) for batch in loader]
    assert sizes == [1, 1]


def test_cached_masks_survive_the_way_to_another_process(records):
    dataset = ReferringDataset(records, 12, cache=True)
    list(dataset)
    # Fresh objects get fresh addresses: a cache by address would answer with another object's mask.
    moved = pickle.loads(pickle.dumps(dataset))
    for index, record in enumerate(records):
        torch.testing.assert_close(
            moved[index].mask, torch.from_numpy(resize_mask(record.mask(), 12, 12)), rtol=0, atol=0
        )


def test_what_workers_of_one_epoch_made_those_of_the_next_do_not_make_again(records, monkeypatch):
    dataset = ReferringDataset(records, 12, cache=True)
    # Workers that fork anew each time, and a parent that decodes nothing itself.
    epoch = lambda: list(DataLoader(dataset, batch_size=2, collate_fn=Collate(TOKENIZER), num_workers=2))
    first = epoch()

    def refuse(*arguments, **options):
        raise AssertionError("made again")

    monkeypatch.setattr(dataset_module, "open_image", refuse)
    monkeypatch.setattr(Record, "mask", refuse)
    for one, other in zip(first, epoch(), strict=True):
        assert one.images.equal(other.images) and one.masks.equal(other.masks)


def test_cache_hands_out_copies_that_a_caller_may_change(records):
    dataset = ReferringDataset(records, 12, cache=True)
    item = dataset[0]
    expected = item.image.clone(), item.mask.clone()
    item.image.zero_(), item.mask.logical_not_()
    torch.testing.assert_close(dataset[0].image, expected[0])
    torch.testing.assert_close(dataset[0].mask, expected[1])


def test_loader_with_a_worker_gives_the_same_batches(records):
    dataset = ReferringDataset(records, 12, cache=True)
    alone, helped = (
        list(DataLoader(dataset, batch_size=2, collate_fn=Collate(TOKENIZER), num_workers=workers))
        for workers in (0, 1)
    )
    for one, other in zip(alone, helped, strict=True):
        assert one.records == other.records
        for a, b in zip(one[:5], other[:5], strict=True):
            assert torch.equal(a, b)


def test_image_of_another_size_than_its_record_is_refused(records):
    Image.new("RGB", (5, 5)).save(records[0].image)
    with pytest.raises(InputError, match=r"0.png: has height 5 and width 5, but .* height 20 and width 30"):
        ReferringDataset(records, 12)[0]


def test_batch_moves_whole(records):
    batch = Collate(TOKENIZER)(ReferringDataset(records, 12).__getitems__([0, 2]))
    moved = batch.to("meta")
    assert all(value.device.type == "meta" for value in moved[:5]) and moved.records is batch.records
    assert batch.images.device.type == "cpu"


# ---- words --------------------------------------------------------------------------------------


@given(sentences, st.lists(sentences, max_size=4))
@settings(deadline=None, max_examples=50)
def test_padding_further_leaves_the_words_as_they_were(words, others):
    alone = tokenize(TOKENIZER, [" ".join(words)])
    among = tokenize(TOKENIZER, [" ".join(words), *map(" ".join, others)])
    n = alone.token_ids.shape[1]
    assert torch.equal(among.token_ids[0, :n], alone.token_ids[0])
    assert alone.language_mask.all() and torch.equal(among.language_mask[0, :n], alone.language_mask[0])
    assert (among.token_ids[0, n:] == PAD).all() and not among.language_mask[0, n:].any()
    assert among.language_mask.any(dim=0).all()  # padded to the longest, not beyond
    assert torch.equal(among.language_mask, among.token_ids != PAD)


def test_words_are_those_of_the_vocabulary():
    ids = tokenize(TOKENIZER, ["Unbelievable RED square"]).token_ids[0].tolist()
    assert ids == [CLS, *(VOCAB[piece] for piece in [*PIECES, "red", "square"]), SEP]


@given(st.integers(1, 40), st.integers(3, 25))
@settings(deadline=None, max_examples=50)
def test_long_sentence_is_cut_before_its_sep_and_warns(count, max_tokens):
    words = [WORDS[index % 10] for index in range(count)]
    expression = " ".join(words)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ids = tokenize(TOKENIZER, [expression], max_tokens).token_ids[0].tolist()
    assert ids == [CLS, *(VOCAB[word] for word in words[: max_tokens - 2]), SEP]
    if count + 2 > max_tokens:
        assert len(caught) == 1
        said = str(caught[0].message)
        assert expression in said and f"{count + 2} tokens" in said and f"{max_tokens} are kept" in said
    else:
        assert not caught


def test_cut_sentence_equals_what_the_tokenizer_itself_would_keep():
    long = " ".join(WORDS[:10] * 4)
    with pytest.warns(UserWarning, match="20 are kept"):
        ours = tokenize(TOKENIZER, [long, "red"])
    theirs = TOKENIZER([long, "red"], truncation=True, max_length=20, padding="longest", return_tensors="pt")
    assert torch.equal(ours.token_ids, theirs["input_ids"])
    assert torch.equal(ours.language_mask, theirs["attention_mask"].bool())


@pytest.mark.parametrize("expression", ["", "  \t\n", "\x00\x01", "\u200b"])
def test_sentence_without_words_is_refused(expression):
    with pytest.raises(InputError, match="has no word") as caught:
        tokenize(TOKENIZER, ["red square", expression])
    assert repr(expression) in str(caught.value) and "\n" not in str(caught.value)


def test_broken_unicode_is_refused():
    with pytest.raises(InputError, match=r"'\\ud800 man': not valid Unicode"):
        tokenize(TOKENIZER, ["\ud800 man"])


@pytest.mark.parametrize(
    ("expressions", "max_tokens", "error", "says"),
    [
        (["red"], 2, ValueError, "max_tokens is 2, but 2 of them are special"),
        ([], 20, ValueError, "expressions is empty"),
        ("red square", 20, TypeError, "one string, expected a list"),
    ],
)
def test_wrong_call_is_refused(expressions, max_tokens, error, says):
    with pytest.raises(error, match=says):
        tokenize(TOKENIZER, expressions, max_tokens)


def test_importing_the_data_room_loads_no_encoder_and_its_config_no_torch():
    probe = (
        "import sys, reference_model.data.config; print('torch' in sys.modules);"
        "import reference_model.data.collate, reference_model.data.datasets;"
        "print('transformers' in sys.modules, 'timm' in sys.modules, np_is := 'numpy' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert out.stdout.split() == ["False", "False", "False", "True"]


def test_record_can_be_a_key_and_differs_by_its_sentence(records):
    assert len(set(records)) == len(records)
    assert records[0] == pickle.loads(pickle.dumps(records[0])) and records[0] != records[1]
    assert np.array_equal(records[0].mask(), records[1].mask())


def test_process_ends_though_a_worker_that_leaves_sigterm_alone_is_still_there():
    code = (
        "from torch.utils.data import DataLoader\n"
        "from reference_model.processes import outlive_sigterm\n"
        "options = {'num_workers': 1, 'persistent_workers': True, 'worker_init_fn': outlive_sigterm}\n"
        "held = iter(DataLoader([1, 2], **options)); next(held)\n"
        "held.itself = held  # as an error's traceback may hold it"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
