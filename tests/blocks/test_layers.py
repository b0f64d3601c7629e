"""What blocks share: MultiHeadAttention, FeedForward, AttentionLayer."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from metris_blocks.layers import AttentionLayer, FeedForward, MultiHeadAttention
from tests.conftest import assert_equal
from tests.support import paper
from tests.support.strategies import masks, normal, paddings, seeds, sizes

HEADS = 2
PATHS = ["_absorbed", "_projected"]


def attention(dim=4, context_dim=6, **options):
    torch.manual_seed(0)
    return MultiHeadAttention(dim, context_dim, num_heads=HEADS, **options).double()


@pytest.mark.parametrize("path", PATHS)
@given(data=st.data(), size=sizes("b l n", largest=4), seed=seeds)
def test_both_paths_equal_the_paper(path, data, size, seed):
    b, l, n = size
    mha = attention()
    mask = data.draw(st.one_of(st.none(), masks(b, l, n), paddings(b, n)))
    x, context = normal(seed, b, l, 4), normal(seed + 1, b, n, 6)
    expected = paper.multi_head_attention(x, context, mask, mha.state_dict(), HEADS)
    assert_equal(mha.out_proj(getattr(mha, path)(x, context, mask)), expected)


@given(data=st.data(), size=sizes("b l n", largest=4), seed=seeds)
def test_attention_map_times_values_is_what_attention_gives(data, size, seed):
    b, l, n = size
    mha = attention()
    mask = data.draw(st.one_of(st.none(), masks(b, l, n), paddings(b, n)))
    x, context = normal(seed, b, l, 4), normal(seed + 1, b, n, 6)
    weights = mha.attention_map(x, context, mask)
    value = mha.v_proj(context).unflatten(-1, (HEADS, -1)).transpose(1, 2)
    assert_equal(mha.out_proj((weights @ value).transpose(1, 2).flatten(2)), mha(x, context, mask))
    rows = (
        torch.ones(b, l, n).bool()
        if mask is None
        else mask[:, None].expand(b, l, n)
        if mask.ndim == 2
        else mask
    )
    assert_equal(weights.sum(dim=-1), rows.any(dim=-1)[:, None].double().expand(b, HEADS, l))
    assert weights.masked_select(~rows[:, None]).eq(0).all()


@pytest.mark.parametrize("path", PATHS)
def test_row_that_attends_to_nothing_is_the_output_bias_alone(path):
    mha = attention()
    mask = torch.tensor([[[True, False], [False, False]]])
    out = mha.out_proj(getattr(mha, path)(normal(0, 1, 2, 4), normal(1, 1, 2, 6), mask))
    assert out[0, 1].equal(mha.out_proj.bias) and not out[0, 0].equal(mha.out_proj.bias)


# The sizes of the paper first: 21 words, 225 tokens, heads of 96; then words for heads, tokens for nothing.
@pytest.mark.parametrize("l", [1, 21, 200])
@pytest.mark.parametrize("n", [1, 21, 225])
@pytest.mark.parametrize(("dim", "context_dim", "heads"), [(768, 1024, 8), (64, 16, 16), (32, 32, 2)])
def test_auto_takes_the_path_of_fewer_operations(l, n, dim, context_dim, heads):
    def operations(path):
        with torch.device("meta"), FlopCounterMode(display=False) as counter:
            mha = MultiHeadAttention(dim, context_dim, num_heads=heads)
            x, context = torch.empty(1, l, dim), torch.empty(1, n, context_dim)
            getattr(mha, path)(x, context, None)
        return counter.get_total_flops()

    absorbed, projected = (operations(path) for path in PATHS)
    shapes = torch.empty(1, l, dim, device="meta"), torch.empty(1, n, context_dim, device="meta")
    with torch.device("meta"):
        mha = MultiHeadAttention(dim, context_dim, num_heads=heads)
    assert mha._absorbs(*shapes) == (absorbed < projected)


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_named_backend_is_never_absorbed(backend):
    named = MultiHeadAttention(768, 1024, backend=backend)
    shapes = torch.empty(1, 21, 768), torch.empty(1, 225, 1024)
    assert not named._absorbs(*shapes) and MultiHeadAttention(768, 1024)._absorbs(*shapes)


def test_no_parameter_is_without_effect():
    # A bias of the keys would be: it adds the same to all logits of a row.
    mha = attention()
    mha(normal(0, 2, 3, 4), normal(1, 2, 7, 6)).square().sum().backward()
    assert all(p.grad.abs().max() > 1e-8 for p in mha.parameters())
    assert "k_proj.bias" not in mha.state_dict()


@given(sizes("b l"), seeds, st.sampled_from([0.5, 1.5, 4.0]))
def test_feed_forward_equals_the_paper(size, seed, mlp_ratio):
    torch.manual_seed(0)
    net = FeedForward(4, mlp_ratio=mlp_ratio).double()
    x = normal(seed, *size, 4)
    assert net[0].out_features == 4 * mlp_ratio
    assert_equal(net(x), paper.mlp(x, net.state_dict()))


@pytest.mark.parametrize("norm", ["pre", "none"])
@pytest.mark.parametrize("context_dim", [None, 6])
def test_layer_equals_the_paper_with_weights_far_from_their_start(norm, context_dim):
    # LayerNorm starts as the identity scale: with random weights, leaving it out shows.
    layer = AttentionLayer(4, context_dim, num_heads=HEADS, norm=norm).double()
    for i, p in enumerate(layer.parameters()):
        p.data = normal(i, *p.shape)
    x, context = normal(90, 2, 3, 4), None if context_dim is None else normal(91, 2, 5, 6)
    expected = paper.attention_layer(x, context, None, layer.state_dict(), HEADS)
    assert_equal(layer(x, context), expected)


@pytest.mark.parametrize("share", [0.25, 0.75])
def test_dropout_zeroes_its_share_of_what_attention_and_mlp_add(share):
    torch.manual_seed(0)
    layer = AttentionLayer(64, num_heads=2, dropout=share)
    x = torch.randn(64, 9, 64)
    for part, args in ((layer.attention, (x, x)), (layer.mlp, (x,))):
        dropped = part.train()(*args).eq(0).double().mean()
        # Four standard deviations of the mean of that many coin tosses.
        assert abs(dropped - share) < 4 * (share * (1 - share) / x.numel()) ** 0.5
        assert part.eval()(*args).ne(0).all()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"num_heads": 3}, "MultiHeadAttention: dim=4 is not a multiple of num_heads=3"),
        ({"norm": "post"}, "AttentionLayer: norm must be 'pre' or 'none', got 'post'"),
        ({"dropout": 1.0}, r"AttentionLayer: dropout must be in \[0, 1\), got 1"),
        ({"dropout": -0.1}, r"AttentionLayer: dropout must be in \[0, 1\), got -0.1"),
    ],
)
def test_refuses_options_out_of_range(options, says):
    with pytest.raises(ValueError, match=says):
        AttentionLayer(4, **({"num_heads": 2} | options))
