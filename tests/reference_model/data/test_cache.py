"""The shared cache: a row is read as it was written, by any process of a family; none is read half."""

import errno
import os
import pickle
import warnings
from multiprocessing import get_context

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reference_model.data import cache as cache_module
from reference_model.data.cache import SharedCache
from reference_model.files import InputError


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_rows_are_what_was_last_written_and_none_before(data):
    rows, width = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 9))
    cache, expected = SharedCache(rows, width), {}
    byte = st.integers(0, 255)
    for row in data.draw(st.lists(st.integers(0, rows - 1), max_size=12)):
        values = np.array(data.draw(st.lists(byte, min_size=width, max_size=width)), np.uint8)
        cache.write(row, values)
        expected[row] = values
    for row in range(rows):
        found = cache.read(row)
        if row in expected:
            np.testing.assert_array_equal(found, expected[row])
            found[:] = 0  # a copy of its own
            np.testing.assert_array_equal(cache.read(row), expected[row])
        else:
            assert found is None


def add_nine(cache):
    cache.write(2, cache.read(0) + 9)


@pytest.mark.parametrize("start", ["fork", "spawn", "forkserver"])
def test_processes_share_rows_however_they_start_and_pickled_copies_do_not(start):
    cache = SharedCache(3, 4)
    cache.write(0, np.arange(4, dtype=np.uint8))
    child = get_context(start).Process(target=add_nine, args=(cache,))
    child.start()
    child.join()
    assert child.exitcode == 0 and cache.read(1) is None
    assert cache.read(2).tolist() == [9, 10, 11, 12]
    copy = pickle.loads(pickle.dumps(cache))
    assert copy.read(0) is None
    copy.write(0, np.zeros(4, np.uint8))
    assert cache.read(0).tolist() == [0, 1, 2, 3]


def test_row_without_its_mark_is_not_read():
    cache = SharedCache(2, 4)
    os.pwrite(cache._file.fileno(), b"\0abcd", 5)  # what a process that was killed while writing leaves
    assert cache.read(1) is None


def test_file_has_no_name(tmp_path, monkeypatch):
    monkeypatch.setattr(cache_module.tempfile, "tempdir", str(tmp_path))
    cache = SharedCache(1, 1000)
    cache.write(0, np.ones(1000, np.uint8))
    assert list(tmp_path.iterdir()) == [] and cache.read(0).all()


def test_disk_without_room_for_all_is_refused_at_once_and_names_both_sizes():
    taken = SharedCache(1, 10**8)
    assert os.fstat(taken._file.fileno()).st_blocks * 512 >= 10**8
    with pytest.raises(InputError, match=r"cache: takes 1000000.0 GB, but .* has .* GB left .*; set TMPDIR"):
        SharedCache(10**6, 10**9)


@pytest.mark.parametrize("short", [False, True])
def test_disk_that_becomes_full_is_told_once_and_nothing_is_kept_by_halves(monkeypatch, short):
    cache = SharedCache(3, 4)
    cache.write(0, np.arange(4, dtype=np.uint8))

    pwrite = os.pwrite

    def full(number, values, offset):
        if len(values) == 1:  # a mark has room
            return pwrite(number, values, offset)
        if not short:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return len(values) - 1

    monkeypatch.setattr(cache_module.os, "pwrite", full)
    with pytest.warns(UserWarning, match="takes no more.*made again each time"):
        cache.write(1, np.ones(4, np.uint8))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cache.write(2, np.ones(4, np.uint8))
    assert cache.read(0).tolist() == [0, 1, 2, 3] and cache.read(1) is None and cache.read(2) is None
