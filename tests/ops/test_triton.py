"""The triton kernels' custom ops, on a GPU or in Triton's interpreter: `TRITON_INTERPRET=1 pytest -k triton`.

What they compute is tested with every other backend in test_curation, test_aggregation, test_attention.
"""

import pytest
import torch

from metris_blocks import VisualExpressionExtractor
from metris_blocks.ops.backends import triton
from metris_blocks.ops.backends.triton import curation
from tests.conftest import assert_equal, cases
from tests.support.strategies import normal

on_each_device = pytest.mark.parametrize(
    ("device", "backend"),
    cases(backends=["triton"]),
)
OPS = torch.ops.metris_blocks
B, L, N, J, HEADS, E = 2, 3, 7, 5, 2, 4


def draw(device, *shape, dtype=torch.float32, grad=False):
    return normal(sum(shape), *shape, dtype=dtype).to(device).requires_grad_(grad)


def mask_on(device):
    mask = (normal(0, B, L, N) > 0).to(device)
    mask[0, 0] = False
    return mask


@on_each_device
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_ops_keep_the_rules_of_custom_ops(device, backend, dtype, grad):
    """schema, autograd registration, fake tensors, AOT dispatch: the four of opcheck."""
    x, y = draw(device, B, N, J, dtype=dtype, grad=grad), draw(device, B, L, J, dtype=dtype, grad=grad)
    scores = draw(device, B, L, N, grad=grad)
    torch.library.opcheck(OPS.triton_score.default, (x, y))
    torch.library.opcheck(OPS.triton_aggregate.default, (scores, mask_on(device), x, 0.5, True))
    query, key, value = (draw(device, B, s, HEADS, E, dtype=dtype, grad=grad) for s in (L, N, N))
    for mask in (mask_on(device), None):
        torch.library.opcheck(OPS.triton_attention.default, (query, key, value, mask, 0.5))
    count = torch.tensor([2, 0], device=device)
    for real in (None, mask_on(device)[:, 1]):
        torch.library.opcheck(OPS.triton_select.default, (scores.detach().to(dtype), count, real))


@on_each_device
def test_backward_ops_keep_the_rules_of_custom_ops(device, backend):
    x, y = draw(device, B, N, J), draw(device, B, L, J)
    scores, x_norm, y_norm = OPS.triton_score(x, y)
    torch.library.opcheck(
        OPS.triton_score_backward.default, (torch.ones_like(scores), scores, x, x_norm, y, y_norm)
    )
    query, key, value = (draw(device, B, s, HEADS, E) for s in (L, N, N))
    for mask in (mask_on(device), None):
        out, logsumexp = OPS.triton_attention(query, key, value, mask, 0.5)
        torch.library.opcheck(
            OPS.triton_attention_backward.default,
            (torch.ones_like(out), out, logsumexp, query, key, value, mask, 0.5),
        )
    out, *saved = OPS.triton_aggregate(scores, mask_on(device), x, 0.5, True)
    torch.library.opcheck(
        OPS.triton_aggregate_backward.default, (torch.ones_like(out), *saved, scores, mask_on(device), x, 0.5)
    )


@on_each_device
def test_extractor_runs_on_the_kernels_alone(device, backend):
    results = []
    for chosen in ("eager", backend):
        torch.manual_seed(0)
        extractor = VisualExpressionExtractor(12, 10, 16, joint_dim=8, num_heads=2, backend=chosen).to(device)
        leaves = draw(device, 2, 9, 12, grad=True), draw(device, 2, 5, 10, grad=True)
        real = torch.arange(5, device=device) < torch.tensor([[5], [3]], device=device)
        tokens, scores, mask = extractor(*leaves, language_mask=real)
        loss = tokens.square().sum() + scores[:, 0].square().sum()
        results.append([mask, tokens, scores, *torch.autograd.grad(loss, [*leaves, *extractor.parameters()])])
    assert results[0][0].equal(results[1][0])
    for eager, ours in zip(*(one[1:] for one in results), strict=True):
        assert_equal(ours, eager.double())


@on_each_device
def test_second_derivatives_are_refused_not_wrong(device, backend):
    x, y = draw(device, B, N, J, grad=True), draw(device, B, L, J, grad=True)
    (grad,) = torch.autograd.grad(curation.relevance(x, y).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="autograd"):
        torch.autograd.grad(grad.sum(), x)


def test_kernels_say_what_they_need():
    why = triton.reasons(torch.zeros(1, dtype=torch.float64))
    assert any("dtype=torch.float64" in reason for reason in why)
    if not triton.INTERPRETED:
        assert any("device=cpu (needs cuda, or TRITON_INTERPRET=1" in reason for reason in why)
