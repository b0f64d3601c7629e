"""VisualExpressionExtractor: Eq. 1-7 in a row, against the oracle with its own weights."""

import inspect
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import pad

from benchmarks.scaling import fitted_exponent
from metris_blocks import VisualExpressionExtractor
from metris_blocks.layers import MultiHeadAttention
from reference_model.cost import peak_bytes
from tests.conftest import assert_compiles_once, assert_equal
from tests.support import paper
from tests.support.strategies import normal, paddings, seeds, sizes

HEADS = 2
BACKENDS = ["auto", "eager", "sdpa"]
DIMS = {"visual_dim": 6, "language_dim": 5, "dim": 4}


def block(*, ratio=0.4, **options):
    torch.manual_seed(0)
    small = {"joint_dim": 6, "num_heads": HEADS, "mlp_ratio": 1.5, "ratio": ratio, "norm": "none"}
    return VisualExpressionExtractor(**DIMS, **(small | options)).double()


def inputs(seed, b, l, n):
    return normal(seed, b, n, DIMS["visual_dim"]), normal(seed + 1, b, l, DIMS["language_dim"])


def ragged(b, l, n):
    """Both masks; the samples get shorter, and the last has no real visual token."""
    counts = torch.arange(b)[:, None]
    visual_mask = torch.arange(n) < (n - 2 * counts)
    visual_mask[-1] = False
    return {"visual_mask": visual_mask, "language_mask": torch.arange(l) < (l - counts).clamp_min(1)}


# ------------------------------------------------------------------------------------------------- equations


@pytest.mark.parametrize("backend", BACKENDS)
@given(
    data=st.data(),
    size=sizes("b l n", largest=4),
    seed=seeds,
    norm=st.sampled_from(["pre", "none"]),
    ratio=st.sampled_from([0.3, 0.5, 1.0]),
    temperature=st.sampled_from([1.0, 0.2]),
    divide_by_count=st.booleans(),
)
def test_equals_paper_equations(backend, data, size, seed, norm, ratio, temperature, divide_by_count):
    b, l, n = size
    masks = {
        "visual_mask": data.draw(st.none() | paddings(b, n)),
        "language_mask": data.draw(st.none() | paddings(b, l)),
    }
    options = {"ratio": ratio, "temperature": temperature, "divide_by_count": divide_by_count}
    extractor = block(backend=backend, norm=norm, **options)
    out = extractor(*inputs(seed, *size), **masks)
    tokens, scores, mask = paper.extract(
        *inputs(seed, *size), extractor.state_dict(), num_heads=HEADS, **options, **masks
    )
    assert_equal(out.tokens, tokens)
    assert_equal(out.scores, scores)
    assert out.dynamic_mask.equal(mask)


@given(
    data=st.data(),
    size=sizes("b l n", largest=4),
    seed=seeds,
    refine=st.booleans(),
    relate=st.booleans(),
)
def test_steps_set_to_none_are_left_out(data, size, seed, refine, relate):
    b, l, n = size
    masks = {
        "visual_mask": data.draw(st.none() | paddings(b, n)),
        "language_mask": data.draw(st.none() | paddings(b, l)),
        "cue_mask": data.draw(st.none() | paddings(b, l)),
    }
    extractor = block()
    if not refine:
        extractor.refinement = None
    if not relate:
        extractor.relationship = None
    options = {"refine": refine, "relate": relate}
    out = extractor(*inputs(seed, *size), **masks)
    tokens, scores, mask = paper.extract(
        *inputs(seed, *size), extractor.state_dict(), num_heads=HEADS, ratio=0.4, **options, **masks
    )
    assert_equal(out.tokens, tokens)
    assert_equal(out.scores, scores)
    assert out.dynamic_mask.equal(mask)


def test_cues_alone_get_tokens_and_all_words_get_scores():
    extractor, size = block(), (2, 4, 9)
    cues = torch.tensor([[True, False, True, False], [False, False, True, True]])
    out, plain = extractor(*inputs(0, *size), cue_mask=cues), extractor(*inputs(0, *size))
    assert_equal(out.scores, plain.scores)
    assert out.tokens[~cues].eq(0).all() and not out.dynamic_mask[~cues].any()
    assert out.tokens[cues].abs().amax(dim=-1).gt(0).all()


def test_refuses_a_cue_mask_of_other_words():
    with pytest.raises(ValueError, match="cue_mask 'b l' has l=4, but language has l=3"):
        block()(*inputs(0, 2, 3, 9), cue_mask=torch.ones(2, 4).bool())
    with pytest.raises(TypeError, match="cue_mask must be bool"):
        block()(*inputs(0, 2, 3, 9), cue_mask=torch.ones(2, 3))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("norm", ["pre", "none"])
def test_gradients_equal_those_of_the_paper_equations(backend, norm):
    extractor = block(backend=backend, norm=norm)
    size = (3, 3, 7)
    masks = ragged(*size)
    cotangent = normal(9, 3, 3, DIMS["dim"])
    weights = dict(extractor.named_parameters())
    leaves = [x.requires_grad_() for x in inputs(0, *size)]
    outs = (
        extractor(*leaves, **masks).tokens,
        paper.extract(*leaves, weights, num_heads=HEADS, ratio=0.4, **masks)[0],
    )
    grads = [torch.autograd.grad(out, [*leaves, *weights.values()], cotangent) for out in outs]
    for actual, expected in zip(*grads, strict=True):
        assert_equal(actual, expected, largest=10)


def test_defaults_are_the_paper_setting():
    parameters = inspect.signature(VisualExpressionExtractor).parameters
    stated = {"ratio": 0.3, "divide_by_count": True, "temperature": 1.0, "norm": "pre", "backend": "auto"}
    stated |= {"joint_dim": 256, "num_heads": 8, "mlp_ratio": 4.0, "dropout": 0.0}
    assert {name: parameters[name].default for name in stated} == stated
    assert list(parameters)[:3] == list(DIMS)


# ------------------------------------------------------------------------------------- what may not matter


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("norm", ["pre", "none"])
@given(more_words=st.integers(0, 5), more_tokens=st.integers(0, 40), seed=seeds)
def test_padding_a_batch_further_changes_nothing(backend, norm, more_words, more_tokens, seed):
    b, l, n = 3, 4, 9
    extractor, masks = block(backend=backend, norm=norm), ragged(b, l, n)
    visual, language = inputs(seed, b, l, n)
    plain = extractor(visual, language, **masks)
    longer = extractor(
        pad(visual, (0, 0, 0, more_tokens), value=math.nan),
        pad(language, (0, 0, 0, more_words), value=math.nan),
        visual_mask=pad(masks["visual_mask"], (0, more_tokens), value=False),
        language_mask=pad(masks["language_mask"], (0, more_words), value=False),
    )
    assert longer.dynamic_mask[:, :l, :n].equal(plain.dynamic_mask)
    assert longer.dynamic_mask.sum() == plain.dynamic_mask.sum()
    assert_equal(longer.tokens[:, :l], plain.tokens)
    assert_equal(longer.scores[:, :l, :n], plain.scores)
    assert longer.tokens[:, l:].eq(0).all() and longer.scores[:, l:].eq(0).all()


@pytest.mark.parametrize("held", [math.nan, math.inf, 1e30])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("n", [9, 60])
def test_what_padding_holds_changes_no_value_and_no_gradient(held, backend, n):
    extractor, masks = block(backend=backend), ragged(3, 4, n)
    visual, language = inputs(0, 3, 4, n)
    results = []
    for fill in (0.0, held):
        leaves = [
            visual.masked_fill(~masks["visual_mask"][..., None], fill).requires_grad_(),
            language.masked_fill(~masks["language_mask"][..., None], fill).requires_grad_(),
        ]
        out = extractor(*leaves, **masks)
        total = out.tokens.square().sum() + out.scores.square().sum()
        results.append((*out, *torch.autograd.grad(total, [*leaves, *extractor.parameters()])))
    for clean, poisoned in zip(*results, strict=True):
        assert clean.isfinite().all() and poisoned.equal(clean)
    tokens, _, _, visual_grad, language_grad, *_ = results[1]
    assert tokens[~masks["language_mask"]].eq(0).all()
    assert visual_grad[~masks["visual_mask"]].eq(0).all()
    assert language_grad[~masks["language_mask"]].eq(0).all()


def test_masks_that_hide_nothing_equal_no_masks():
    extractor, size = block(), (2, 3, 9)
    masks = {"visual_mask": torch.ones(2, 9).bool(), "language_mask": torch.ones(2, 3).bool()}
    plain, masked = extractor(*inputs(0, *size)), extractor(*inputs(0, *size), **masks)
    assert masked.dynamic_mask.equal(plain.dynamic_mask)
    assert_equal(masked.tokens, plain.tokens)
    assert_equal(masked.scores, plain.scores)


@given(sizes("b l n", largest=5), seeds)
def test_batch_of_k_equals_k_batches_of_one(size, seed):
    extractor, masks = block(), ragged(*size)
    visual, language = inputs(seed, *size)
    together = extractor(visual, language, **masks)
    for i in range(size[0]):
        alone = extractor(
            visual[i : i + 1], language[i : i + 1], **{name: mask[i : i + 1] for name, mask in masks.items()}
        )
        assert together.dynamic_mask[i : i + 1].equal(alone.dynamic_mask)
        assert_equal(together.tokens[i : i + 1], alone.tokens)
        assert_equal(together.scores[i : i + 1], alone.scores)


@given(sizes("b l n", largest=6), seeds)
def test_permuting_visual_tokens_permutes_masks_and_keeps_tokens(size, seed):
    extractor, (visual, language) = block(), inputs(seed, *size)
    order = torch.randperm(size[2], generator=torch.Generator().manual_seed(seed))
    plain, permuted = extractor(visual, language), extractor(visual[:, order], language)
    assert permuted.dynamic_mask.equal(plain.dynamic_mask[..., order])
    assert_equal(permuted.scores, plain.scores[..., order])
    assert_equal(permuted.tokens, plain.tokens)


# --------------------------------------------------------------------------------- one module, many paths


@pytest.mark.parametrize("norm", ["pre", "none"])
def test_one_state_dict_gives_one_result_on_every_path(norm, monkeypatch):
    source = block(norm=norm)
    masks = ragged(3, 4, 9)
    results = []
    for backend, absorbs in (("auto", True), ("auto", False), ("eager", False), ("sdpa", False)):
        monkeypatch.setattr(MultiHeadAttention, "_absorbs", lambda *_, absorbs=absorbs: absorbs)
        other = block(norm=norm, backend=backend)
        for p in other.parameters():
            p.data.fill_(math.nan)
        assert list(other.state_dict()) == list(source.state_dict())
        other.load_state_dict(source.state_dict())
        results.append(other(*inputs(0, 3, 4, 9), **masks))
    for other in results[1:]:
        assert other.dynamic_mask.equal(results[0].dynamic_mask)
        assert_equal(other.tokens, results[0].tokens)


def test_gradient_reaches_every_parameter():
    extractor = block(norm="pre", ratio=0.6)
    extractor(*inputs(0, 2, 4, 9)).tokens.square().sum().backward()
    assert all(p.grad.abs().max() > 1e-8 for p in extractor.parameters())


def test_one_curated_token_leaves_curation_without_a_gradient():
    # Top-r itself has no gradient. What Eq. 5 passes on to Eq. 1 goes through a softmax, and that of one
    # score is 1 whatever the score; so it is for the queries and keys of Eq. 6.
    extractor = block(norm="pre", ratio=0.01)
    extractor(*inputs(0, 2, 4, 9)).tokens.square().sum().backward()
    silent = {name for name, p in extractor.named_parameters() if p.grad.abs().max() < 1e-12}
    curation = {f"curation.{name}" for name, _ in extractor.curation.named_parameters()}
    queries = {"attention_norm.weight", "attention_norm.bias", "attention.q_proj.weight"}
    queries |= {"attention.q_proj.bias", "attention.k_proj.weight"}
    assert silent == curation | {f"refinement.layer.{name}" for name in queries}


def test_scores_supervise_the_curation_only():
    extractor = block()
    extractor(*inputs(0, 2, 4, 9)).scores[:, 0].square().sum().backward()
    reached = {name.split(".")[0] for name, p in extractor.named_parameters() if p.grad is not None}
    assert reached == {"curation"}


def test_dropout_acts_in_training_only():
    extractor, size = block(dropout=0.5), (2, 3, 9)
    first, second = (extractor.train()(*inputs(0, *size)) for _ in range(2))
    assert not first.tokens.equal(second.tokens) and first.dynamic_mask.equal(second.dynamic_mask)
    resting = extractor.eval()(*inputs(0, *size))
    assert resting.tokens.equal(extractor(*inputs(0, *size)).tokens)
    assert_equal(resting.tokens, block()(*inputs(0, *size)).tokens)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
def test_finite_under_autocast_with_float32_scores(backend, autocast):
    extractor = block(backend=backend, norm="pre").float()
    masks = ragged(3, 4, 225)
    leaves = [x.float().requires_grad_() for x in inputs(0, 3, 4, 225)]
    with torch.autocast("cpu", dtype=autocast):
        out = extractor(*leaves, **masks)
    (out.tokens.float().square().sum() + out.scores.square().sum()).backward()
    assert out.scores.dtype == torch.float32 and out.tokens.isfinite().all()
    assert out.tokens[~masks["language_mask"]].eq(0).all()
    assert all(x.grad.isfinite().all() for x in (*leaves, *extractor.parameters()))


@pytest.mark.parametrize("backward", [False, True])
def test_peak_memory_holds_nothing_of_l_n_c_and_grows_linearly(backward):
    l, c, d = 21, 64, 16
    extractor = VisualExpressionExtractor(c, d, d, joint_dim=8, num_heads=2, mlp_ratio=1)
    peaks = {}
    for n in (900, 3600, 14400):
        leaves = [torch.randn(1, s, width, requires_grad=backward) for s, width in ((n, c), (l, d))]

        def run(leaves=leaves):
            tokens = extractor(*leaves).tokens
            return torch.autograd.grad(tokens.sum(), leaves) if backward else tokens

        with torch.set_grad_enabled(backward):
            peaks[n] = peak_bytes(run)
        assert peaks[n] < 4 * l * n * c
    assert 0.8 < fitted_exponent(peaks) < 1.1


def test_same_result_twice():
    extractor = block(norm="pre").float()
    visual, language = (x.float() for x in inputs(0, 2, 21, 225))
    for first, second in zip(*(extractor(visual, language) for _ in range(2)), strict=True):
        assert first.equal(second)


def test_compiles_once_for_all_sizes():
    extractor = block(norm="pre")
    cases = []
    for b, l, n in ((3, 4, 21), (7, 5, 30)):
        cases.append((inputs(0, b, l, n), ragged(b, l, n)))
    assert_compiles_once(extractor, cases)


# ------------------------------------------------------------------------------------------------- refusals


def test_ratio_in_per_cent_is_refused_with_the_share():
    with pytest.raises(ValueError, match=r"ratio must be in \(0, 1\], got 30; .* per cent, here 0\.3$"):
        block(ratio=30)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"num_heads": 3}, "dim=4 is not a multiple of num_heads=3"),
        ({"norm": "post"}, "norm must be 'pre' or 'none', got 'post'"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1"),
        ({"temperature": 0.0}, "temperature must be > 0, got 0"),
    ],
)
def test_refuses_options_out_of_range(options, says):
    with pytest.raises(ValueError, match=says):
        block(**options)


@pytest.mark.parametrize(
    ("masks", "error", "says"),
    [
        (
            {"visual_mask": torch.ones(2, 8).bool()},
            ValueError,
            "visual_mask 'b n' has n=8, but visual has n=9",
        ),
        ({"visual_mask": torch.ones(2, 9)}, TypeError, "visual_mask must be bool .*, got torch.float32"),
        (
            {"language_mask": torch.ones(2, 4).bool()},
            ValueError,
            "language_mask 'b l' has l=4, but language has",
        ),
        (
            {"language_mask": torch.ones(2, 3).int()},
            TypeError,
            "language_mask must be bool .*, got torch.int32",
        ),
    ],
)
def test_refuses_a_wrong_mask(masks, error, says):
    with pytest.raises(error, match=says):
        block()(*inputs(0, 2, 3, 9), **masks)


@pytest.mark.parametrize("backend", ["xformers", "triton"])
def test_named_backend_that_cannot_run_is_refused_not_replaced(backend):
    from metris_blocks.ops import explain_backends

    heads = torch.zeros(2, 3, HEADS, 2, dtype=torch.float64), *[torch.zeros(2, 9, HEADS, 2).double()] * 2
    if not (why := explain_backends(*heads, torch.ones(2, 9).bool())[backend]):
        pytest.skip(f"{backend} runs here")
    with pytest.raises(NotImplementedError) as refusal:
        block(backend=backend)(*inputs(0, 2, 3, 9))
    assert all(reason in str(refusal.value) for reason in why)
