"""masked_attention and absorbed_attention against the attention of Eq. 6-7: one meaning in every backend."""

import math
from types import SimpleNamespace
from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from metris_blocks.ops import attention, auto_backend, explain_backends, masked_attention
from metris_blocks.ops.backends import Backend
from tests.conftest import (
    ON_CPU,
    TOLERANCE,
    assert_compiles_once,
    assert_equal,
    assert_within_budget,
    cases,
    with_gradients,
)
from tests.support import paper
from tests.support.strategies import mask_of, masks, normal, paddings, seeds, sizes, surrounded, wide

NAMED = [name for name in get_args(Backend) if name != "auto"]
KINDS = ["b l n", "b n", "none"]
SHAPES = [(2, 3, 1, 2, 8), (1, 1, 7, 1, 16), (2, 21, 225, 3, 8)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
with_each_backend = pytest.mark.parametrize("backend", ON_CPU)
with_each_mask = pytest.mark.parametrize("kind", KINDS)


def with_cases(**axes):
    """Every backend wherever it runs, and each two values of two axes together at least once."""
    rows = cases(*axes.values(), backends=[*NAMED, "auto"])
    return pytest.mark.parametrize(("device", "backend", *axes), rows)


SIZES = sizes("b l n heads e", largest=4)


def inputs(seed, b, l, n, heads, e, *, dtype=torch.float64, device="cpu"):
    shapes = (b, l, heads, e), (b, n, heads, e), (b, n, heads, e)
    return tuple(normal(seed + i, *shape, dtype=dtype).to(device) for i, shape in enumerate(shapes))


def need(backend, *tensors):
    """Skip, with its reasons, a backend that says it cannot run these inputs."""
    if backend != "auto" and (why := explain_backends(*tensors)[backend]):
        pytest.skip(f"{backend}: {'; '.join(why)}")


def textbook(query, key, value, mask):
    """The formula in plain torch, in the dtype of its inputs throughout."""
    logits = torch.einsum("blhe,bnhe->bhln", query, key) / math.sqrt(query.shape[-1])
    if mask is not None:
        mask = (mask if mask.ndim == 3 else mask[:, None])[:, None]
        logits = logits.masked_fill(~mask, -math.inf)
    return torch.einsum("bhln,bnhe->blhe", logits.softmax(dim=-1).nan_to_num(0), value)


# ------------------------------------------------------------------------------------------------- equation


@with_each_backend
@given(data=st.data(), size=SIZES, seed=seeds)
def test_equals_paper_equation(backend, data, size, seed):
    b, l, n, _, _ = size
    tensors = inputs(seed, *size, dtype=wide(backend))
    mask = data.draw(st.one_of(st.none(), masks(b, l, n), paddings(b, n)))
    need(backend, *tensors, mask)
    scale = data.draw(st.sampled_from([None, 0.1, 2.0]))
    out = masked_attention(*tensors, mask, scale=scale, backend=backend)
    exact = paper.attention(*(x.double() for x in tensors), mask, scale=scale)
    assert_equal(out, exact, largest=10)


@with_cases(kind=KINDS, size=SHAPES, dtype=DTYPES)
def test_values_and_gradients_equal_float64(device, backend, kind, size, dtype):
    tensors = inputs(0, *size, dtype=dtype, device=device)
    mask = mask_of(kind, 9, *size[:3], device=device)
    need(backend, *tensors, mask)
    cotangent = normal(5, *tensors[0].shape, dtype=dtype).to(device)
    formula = lambda *leaves: textbook(*leaves, mask)
    run = lambda *leaves: masked_attention(*leaves, mask, backend=backend)
    actual = with_gradients(run, tensors, cotangent)
    plain = with_gradients(formula, tensors, cotangent)
    reference = with_gradients(formula, [x.double() for x in tensors], cotangent.double())
    for one, other, exact in zip(actual, plain, reference, strict=True):
        assert one.dtype == dtype
        if dtype in TOLERANCE:
            assert_equal(one, exact.nan_to_num(0))
        else:
            assert_within_budget(one, other.nan_to_num(0), exact.nan_to_num(0))


# ----------------------------------------------------------------------------------------------- properties


@with_cases(kind=KINDS[:2], held=[1.0, math.nan, math.inf], dtype=DTYPES)
def test_row_that_attends_to_nothing_is_zero_with_zero_gradient(device, backend, kind, held, dtype):
    b, l, n, heads, e = 2, 3, 7, 2, 8
    query, key, value = inputs(0, b, l, n, heads, e, dtype=dtype, device=device)
    mask = mask_of(kind, 9, b, l, n, device=device)
    need(backend, query, key, value, mask)
    empty = ~(mask.any(dim=-1) if kind == "b l n" else mask.any(dim=-1, keepdim=True).expand(b, l))
    assert empty.any() and not empty.all()
    query[empty] = held
    run = lambda *leaves: masked_attention(*leaves, mask, backend=backend)
    out, *grads = with_gradients(run, (query, key, value), torch.ones_like(query))
    assert out[empty].eq(0).all() and grads[0][empty].eq(0).all()
    assert all(x.isfinite().all() and x.ne(0).any() for x in (out, *grads))


@with_cases(kind=KINDS[:2], held=[math.nan, math.inf, -math.inf], dtype=[torch.float64, torch.bfloat16])
def test_what_a_token_nobody_attends_to_holds_reaches_nothing(device, backend, kind, held, dtype):
    b, l, n, heads, e = 2, 3, 7, 2, 8
    query, key, value = inputs(0, b, l, n, heads, e, dtype=dtype, device=device)
    mask = mask_of(kind, 9, b, l, n, device=device)
    mask[1, ..., 2] = False
    need(backend, query, key, value, mask)
    unseen = ~(mask.any(dim=1) if kind == "b l n" else mask)
    run = lambda *leaves: masked_attention(*leaves, mask, backend=backend)
    results = []
    for fill in (0.0, held):
        hidden = (query, *(x.masked_fill(unseen[..., None, None], fill) for x in (key, value)))
        results.append(with_gradients(run, hidden, torch.ones_like(query)))
    for clean, poisoned in zip(*results, strict=True):
        assert clean.isfinite().all() and poisoned.equal(clean)
    assert all(grad[unseen].eq(0).all() for grad in results[1][2:])


@with_each_backend
@given(data=st.data(), size=SIZES, seed=seeds)
def test_mask_of_tokens_is_the_same_mask_for_every_row(backend, data, size, seed):
    b, l, n, _, _ = size
    tensors, mask = inputs(seed, *size, dtype=wide(backend)), data.draw(paddings(b, n))
    need(backend, *tensors, mask)
    rows = mask[:, None].repeat(1, l, 1)
    one, other = (masked_attention(*tensors, m, backend=backend) for m in (mask, rows))
    assert one.equal(other)
    full = torch.ones_like(mask)
    assert_equal(
        masked_attention(*tensors, full, backend=backend), masked_attention(*tensors, backend=backend)
    )


@with_each_backend
@given(data=st.data(), size=SIZES, seed=seeds, more=st.integers(1, 9))
def test_extending_the_padding_changes_nothing(backend, data, size, seed, more):
    b, l, n, heads, e = size
    tensors, mask = inputs(seed, *size, dtype=wide(backend)), data.draw(masks(b, l, n))
    need(backend, *tensors, mask)
    query, key, value = tensors
    extra = torch.full((b, more, heads, e), math.nan, dtype=wide(backend))
    longer = (query, torch.cat([key, extra], dim=1), torch.cat([value, extra], dim=1))
    long_mask = torch.nn.functional.pad(mask, (0, more), value=False)
    assert_equal(
        masked_attention(*longer, long_mask, backend=backend),
        masked_attention(*tensors, mask, backend=backend),
    )


@with_each_backend
@given(data=st.data(), size=SIZES, seed=seeds)
def test_order_of_tokens_does_not_matter(backend, data, size, seed):
    b, l, n, _, _ = size
    (query, key, value), mask = inputs(seed, *size, dtype=wide(backend)), data.draw(masks(b, l, n))
    need(backend, query, key, value, mask)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    assert_equal(
        masked_attention(query, key[:, order], value[:, order], mask[..., order], backend=backend),
        masked_attention(query, key, value, mask, backend=backend),
    )


@with_cases(kind=KINDS)
def test_inputs_may_have_any_strides(device, backend, kind):
    size = (2, 3, 7, 2, 8)
    tensors = inputs(0, *size, device=device, dtype=wide(backend))
    mask = mask_of(kind, 9, *size[:3], device=device)
    need(backend, *tensors, mask)
    strided = [x.transpose(1, 3).contiguous().transpose(1, 3) for x in tensors]
    strided_mask = (
        None if mask is None else mask.mT.contiguous().mT if mask.ndim == 3 else mask.T.contiguous().T
    )
    assert_equal(
        masked_attention(*strided, strided_mask, backend=backend),
        masked_attention(*tensors, mask, backend=backend),
    )


@with_cases(kind=KINDS, size=[(2, 3, 7, 2, 8), (1, 17, 33, 1, 24)])
def test_nothing_is_read_beyond_the_tensors(device, backend, kind, size):
    tensors = inputs(0, *size, dtype=torch.float32, device=device)
    mask = mask_of(kind, 9, *size[:3], device=device)
    need(backend, *tensors, mask)
    results = []
    for place in (torch.clone, surrounded):
        placed = [place(x).requires_grad_() for x in tensors]
        out = masked_attention(*placed, None if mask is None else place(mask), backend=backend)
        results.append([out, *torch.autograd.grad(out, placed, place(torch.ones_like(out)))])
    for alone, among_nan in zip(*results, strict=True):
        assert alone.isfinite().all() and among_nan.equal(alone)


@with_cases(kind=KINDS, dtype=[torch.float32, torch.bfloat16])
def test_same_result_twice(device, backend, kind, dtype):
    size = (2, 21, 225, 3, 8)
    tensors = inputs(0, *size, dtype=dtype, device=device)
    mask = mask_of(kind, 9, *size[:3], device=device)
    need(backend, *tensors, mask)
    run = lambda *leaves: masked_attention(*leaves, mask, backend=backend)
    first, second = (with_gradients(run, tensors, torch.ones_like(tensors[0])) for _ in range(2))
    assert all(x.equal(y) for x, y in zip(first, second, strict=True))


@with_cases(kind=KINDS, dtype=[torch.bfloat16, torch.float16])
def test_autocast_stays_within_the_error_of_textbook_code(device, backend, kind, dtype):
    size = (2, 3, 225, 2, 8)
    tensors = inputs(0, *size, dtype=torch.float32, device=device)
    mask = mask_of(kind, 9, *size[:3], device=device)
    need(backend, *tensors, mask)
    with torch.autocast(device, dtype=dtype):
        out = masked_attention(*tensors, mask, backend=backend)
    plain = textbook(*(x.to(dtype) for x in tensors), mask)
    reference = textbook(*(x.double() for x in tensors), mask)
    assert_within_budget(out.to(dtype), plain, reference)


# ------------------------------------------------------------------------------------------------- gradient


@pytest.mark.parametrize("backend", ["eager", "sdpa", "auto"])
@with_each_mask
def test_gradients(backend, kind):
    size = (2, 2, 3, 2, 2)
    tensors, mask = inputs(0, *size), mask_of(kind, 9, *size[:3])
    need(backend, *tensors, mask)
    attend = lambda *leaves: masked_attention(*leaves, mask, backend=backend)
    leaves = [x.requires_grad_() for x in tensors]
    assert torch.autograd.gradcheck(attend, leaves)
    if backend == "eager":
        assert torch.autograd.gradgradcheck(attend, leaves)


# -------------------------------------------------------------------------------------------------- compile


@pytest.mark.parametrize("backend", [name for name in ON_CPU if name != "auto"])
@pytest.mark.parametrize("kind", ["b l n", "none"])
def test_compiles_once_for_all_sizes_of_the_data(backend, kind):
    sized = []
    # Heads and their width belong to the model: SDPA takes its scale as a constant.
    for size in ((2, 3, 7, 4, 8), (5, 6, 9, 4, 8)):
        tensors, mask = inputs(0, *size), mask_of(kind, 9, *size[:3])
        need(backend, *tensors, mask)
        sized.append(((*(x.requires_grad_() for x in tensors), mask), {"backend": backend}))
    assert_compiles_once(masked_attention, sized)


# -------------------------------------------------------------------------------------- choice and refusals


@pytest.mark.parametrize(
    ("device", "_", "kind", "e", "dtype"), cases(KINDS, [8, 20, 3], DTYPES, backends=["auto"])
)
def test_explain_backends_agrees_with_what_happens(device, _, kind, e, dtype):
    tensors = inputs(0, 2, 3, 7, 2, e, dtype=dtype, device=device)
    mask = mask_of(kind, 9, 2, 3, 7, device=device)
    reasons = explain_backends(*tensors, mask)
    assert list(reasons) == NAMED and reasons["eager"] == []
    for backend, why in reasons.items():
        if why:
            with pytest.raises(NotImplementedError) as refusal:
                masked_attention(*tensors, mask, backend=backend)
            says = str(refusal.value)
            assert says.startswith(f"masked_attention: backend '{backend}' cannot run: ")
            assert all(reason in says for reason in why) and says.endswith("Use backend='auto'")
        else:
            out = masked_attention(*tensors, mask, backend=backend)
            assert out.shape == tensors[0].shape and out.isfinite().all()


@with_cases(kind=KINDS)
def test_assume_finite_changes_nothing_where_it_is_true(device, backend, kind):
    tensors = inputs(0, 2, 3, 7, 2, 8, dtype=torch.float32, device=device)
    mask = mask_of(kind, 9, 2, 3, 7, device=device)
    need(backend, *tensors, mask)
    careful, trusting = (
        masked_attention(*tensors, mask, backend=backend, assume_finite=known) for known in (False, True)
    )
    assert_equal(trusting, careful)


def on_gpu(l, e=16, dtype=torch.bfloat16):
    """What the choice of a backend reads of a tensor, without a GPU to put one on."""
    shape = (2, l, 4, e)
    return SimpleNamespace(device=torch.device("cuda", 0), dtype=dtype, shape=shape, ndim=4)


def test_auto_prefers_xformers_on_a_gpu_where_it_can_run(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(attention.xformers, "_missing", lambda load: "")
    proxies = [on_gpu(s) for s in (3, 7, 7)]
    assert auto_backend(*proxies) == "xformers" and explain_backends(*proxies)["xformers"] == []
    with monkeypatch.context() as traced:
        traced.setattr(torch.compiler, "is_compiling", lambda: True)
        assert auto_backend(*proxies) == "sdpa"
    assert auto_backend(*(on_gpu(s, e=20) for s in (3, 7, 7))) == "sdpa"
    assert auto_backend(*(on_gpu(s, dtype=torch.float64) for s in (3, 7, 7))) == "sdpa"
    monkeypatch.setattr(attention.xformers, "_missing", lambda load: "xformers is not installed")
    assert auto_backend(*proxies) == "sdpa"
    assert explain_backends(*proxies)["xformers"] == ["xformers is not installed"]


@pytest.mark.parametrize(
    ("capability", "tensor", "says"),
    [
        ((9, 0), on_gpu(3), []),
        ((12, 0), on_gpu(3, e=3, dtype=torch.float32), []),
        ((7, 5), on_gpu(3), ["compute capability 7.5 (needs 8.0 or newer)"]),
        (
            (9, 0),
            on_gpu(3, dtype=torch.float64),
            ["dtype=torch.float64 (needs float16, bfloat16 or float32)"],
        ),
    ],
)
def test_triton_says_what_it_lacks_on_a_gpu(monkeypatch, capability, tensor, says):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert explain_backends(tensor, tensor, tensor)["triton"] == says


def test_auto_is_its_stated_rule():
    tensors, mask = inputs(0, 2, 3, 7, 2, 8), mask_of("b l n", 9, 2, 3, 7)
    chosen = masked_attention(*tensors, mask)
    assert chosen.equal(masked_attention(*tensors, mask, backend="auto"))
    assert auto_backend(*tensors, mask) == "sdpa"
    assert chosen.equal(masked_attention(*tensors, mask, backend="sdpa"))


@pytest.mark.parametrize("backend", NAMED)
def test_named_backend_runs_alone_or_refuses_with_every_reason(backend, monkeypatch):
    ran = []
    for name in NAMED:
        attend = lambda query, *rest, name=name: ran.append(name) or torch.zeros_like(query)
        why = ["head_dim=8 is cursed", "device=cpu (needs a moon)"] if name == backend else []
        module = SimpleNamespace(reasons=lambda *_, why=why: why, attend=attend)
        monkeypatch.setitem(attention._BACKENDS, name, module)
    tensors = inputs(0, 1, 2, 3, 1, 8)
    says = rf"backend '{backend}' cannot run: head_dim=8 is cursed; device=cpu \(needs a moon\)\. Use"
    with pytest.raises(NotImplementedError, match=says):
        masked_attention(*tensors, backend=backend)
    assert ran == []
    for other in NAMED:
        if other != backend:
            masked_attention(*tensors, backend=other)
    assert ran == [name for name in NAMED if name != backend]


def test_unknown_backend_is_refused_with_the_known_ones():
    says = "masked_attention: backend must be 'auto' or one of eager, sdpa, xformers, triton, got 'flash'"
    with pytest.raises(ValueError, match=says):
        masked_attention(*inputs(0, 1, 2, 3, 1, 8), backend="flash")


@pytest.mark.parametrize("function", [masked_attention, explain_backends])
@pytest.mark.parametrize(
    ("query", "key", "value", "mask", "says"),
    [
        ((2, 3, 2, 8), (2, 5, 2, 4), (2, 5, 2, 8), None, "key 'b n heads e' has e=4, but query has e=8"),
        (
            (2, 3, 2, 8),
            (2, 5, 1, 8),
            (2, 5, 2, 8),
            None,
            "key 'b n heads e' has heads=1, but query has heads=2",
        ),
        ((2, 3, 2, 8), (2, 5, 2, 8), (2, 6, 2, 8), None, "value 'b n heads e' has n=6, but key has n=5"),
        ((2, 3, 2, 8), (2, 5, 2, 8), (2, 5, 2, 8), (2, 3, 6), "mask 'b l n' has n=6, but key has n=5"),
        ((2, 3, 2, 8), (2, 5, 2, 8), (2, 5, 2, 8), (2, 4, 5), "mask 'b l n' has l=4, but query has l=3"),
        ((2, 3, 2, 8), (2, 5, 2, 8), (2, 5, 2, 8), (3, 5), "mask 'b n' has b=3, but query has b=2"),
        (
            (2, 3, 16),
            (2, 5, 16),
            (2, 5, 16),
            None,
            r"query has shape \(2, 3, 16\), expected axes 'b l heads e'",
        ),
        ((2, 3, 2, 8), (2, 5, 2, 8), (2, 5, 2, 8), (5,), r"mask has shape \(5,\), .* axes 'b l n \| b n'"),
    ],
)
def test_refuses_shapes_that_disagree(function, query, key, value, mask, says):
    mask = None if mask is None else torch.ones(mask, dtype=torch.bool)
    with pytest.raises(ValueError, match=f"{function.__name__}: {says}"):
        function(torch.zeros(query), torch.zeros(key), torch.zeros(value), mask)


@pytest.mark.parametrize("function", [masked_attention, explain_backends])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.float32])
def test_refuses_masks_that_are_not_bool(function, dtype):
    for shape in ((1, 2, 3), (1, 3)):
        with pytest.raises(TypeError, match=f"{function.__name__}: mask must be bool .*, got {dtype}"):
            function(*inputs(0, 1, 2, 3, 1, 8), torch.ones(shape, dtype=dtype))


@pytest.mark.parametrize("function", [masked_attention, explain_backends])
def test_refuses_mixed_dtypes(function):
    query, key, value = inputs(0, 1, 2, 3, 1, 8)
    says = rf"{function.__name__}: query is torch.float64, key torch.float32, value torch.float64"
    with pytest.raises(TypeError, match=says):
        function(query, key.float(), value)
