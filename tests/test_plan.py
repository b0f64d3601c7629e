"""The plan past one machine: its formulas against a ring that is run, and its table against the formulas."""

from itertools import pairwise

import pytest

from benchmarks.plan import Assumptions, plan, ring_bytes, text


@pytest.mark.parametrize("n", [2, 3, 8])
def test_ring_sends_what_an_all_reduce_of_chunks_sends(n):
    """Reduce-scatter and all-gather, chunk by chunk: each GPU ends with the sum, having sent this much."""
    values = [[float(10 * rank + chunk) for chunk in range(n)] for rank in range(n)]
    total = [sum(column) for column in zip(*values, strict=True)]
    sent = [0] * n
    for gathering in (False, True):
        for hop in range(n - 1):
            moving = [(rank, (rank - hop + gathering) % n) for rank in range(n)]
            chunks = [(rank, chunk, values[rank][chunk]) for rank, chunk in moving]
            for rank, chunk, value in chunks:
                right = (rank + 1) % n
                values[right][chunk] = value if gathering else values[right][chunk] + value
                sent[rank] += 1
    assert values == [total] * n
    assert {ring_bytes(n, n, 2)} == {float(count) for count in sent}


def test_plan_scales_as_it_says():
    given = Assumptions(peak=1e12, utilisation=0.5, batch=4, hop=0.0)
    rows = plan(parameters=10**6, macs=1e9, kept=2**30, given=given)
    alone, last = rows[0], rows[-1]
    assert alone.gpus == 1 and last.gpus == 1024 and last.sentences == 4096
    assert alone.compute_ms == pytest.approx(1e3 * 4 * 3 * 2e9 / 0.5e12)
    assert alone.exposed_ms == 0 and alone.efficiency == 1
    assert all(a.efficiency >= b.efficiency for a, b in pairwise(rows))
    assert last.images_per_second == pytest.approx(1024 * alone.images_per_second * last.efficiency)
    assert alone.memory_ddp == alone.memory_fsdp == last.memory_ddp > last.memory_fsdp > 4


def test_table_prints_every_assumption():
    whole = {"part": "whole model", "parameters_M": 1.0, "GMACs": 2.0}
    profile = {"preset": "x", "image_size": 480, "tokens": 20, "parts": [whole], "model": {}}
    shown = text(profile, 2**20, Assumptions(peak=7e12, utilisation=0.11, network=33e9, nvlink=44e9))
    assert all(value in shown for value in ("7 TFLOP/s", "11%", "33 GB/s", "44 GB/s", "float32"))
    assert shown.count("\n| ") >= 11
