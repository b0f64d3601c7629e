"""What hypothesis draws for these tests: small sizes, masks with empty rows, paddings, scores that tie."""

import torch
from hypothesis import strategies as st
from torch import Tensor

seeds = st.integers(0, 2**31 - 1)
# Shares of tokens, those whose product with a size falls on a half among them.
ratios = st.one_of(st.sampled_from([0.01, 0.1, 0.25, 0.3, 0.5, 0.7, 0.75, 1.0]), st.floats(1e-3, 1.0))


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Draw a standard normal tensor that ``seed`` alone decides."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def sizes(letters: str, largest: int = 5) -> st.SearchStrategy[tuple[int, ...]]:
    """Draw a size for each axis letter: ``b, l, n = draw(sizes("b l n"))``."""
    return st.tuples(*(st.integers(1, largest) for _ in letters.split()))


@st.composite
def masks(draw: st.DrawFn, b: int, l: int, n: int) -> Tensor:
    """Draw (b, l, n) bool; of two rows or more, at least one is empty, often one is full."""
    bits = draw(st.lists(st.booleans(), min_size=b * l * n, max_size=b * l * n))
    rows = torch.tensor(bits).reshape(b * l, n)
    full = draw(st.integers(0, b * l - 1))
    rows[full] |= draw(st.booleans())
    if b * l > 1:
        rows[(full + draw(st.integers(1, b * l - 1))) % (b * l)] = False
    return rows.reshape(b, l, n)


@st.composite
def paddings(draw: st.DrawFn, b: int, s: int) -> Tensor:
    """Draw (b, s) bool, True = real: padding at the end, or anywhere; a sample may be nothing but padding."""
    if draw(st.booleans()):
        lengths = draw(st.lists(st.integers(0, s), min_size=b, max_size=b))
        return torch.arange(s) < torch.tensor(lengths)[:, None]
    return torch.tensor(draw(st.lists(st.booleans(), min_size=b * s, max_size=b * s))).reshape(b, s)


_FEW = [-torch.inf, -3e38, -1.0, -0.25, -0.0, 0.0, 0.25, 1.0]


@st.composite
def tied_scores(draw: st.DrawFn, b: int, l: int, n: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Draw (b, l, n) from few values, so that most rows tie; both zeros and -inf among them."""
    values = draw(st.lists(st.sampled_from(_FEW), min_size=b * l * n, max_size=b * l * n))
    return torch.tensor(values, dtype=dtype).reshape(b, l, n)


def distinct_scores(seed: int, b: int, l: int, n: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Draw (b, l, n) in (-1, 1) without two equal scores in a row."""
    generator = torch.Generator().manual_seed(seed)
    ranks = torch.stack([torch.randperm(n, generator=generator) for _ in range(b * l)])
    return ((ranks.double() + 0.5) / n * 2 - 1).reshape(b, l, n).to(dtype)


def mask_of(kind: str, seed: int, b: int, l: int, n: int, *, device: str = "cpu") -> Tensor | None:
    """Give a mask by its axes, or None for "none".

    In its first sample a row is empty, and no row attends to the last token.
    """
    if kind == "none":
        return None
    bits = normal(seed, *((b, n) if kind == "b n" else (b, l, n))) > -0.4
    bits[0, ..., -1] = False
    bits[(0,) if kind == "b n" else (0, 0)] = False
    return bits.to(device)


def wide(backend: str) -> torch.dtype:
    """Give the widest dtype that a backend takes: the triton kernels know no float64."""
    return torch.float32 if backend == "triton" else torch.float64


def surrounded(x: Tensor) -> Tensor:
    """Copy ``x`` into the middle of memory that holds NaN (True for bool): what reads past an end shows."""
    around = torch.full((x.numel() + 256,), True if x.dtype == torch.bool else torch.nan, dtype=x.dtype)
    around = around.to(x.device)
    around[128 : 128 + x.numel()] = x.flatten()
    return around[128 : 128 + x.numel()].view(x.shape)
