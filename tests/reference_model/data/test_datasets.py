"""read: what is in a folder tells its layout, and where nothing fits the message says what is there."""

import json
import os
import pickle

import pytest
from PIL import Image

from reference_model.data.config import DataConfig
from reference_model.data.datasets import read
from reference_model.data.readers.cris import Cris
from reference_model.data.readers.grefer import GRefer
from reference_model.data.readers.jsonl import Jsonl
from reference_model.data.readers.parquet import Hub
from reference_model.data.readers.refer import Refer
from reference_model.files import InputError
from tests.reference_model.data.readers import test_cris, test_grefer, test_jsonl, test_refer
from tests.reference_model.data.readers import test_parquet as test_hub


def test_every_layout_is_told_by_what_is_there(tmp_path):
    roots = {reader: tmp_path / reader.__name__ for reader in (Refer, GRefer, Cris, Hub, Jsonl)}
    for root in roots.values():
        root.mkdir()
    test_refer.written(roots[Refer], *test_refer.refs_and_instances())
    test_grefer.written(roots[GRefer], *test_grefer.refs_and_instances())
    test_cris.written(roots[Cris], test_cris.splits())
    test_hub.written(roots[Hub], test_hub.rows())
    test_jsonl.written(roots[Jsonl], test_jsonl.entry())
    for reader, root in roots.items():
        place = root / "data.jsonl" if reader is Jsonl else root
        data = read(DataConfig(place, "grefcoco" if reader is GRefer else "refcoco"))
        assert type(data) is reader and sum(data.splits.values()) > 0
        assert str(data.source).startswith(str(root))
        split = next(iter(data.splits))  # a worker process gets a copy
        assert pickle.loads(pickle.dumps(data)).records(split) == data.records(split)


def test_files_of_refs_win_over_what_was_made_of_them(tmp_path):
    test_cris.written(tmp_path, test_cris.splits())
    test_refer.written(tmp_path, *test_refer.refs_and_instances())
    (tmp_path / "train2014.tar").touch()  # what the images came in
    assert type(read(DataConfig(tmp_path))) is Refer
    (tmp_path / "refcoco/refs(unc).p").unlink()
    assert type(read(DataConfig(tmp_path))) is Cris


def test_options_reach_the_reader(tmp_path):
    refs, instances = test_refer.refs_and_instances()
    refs[3]["ann_id"] = 77
    root = test_refer.written(tmp_path, refs, instances)
    with pytest.raises(InputError, match="names annotation 77"):
        read(DataConfig(root))
    with pytest.warns(UserWarning, match="names annotation 77"):
        data = read(DataConfig(root, text="raw", on_error="skip"))
    assert [r.expression for r in data.records("train")] == ["LEFT SQUARE", "THE SQUARE"]


def test_name_of_a_folder_without_refs_says_which_file_is_missing(tmp_path):
    (tmp_path / "grefcoco").mkdir()
    (tmp_path / "ref-zom").mkdir()
    (tmp_path / "refcoco").mkdir()
    for dataset, split_by, file in (
        ("grefcoco", "unc", r"grefs\(unc\).json"),
        ("ref-zom", "final", r"ref-zom/refs\(final\).p"),
        ("refcoco", "unc", r"refcoco/refs\(unc\).p"),
    ):
        with pytest.raises(InputError, match=rf"{file}: no such file; "):
            read(DataConfig(tmp_path, dataset, split_by))


def test_where_nothing_fits_the_message_says_what_is_there_and_what_was_looked_for(tmp_path):
    (tmp_path / "pictures").mkdir()
    with pytest.raises(InputError) as caught:
        read(DataConfig(tmp_path))
    message = str(caught.value)
    assert f"{tmp_path} holds 'pictures'" in message and "\n" not in message
    for wanted in ("refcoco/refs(...).p", "refcoco/grefs(...).json", "anns/refcoco/", ".parquet", ".tar"):
        assert wanted in message


@pytest.mark.parametrize("name", ["nowhere", "a.json", "picture.jpg", "pipe"])
def test_what_is_no_data_set_is_refused(tmp_path, name):
    (tmp_path / "a.json").write_text(json.dumps([]))
    Image.new("RGB", (4, 4)).save(tmp_path / "picture.jpg")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match=rf"{name}: (no such file or folder|is a )"):
        read(DataConfig(tmp_path / name))
