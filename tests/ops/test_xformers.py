"""The xformers backend where there is no GPU: its dispatch, its bias, and the wiring of its custom op.

Plain PyTorch stands in for the kernel behind xformers' own interface, so all but the kernel itself runs.
`pytest -m cuda` runs the kernel (tests/ops/test_attention.py, backend xformers).
"""

import math
from types import SimpleNamespace

import pytest
import torch

from metris_blocks.ops import explain_backends, masked_attention
from metris_blocks.ops.backends import eager, xformers


def inputs(b=2, l=3, n=7, heads=2, e=8, dtype=torch.float32):
    draw = lambda s: torch.randn(b, s, heads, e, dtype=dtype)
    mask = torch.rand(b, l, n) < 0.5
    mask[0, 1] = False
    return draw(l), draw(n), draw(n), mask


def weigh(query, key, bias, scale):
    """softmax(q k^T scale + bias) as xformers defines it, zeros for a row of -inf; and its logsumexp."""
    logits = torch.einsum("blhe,bnhe->bhln", query, key) * scale
    logits = logits if bias is None else logits + bias
    return torch.nan_to_num(logits.softmax(-1), nan=0.0), torch.logsumexp(logits, -1)


@pytest.fixture
def kernel(monkeypatch):
    """Put plain PyTorch in the place of xformers' kernels, with its checks on the bias."""
    seen = []

    def check(query, bias):
        seen.append(bias)
        if bias is not None:
            b, l, heads, _ = query.shape
            assert type(bias) is torch.Tensor and bias.dtype == query.dtype
            assert bias.shape == (b, heads, l, bias.shape[-1])
            assert all(stride % 8 == 0 for stride in bias.stride()[:-1]) and bias.stride(-1) == 1

    def forward(query, key, value, attn_bias, scale, op):
        check(query, attn_bias)
        weights, logsumexp = weigh(query, key, attn_bias, scale)
        out = torch.einsum("bhln,bnhe->blhe", weights, value)
        # The real kernel pads the rows of the logsumexp to 32.
        return out, torch.nn.functional.pad(logsumexp.float(), (0, -query.shape[1] % 32))

    def backward(grad, out, lse, query, key, value, attn_bias, scale, op):
        check(query, attn_bias)
        assert lse.shape == (query.shape[0], query.shape[2], query.shape[1])
        weights, _ = weigh(query, key, attn_bias, scale)
        value_grad = torch.einsum("bhln,blhe->bnhe", weights, grad)
        weight_grad = torch.einsum("blhe,bnhe->bhln", grad, value)
        logit_grad = scale * weights * (weight_grad - (weight_grad * weights).sum(-1, keepdim=True))
        query_grad = torch.einsum("bhln,bnhe->blhe", logit_grad, key)
        return query_grad, torch.einsum("bhln,blhe->bnhe", logit_grad, query), value_grad

    fake = SimpleNamespace(
        memory_efficient_attention_forward_requires_grad=forward,
        memory_efficient_attention_backward=backward,
        cutlass=SimpleNamespace(FwOp="forward", BwOp="backward"),
    )
    monkeypatch.setattr(xformers, "_fmha", lambda: fake)
    return seen


@pytest.mark.parametrize("with_mask", [True, False])
def test_op_equals_eager_with_its_gradients(kernel, with_mask):
    query, key, value, mask = inputs(dtype=torch.float64)
    mask = mask if with_mask else None
    results = []
    for backend in (eager, xformers):
        leaves = [x.clone().requires_grad_() for x in (query, key, value)]
        out = backend.attend(*leaves, mask, 0.3)
        results.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
    for ours, reference in zip(results[1], results[0]):
        torch.testing.assert_close(ours, reference)
    assert len(kernel) == 2


def test_bias_is_zero_where_the_mask_is_true_and_minus_infinity_elsewhere(kernel):
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for n in (1, 7, 8, 225):
            query, _, _, mask = inputs(n=n, dtype=dtype)
            bias = xformers._bias(mask, query)
            assert bias.eq(torch.where(mask, 0.0, -math.inf)[:, None].to(dtype)).all()
            assert all(stride % 8 == 0 for stride in bias.stride()[:-1])


@pytest.mark.parametrize("with_mask", [True, False])
@pytest.mark.parametrize("grad", [True, False])
def test_op_keeps_the_rules_of_custom_ops(kernel, grad, with_mask):
    query, key, value, mask = inputs()
    leaves = [x.requires_grad_(grad) for x in (query, key, value)]
    torch.library.opcheck(xformers._attend, (*leaves, mask if with_mask else None, 0.3))


def test_op_compiles_in_training_without_a_graph_break(kernel):
    query, key, value, mask = inputs()
    compiled = torch.compile(xformers.attend, fullgraph=True, backend="aot_eager")
    results = []
    for function in (xformers.attend, compiled):
        leaves = [x.clone().requires_grad_() for x in (query, key, value)]
        out = function(*leaves, mask, 0.3)
        results.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
    for ours, reference in zip(results[1], results[0]):
        torch.testing.assert_close(ours, reference)


def test_op_exports(kernel):
    class Attend(torch.nn.Module):
        def forward(self, query, key, value, mask):
            return xformers.attend(query, key, value, mask, 0.3)

    arguments = inputs()
    program = torch.export.export(Attend(), arguments)
    assert "metris_blocks.xformers_attention" in str(program.graph)
    torch.testing.assert_close(program.module()(*arguments), Attend()(*arguments))


def on_gpu(shape=(2, 3, 4, 8), dtype=torch.float16):
    """What `reasons` reads of a tensor, without a GPU to put one on."""
    return SimpleNamespace(device=torch.device("cuda", 0), dtype=dtype, shape=shape)


@pytest.mark.parametrize(
    ("capability", "tensor", "says"),
    [
        ((9, 0), on_gpu(), []),
        ((8, 6), on_gpu(dtype=torch.float32, shape=(2, 3, 4, 12)), []),
        ((12, 0), on_gpu(), ["compute capability 12.0"]),
        ((10, 0), on_gpu(), ["compute capability 10.0"]),
        ((9, 0), on_gpu(dtype=torch.float64), ["dtype=torch.float64"]),
        ((9, 0), on_gpu(shape=(2, 3, 4, 20)), ["head_dim=20 is not a multiple of 8"]),
        ((9, 0), on_gpu(shape=(2, 3, 4, 6), dtype=torch.float32), ["head_dim=6 is not a multiple of 4"]),
    ],
)
def test_reasons_on_a_gpu(monkeypatch, capability, tensor, says):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(xformers, "_missing", lambda load: "")
    why = xformers.reasons(tensor, tensor, tensor, None)
    assert len(why) == len(says) and all(word in reason for word, reason in zip(says, why))


@pytest.mark.parametrize(
    ("built", "error", "says"),
    [
        (True, None, ""),
        (False, None, "libcudart.so.12"),
        (True, ImportError("flash_attn 9 is too new"), "cannot be imported (flash_attn 9 is too new)"),
    ],
)
def test_missing_part_is_named(monkeypatch, built, error, says):
    def fmha():
        if error is not None:
            raise error
        return SimpleNamespace(common=SimpleNamespace(_built_with_cuda=built))

    monkeypatch.setattr(xformers, "find_spec", lambda name: object())
    monkeypatch.setattr(xformers, "_fmha", fmha)
    found = xformers._missing.__wrapped__(True)
    assert says in found and (found == "") == (says == "")


def test_all_reasons_are_given_at_once():
    query = torch.randn(1, 2, 2, 20, dtype=torch.float64)
    with pytest.raises(NotImplementedError, match=r"device=cpu.*; dtype=torch\.float64.*Use backend='auto'"):
        masked_attention(query, query, query, backend="xformers")
    assert len(explain_backends(query, query, query)["xformers"]) >= 2
