"""The extractor as a guest in other models: any sizes, any cue, any dtype, and PyTorch's own tools."""

import copy
import io
import math
import pickle
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.nn.utils import parametrizations, prune
from torch.testing._internal.two_tensor import TwoTensor

from metris_blocks import PixelContrastiveLoss, VisualExpressionExtractor
from metris_blocks.layers import MultiHeadAttention
from metris_blocks.ops import top_r_mask
from tests.conftest import assert_equal, assert_within_budget
from tests.support import paper
from tests.support.strategies import normal, seeds, sizes

HEADS, DIM = 2, 16
CUES = ["first", "last", "mean", "learned"]
# Enough visual tokens for few words that "auto" absorbs the projections of Eq. 6.
ABSORBED, PROJECTED = 60, 3


def extractor(visual_dim=6, language_dim=5, dim=DIM, **options):
    torch.manual_seed(0)
    small = {"joint_dim": 6, "num_heads": HEADS, "mlp_ratio": 1.5, "ratio": 0.4}
    made = VisualExpressionExtractor(visual_dim, language_dim, dim, **(small | options)).double()
    if made.global_cue is not None and made.global_cue.query is not None:
        made.global_cue.query.data.normal_()
    return made


def inputs(seed=0, b=3, l=4, n=ABSORBED):
    return normal(seed, b, n, 6), normal(seed + 1, b, l, 5)


def ragged(b=3, l=4, n=ABSORBED):
    counts = torch.arange(b)[:, None]
    return {"visual_mask": torch.arange(n) < n - counts, "language_mask": torch.arange(l) < l - counts}


def test_both_ways_of_attending_are_met_below():
    mha, words = extractor().refinement.layer.attention, torch.empty(3, 4, DIM)
    assert mha._absorbs(words, torch.empty(3, ABSORBED, 6))
    assert not mha._absorbs(words, torch.empty(3, PROJECTED, 6))


# ------------------------------------------------------------------------------------------------- any sizes


@given(widths=st.tuples(*[st.integers(1, 9)] * 3), size=sizes("b l n"), seed=seeds, cue=st.sampled_from(CUES))
def test_any_widths_and_any_cue_equal_the_paper(widths, size, seed, cue):
    (c, e, half), (b, l, n) = widths, size
    guest = extractor(c, e, HEADS * half, global_cue=cue)
    visual, language = normal(seed, b, n, c), normal(seed + 1, b, l, e)
    weights = {k: v for k, v in guest.state_dict().items() if not k.startswith("global_cue")}
    heard = language if cue == "first" else guest.global_cue(language)[0]
    found = guest(visual, language)
    tokens, scores, mask = paper.extract(visual, heard, weights, num_heads=HEADS, ratio=0.4)
    assert found.tokens.shape[1] == found.scores.shape[1] == l + (cue != "first")
    assert_equal(found.tokens, tokens, largest=10)
    assert_equal(found.scores, scores)
    assert found.dynamic_mask.equal(mask)


def test_levels_of_several_maps_are_tokens_of_one():
    guest, (_, language) = extractor(), inputs()
    maps = [normal(seed, 3, 6, h, w) for seed, (h, w) in enumerate([(5, 9), (3, 5), (2, 1)])]
    grids = [x.shape[2:] for x in maps]
    levels = [x.flatten(2).mT for x in maps]
    both = guest(torch.cat(levels, dim=1), language)
    # Only the first level is real: the others are as if they were not there.
    first = torch.arange(45 + 15 + 2) < 45
    alone = guest(torch.cat(levels, dim=1), language, visual_mask=first.expand(3, -1))
    assert_equal(alone.tokens, guest(levels[0], language).tokens)
    # The order of the levels moves the scores and nothing else.
    turned = guest(torch.cat(levels[::-1], dim=1), language)
    assert_equal(turned.tokens, both.tokens)
    loss = PixelContrastiveLoss()
    target = (normal(9, 3, 90, 90) > 0).double()
    per_level = {}
    for name, out, sizes_of, grids_of in (
        ("fine first", both, [45, 15, 2], grids),
        ("coarse first", turned, [2, 15, 45], grids[::-1]),
    ):
        parts = out.scores[:, 0].split(sizes_of, dim=1)
        per_level[name] = {g: loss(s, target, grid=g) for s, g in zip(parts, grids_of, strict=True)}
    for grid in grids:
        assert_equal(per_level["coarse first"][grid], per_level["fine first"][grid])


# --------------------------------------------------------------------------------- global cues, padding sides


def test_learned_cue_learns_also_beside_an_empty_sentence():
    guest = extractor(global_cue="learned")
    guest.global_cue.query.data.zero_()
    visual, language = inputs()
    mask = ragged()["language_mask"] & torch.tensor([[True], [True], [False]])
    out = guest(visual, language.masked_fill(~mask[..., None], math.nan), language_mask=mask)
    out.tokens.square().sum().backward()
    assert guest.global_cue.query.grad.isfinite().all() and guest.global_cue.query.grad.abs().max() > 1e-8
    assert out.tokens[2].eq(0).all() and not out.mask[2].any()


@pytest.mark.parametrize("backend", ["auto", "eager"])
@pytest.mark.parametrize("cue", CUES)
@given(lengths=st.tuples(*[st.integers(1, 4)] * 3), more=st.integers(0, 3), seed=seeds)
def test_padding_on_either_side_changes_nothing(cue, backend, lengths, more, seed):
    guest, (visual, language) = extractor(global_cue=cue, backend=backend), inputs(seed)
    width = 4 + more
    results = {}
    for side in ("left", "right"):
        words, pixels = (torch.full((3, s, c), math.nan).double() for s, c in ((width, 5), (64, 6)))
        word_mask, pixel_mask = torch.zeros(3, width).bool(), torch.zeros(3, 64).bool()
        for i, k in enumerate(lengths):
            count = 15 * k - 12
            here, there = (
                (slice(-k, None), slice(-count, None)) if side == "left" else (slice(k), slice(count))
            )
            words[i, here], word_mask[i, here] = language[i, :k], True
            pixels[i, there], pixel_mask[i, there] = visual[i, :count], True
        out = guest(pixels, words, visual_mask=pixel_mask, language_mask=word_mask)
        assert out.mask[:, -width:].equal(word_mask)
        results[side] = [
            (out.tokens[i, out.mask[i]], out.scores[i, out.mask[i]][:, pixel_mask[i]]) for i in range(3)
        ]
    for left, right in zip(results["left"], results["right"], strict=True):
        for one, other in zip(left, right, strict=True):
            assert_equal(one, other.detach())


def test_cue_mask_speaks_of_the_words_given_and_the_cue_always_curates():
    guest, (visual, language) = extractor(global_cue="mean"), inputs()
    silent = torch.zeros(3, 4).bool()
    out = guest(visual, language, cue_mask=silent)
    assert out.mask.equal(torch.tensor([[True, False, False, False, False]] * 3))
    with pytest.raises(ValueError, match="cue_mask 'b l' has l=5, but language has l=4"):
        guest(visual, language, cue_mask=torch.ones(3, 5).bool())


def test_refuses_an_unknown_cue():
    with pytest.raises(ValueError, match=r"global_cue must be one of .*, got 'cls'"):
        extractor(global_cue="cls")


# ------------------------------------------------------------------------------------------------- 16 bits


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("cue", ["first", "learned"])
def test_16_bit_weights_and_inputs_err_as_textbook_code_does(dtype, cue):
    rounded = [x.to(dtype) for x in inputs()]
    # All tokens are curated: which ones are on the edge of top-r is decided by the rounding of Eq. 1.
    results = {}
    for backend, kind in (("auto", dtype), ("sdpa", dtype), ("eager", dtype), ("eager", torch.float64)):
        guest = extractor(ratio=1.0, backend=backend, global_cue=cue).to(dtype)
        out = guest.to(kind)(*(x.to(kind) for x in rounded), **ragged())
        results[backend, kind] = out.tokens.detach()
    for backend in ("auto", "sdpa"):
        assert_within_budget(
            results[backend, dtype], results["eager", dtype], results["eager", torch.float64]
        )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_curation_keeps_float32_scores_and_exact_counts(dtype):
    guest = extractor().to(dtype)
    leaves, masks = [x.to(dtype).requires_grad_() for x in inputs()], ragged()
    out = guest(*leaves, **masks)
    assert out.scores.dtype == torch.float32 and out.tokens.dtype == dtype
    chosen = top_r_mask(out.scores, 0.4, visual_mask=masks["visual_mask"])
    assert out.dynamic_mask.equal(chosen & masks["language_mask"][..., None])
    out.tokens.float().square().sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in (*leaves, *guest.parameters()))


# --------------------------------------------------------------------------------------------- torch.func


def one(guest, weights, visual, language, visual_mask, language_mask):
    """Tokens of one sample without its batch axis, by weights given from outside."""
    masks = {"visual_mask": visual_mask[None], "language_mask": language_mask[None]}
    return functional_call(guest, weights, (visual[None], language[None]), masks).tokens[0]


@pytest.fixture
def quiet():
    """PyTorch says that vmap has no rule for one of its own kernels and takes a loop."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "There is a performance drop")
        yield


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("backend", ["auto", "eager", "sdpa"])
@pytest.mark.parametrize("n", [ABSORBED, PROJECTED])
@pytest.mark.parametrize("cue", ["first", "learned"])
def test_vmap_gives_the_batch_and_gradients_of_each_sample(backend, n, cue):
    guest = extractor(backend=backend, global_cue=cue)
    batch, masks = inputs(n=n), ragged(n=n)
    weights = {k: p.detach() for k, p in guest.named_parameters()}
    samples = (*batch, *masks.values())
    mapped = vmap(one, in_dims=(None, None, 0, 0, 0, 0))(guest, weights, *samples)
    assert_equal(mapped, guest(*batch, **masks).tokens.detach())
    loss = lambda weights, *sample: one(guest, weights, *sample).square().sum()
    per_sample = vmap(grad(loss), in_dims=(None, 0, 0, 0, 0))(weights, *samples)
    for i in range(3):
        total = one(guest, dict(guest.named_parameters()), *(x[i] for x in samples)).square().sum()
        # With one real word and three tokens nothing competes: some weights are then without effect.
        found = torch.autograd.grad(total, list(guest.parameters()), materialize_grads=True)
        for name, expected in zip(weights, found, strict=True):
            assert_equal(per_sample[name][i], expected, largest=100)


@pytest.mark.usefixtures("quiet")
def test_an_ensemble_runs_at_once():
    guests = [extractor(), extractor()]
    for p in guests[1].parameters():
        p.data.mul_(1.5)
    weights, buffers = stack_module_state(guests)
    batch, masks = inputs(), ragged()
    run = lambda weights, buffers: functional_call(guests[0], (weights, buffers), batch, masks).tokens
    for mapped, guest in zip(vmap(run)(weights, buffers), guests, strict=True):
        assert_equal(mapped, guest(*batch, **masks).tokens.detach(), largest=10)


# ----------------------------------------------------------------------------- copies, files, hooks, starts


@pytest.mark.parametrize("cue", CUES)
@pytest.mark.parametrize("way", ["deepcopy", "pickle", "state_dict", "torch.save"])
def test_copies_are_equal_and_stand_alone(way, cue):
    guest = extractor(global_cue=cue)
    if way == "deepcopy":
        other = copy.deepcopy(guest)
    elif way == "pickle":
        other = pickle.loads(pickle.dumps(guest))
    else:
        other, state = extractor(global_cue=cue), guest.state_dict()
        for p in other.parameters():
            p.data.fill_(math.nan)
        if way == "torch.save":
            file = io.BytesIO()
            torch.save(state, file)
            file.seek(0)
            state = torch.load(file, weights_only=True)
        other.load_state_dict(state)
    before = guest(*inputs(), **ragged())
    for found, expected in zip(other(*inputs(), **ragged()), before, strict=True):
        assert found.equal(expected)
    for p in other.parameters():
        p.data.add_(1.0)
    assert guest(*inputs(), **ragged()).tokens.equal(before.tokens)


def test_first_token_as_cue_adds_nothing_to_checkpoints():
    names = set(extractor().state_dict())
    assert not [name for name in names if name.startswith("global_cue")]
    assert set(extractor(global_cue="learned").state_dict()) - names == {"global_cue.query"}
    assert set(extractor(global_cue="last").state_dict()) == names


@pytest.mark.parametrize("n", [ABSORBED, PROJECTED])
def test_hooks_of_every_part_are_called_and_may_change_what_it_gives(n):
    # Of one curated token the score has no effect: all three are.
    guest = extractor(ratio=1.0)
    plain = guest(*inputs(n=n)).tokens.detach()
    seen, parts = set(), {name for name, part in guest.named_modules() if not list(part.children())}
    for name, part in guest.named_modules():
        part.register_forward_hook(lambda *_, name=name: seen.add(name))
        part.register_full_backward_hook(lambda *_, name=name: seen.add(f"{name} backward"))
    out = guest(*(x.requires_grad_() for x in inputs(n=n))).tokens
    assert_equal(out, plain)
    out.square().sum().backward()
    assert parts <= seen
    with_weights = {name for name in parts if list(guest.get_submodule(name).parameters())}
    assert {f"{name} backward" for name in with_weights} <= seen
    for name in with_weights:
        changed = extractor(ratio=1.0)
        changed.get_submodule(name).register_forward_hook(lambda _, __, out: out + out.detach().roll(1, -1))
        assert not torch.allclose(changed(*inputs(n=n)).tokens, plain), name


def test_weights_start_as_documented():
    torch.manual_seed(0)
    guest = VisualExpressionExtractor(64, 48, 64, global_cue="learned")
    known = {"global_cue.query"}
    for name, part in guest.named_modules():
        if isinstance(part, nn.Linear):
            bound = 1 / math.sqrt(part.in_features)
            assert 0.98 * bound < part.weight.abs().max() <= bound, name
            # A uniform's standard deviation.
            assert abs(part.weight.std() * math.sqrt(3) / bound - 1) < 0.05, name
            assert part.bias is None or part.bias.abs().max() <= bound, name
        elif isinstance(part, nn.LayerNorm):
            assert part.weight.eq(1).all() and part.bias.eq(0).all(), name
        else:
            continue
        known |= {f"{name}.{own}" for own, _ in part.named_parameters()}
    assert known == {name for name, _ in guest.named_parameters()}
    assert guest.global_cue.query.eq(0).all()


# --------------------------------------------------------------------- what others put in place of a Linear


@pytest.mark.parametrize("n", [ABSORBED, PROJECTED])
def test_lora_on_every_linear_layer_trains_acts_and_merges(n):
    guest = extractor(ratio=1.0)
    plain = guest(*inputs(n=n)).tokens.detach()
    names = [name for name, part in guest.named_modules() if isinstance(part, nn.Linear)]
    # Not zero at the start, so that all of it acts.
    adapted = get_peft_model(guest, LoraConfig(target_modules=names, r=2, init_lora_weights=False)).double()
    out = adapted(*inputs(n=n)).tokens
    out.square().sum().backward()
    learning = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    assert len(learning) == 2 * len(names) and all("lora_" in name for name in learning)
    assert [name for name, p in learning.items() if not p.grad.abs().max() > 1e-9] == []
    with adapted.disable_adapter():
        assert_equal(adapted(*inputs(n=n)).tokens, plain)
    assert not torch.allclose(out, plain)
    merged = adapted.merge_and_unload()
    assert {type(merged.get_submodule(name)) for name in names} == {nn.Linear}
    assert_equal(merged(*inputs(n=n)).tokens, out.detach(), largest=10)


def test_only_plain_projections_are_absorbed():
    shapes = torch.empty(3, 4, DIM), torch.empty(3, ABSORBED, 6)
    x, context = normal(0, *shapes[0].shape), normal(1, *shapes[1].shape)
    plain = MultiHeadAttention(DIM, 6, num_heads=HEADS).double()
    assert plain._absorbs(*shapes)
    for name in ("q_proj", "k_proj", "v_proj"):
        normed, pruned, replaced = (copy.deepcopy(plain) for _ in range(3))
        parametrizations.weight_norm(getattr(normed, name))
        assert_equal(normed(x, context), plain(x, context).detach())
        prune.l1_unstructured(getattr(pruned, name), "weight", amount=0.5)
        # Pruning makes the weight anew in a hook, from what an optimiser has changed.
        getattr(pruned, name).weight_orig.data.mul_(2)
        baked = copy.deepcopy(plain)
        getattr(baked, name).weight.data = 2 * getattr(pruned, name).weight_mask * getattr(plain, name).weight
        assert_equal(pruned(x, context), baked(x, context).detach())
        setattr(replaced, name, nn.Sequential(getattr(plain, name), nn.Tanh()))
        assert not torch.allclose(replaced(x, context), plain(x, context))
        wrapped, weight = copy.deepcopy(plain), getattr(plain, name).weight.detach()
        # As a quantised or sharded weight: a tensor made of others.
        getattr(wrapped, name).weight = nn.Parameter(TwoTensor(weight, weight.clone()))
        moved = copy.deepcopy(plain)
        part = getattr(moved, name)
        part.forward = lambda x, forward=part.forward: 2 * forward(x)  # as accelerate's hooks do
        for other in (normed, pruned, replaced, wrapped, moved):
            assert not other._absorbs(*shapes)
