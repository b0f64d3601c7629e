"""Exact top-k of a row as a mask: radix select on order-preserving integer keys, ties by index."""

# Kernels carry no annotations: the compiler of triton refuses names of Python's types in them.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor


def select(scores: Tensor, count: Tensor, visual_mask: Tensor | None) -> Tensor:
    """(b, l, n), (b) int, (b, n) bool or None -> (b, l, n) bool with count[b] True in each row."""
    b, l, n = scores.shape
    kept = scores.new_empty(scores.shape, dtype=torch.bool)
    if kept.numel() == 0:
        return kept
    block = max(128, triton.next_power_of_2(n))
    real = count if visual_mask is None else visual_mask.view(torch.uint8)
    with torch.accelerator.device_index(scores.device.index):
        _select[(b * l,)](
            scores.contiguous(),
            count.contiguous(),
            real,
            kept.view(torch.uint8),
            l,
            n,
            real.stride(0),
            real.stride(-1),
            MASKED=visual_mask is not None,
            BLOCK=block,
            # At most 32 keys a thread. Left to itself, ptxas spills a few of them for more threads per core.
            num_warps=max(1, block // 1024),
            maxnreg=128,
        )
    return kept


@triton.jit
def _select(
    scores,
    count,
    real,
    kept,
    l,
    n,
    real_stride_b,
    real_stride_n,
    MASKED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    batch = row // l
    index = tl.arange(0, BLOCK)
    inside = index < n
    if MASKED:
        at = real + batch * real_stride_b + index.to(tl.int64) * real_stride_n
        candidate = tl.load(at, mask=inside, other=0) != 0
    else:
        candidate = inside
    score = tl.load(scores + row * n + index, mask=candidate, other=0.0).to(tl.float32)

    # Unsigned integers in the order of the scores. Integer tests throughout: no flag of the compiler can
    # flush a subnormal score to zero, and NaN of any sign and payload is one key.
    bits = score.to(tl.uint32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    # The sign bit alone is -0.0, which goes with +0.0.
    key = tl.where(bits > 0x80000000, ~bits, magnitude | 0x80000000)
    key = tl.where(magnitude > 0x7F800000, 0xFFFFFFFF, key)
    # Below every score, -inf too: its key is 0x007FFFFF.
    key = tl.where(candidate, key, 0)

    # The count-th largest key is the largest one that at least count keys reach; find it from the top bit.
    wanted = tl.load(count + batch).to(tl.int32)
    threshold = tl.full((), 0, tl.uint32)
    bit = tl.full((), 0x80000000, tl.uint32)
    for _ in range(32):
        higher = threshold | bit
        reach = tl.sum((key >= higher).to(tl.int32), axis=0)
        threshold = tl.where(reach >= wanted, higher, threshold)
        bit = bit >> 1
    above = key > threshold
    tied = candidate & (key == threshold)
    left = wanted - tl.sum(above.to(tl.int32), axis=0)
    chosen = above | (tied & (tl.cumsum(tied.to(tl.int32), axis=0) <= left))
    tl.store(kept + row * n + index, chosen.to(tl.uint8), mask=inside)
