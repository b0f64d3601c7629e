"""Files are written whole or not at all."""

import errno
import os

import pytest

from reference_model.files import InputError, written_whole


def test_file_appears_whole_and_replaces_the_old_one(tmp_path):
    target = tmp_path / "new" / "file.txt"
    for text in ("one", "two"):
        with written_whole(target) as path:
            path.write_text(text)
        assert target.read_text() == text
    assert os.listdir(target.parent) == ["file.txt"]


def test_interrupted_write_leaves_the_old_file_and_no_litter(tmp_path):
    target = tmp_path / "file.txt"
    target.write_text("old")

    def interrupted():
        with written_whole(target) as path:
            path.write_text("half of the n")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["file.txt"]


def test_folder_is_replaced_as_one(tmp_path):
    target = tmp_path / "folder"
    for names in (["a", "b"], ["c"]):
        with written_whole(target) as path:
            path.mkdir()
            for name in names:
                (path / name).write_text(name)
        assert sorted(os.listdir(target)) == names


def test_unwritable_place_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(InputError, match=r"file/below/x.txt: cannot be written"),
        written_whole(tmp_path / "file" / "below" / "x.txt") as path,
    ):
        path.write_text("")


def test_file_in_the_way_of_a_folder_is_named(tmp_path):
    (tmp_path / "taken").write_text("mine")
    with (
        pytest.raises(InputError, match="taken: cannot be written"),
        written_whole(tmp_path / "taken") as path,
    ):
        path.mkdir()
    assert (tmp_path / "taken").read_text() == "mine"


def test_full_disk_is_named_and_leaves_nothing(tmp_path):
    def fill():
        with written_whole(tmp_path / "file.txt"):
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(InputError, match=r"file\.txt: cannot be written \(No space left on device\)"):
        fill()
    assert os.listdir(tmp_path) == []


def test_link_is_followed_and_pipes_are_refused(tmp_path):
    (tmp_path / "file.txt").write_text("old")
    (tmp_path / "link").symlink_to("file.txt")
    with written_whole(tmp_path / "link") as path:
        path.write_text("new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "file.txt").read_text() == "new"
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="neither a file nor a folder"), written_whole(tmp_path / "pipe"):
        pass
