"""Image and text encoders: one interface whatever is behind it; foreign weights give the same features."""

import json
import os
import pickle
from math import ceil
from string import ascii_lowercase

import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertModel,
    BertTokenizer,
    ByT5Tokenizer,
    CLIPConfig,
    CLIPModel,
    CLIPTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Tokenizer,
    SwinConfig,
    SwinForImageClassification,
    T5Config,
    T5ForConditionalGeneration,
    T5Tokenizer,
)

from reference_model.checkpoints.checkpoint import load_checkpoint
from reference_model.files import InputError
from reference_model.model.build import build_metris
from reference_model.model.image_encoder import ImageEncoder
from reference_model.model.text_encoder import TextEncoder
from reference_model.tokens import article_ids, build_tokenizer, load_tokenizer, tokenize
from reference_model.training.train import train
from reference_model.viewing.explain import encode, explain, named
from tests.support.options import replace

TIMM, HUGGING = "swin_tiny_patch4_window7_224", "transformers/microsoft/swin-tiny-patch4-window7-224"
HEADS = [1, 2, 2, 4]
SWIN = {"embed_dim": 8, "depths": [2, 2, 2, 2], "num_heads": HEADS}
RESNET = {"channels": [8, 8, 12, 16], "stem_width": 8, "out_indices": [1, 2, 3, 4]}


# Swin Transformer, as its authors' files have it


def original_weights(window: int) -> dict[str, torch.Tensor]:
    """What a classification checkpoint of the authors holds, in small and at random."""
    generator = torch.Generator().manual_seed(window)
    draw = lambda *shape: torch.randn(*shape, generator=generator) * 0.3
    weights = {"patch_embed.proj.weight": draw(8, 3, 4, 4), "patch_embed.proj.bias": draw(8)}
    norm = lambda name, c: weights.update({f"{name}.weight": 1 + draw(c), f"{name}.bias": draw(c)})
    linear = lambda name, o, i: weights.update({f"{name}.weight": draw(o, i), f"{name}.bias": draw(o)})
    norm("patch_embed.norm", 8)
    for i, heads in enumerate(HEADS):
        c = 8 * 2**i
        for j in range(2):
            block = f"layers.{i}.blocks.{j}"
            norm(f"{block}.norm1", c)
            weights[f"{block}.attn.relative_position_bias_table"] = 3 * draw((2 * window - 1) ** 2, heads)
            weights[f"{block}.attn.relative_position_index"] = torch.zeros(window**2, window**2).long()
            if j:
                weights[f"{block}.attn_mask"] = torch.zeros(4, window**2, window**2)
            linear(f"{block}.attn.qkv", 3 * c, c)
            linear(f"{block}.attn.proj", c, c)
            norm(f"{block}.norm2", c)
            linear(f"{block}.mlp.fc1", 4 * c, c)
            linear(f"{block}.mlp.fc2", c, 4 * c)
        if i < 3:
            weights[f"layers.{i}.downsample.reduction.weight"] = draw(2 * c, 4 * c)
            norm(f"layers.{i}.downsample.norm", 4 * c)
    norm("norm", 64)
    linear("head", 10, 64)
    return weights


def original_features(weights, image, window):
    """The four maps (b, c, h, w) in float64, normalised: pad, roll by half a window, attend in windows."""
    w = {key: x.double() for key, x in weights.items()}
    linear = lambda x, name: F.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))
    norm = lambda x, name: F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"])
    image = F.pad(image.double(), (0, -image.shape[3] % 4, 0, -image.shape[2] % 4))
    x = F.conv2d(image, w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=4).permute(
        0, 2, 3, 1
    )
    x, maps = norm(x, "patch_embed.norm"), []
    for i, heads in enumerate(HEADS):
        for j in range(2):
            name = f"layers.{i}.blocks.{j}"
            x = x + _window_attention(norm(x, f"{name}.norm1"), w, linear, f"{name}.attn", heads, window, j)
            x = x + linear(F.gelu(linear(norm(x, f"{name}.norm2"), f"{name}.mlp.fc1")), f"{name}.mlp.fc2")
        maps.append(F.layer_norm(x, x.shape[-1:]).permute(0, 3, 1, 2))
        if i < 3:
            x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
            x = torch.cat([x[:, a::2, b::2] for a, b in ((0, 0), (1, 0), (0, 1), (1, 1))], dim=-1)
            x = linear(norm(x, f"layers.{i}.downsample.norm"), f"layers.{i}.downsample.reduction")
    return maps


def _window_attention(x, w, linear, name, heads, window, shifted):
    b, rows, columns, c = x.shape
    shift = window // 2 if shifted else 0
    x = F.pad(x, (0, 0, 0, -columns % window, 0, -rows % window))
    high, wide = x.shape[1:3]
    x = x.roll((-shift, -shift), dims=(1, 2))
    out = torch.empty_like(x)
    place = torch.cartesian_prod(torch.arange(window), torch.arange(window))
    apart = place[:, None] - place[None] + window - 1
    bias = w[f"{name}.relative_position_bias_table"][apart[..., 0] * (2 * window - 1) + apart[..., 1]]
    for top in range(0, high, window):
        for left in range(0, wide, window):
            inside = x[:, top : top + window, left : left + window].reshape(b, window**2, c)
            q, k, v = linear(inside, f"{name}.qkv").reshape(b, -1, 3, heads, c // heads).unbind(2)
            scores = torch.einsum("bihe,bjhe->bijh", q, k) / (c // heads) ** 0.5 + bias
            # What the roll brought round the edge was no neighbour before.
            around = torch.stack(
                [place[:, 0] + top >= high - shift, place[:, 1] + left >= wide - shift], dim=1
            )
            strangers = (around[:, None] != around[None]).any(dim=-1)
            scores = scores.masked_fill(strangers[None, :, :, None], -torch.inf).softmax(dim=2)
            mixed = torch.einsum("bijh,bjhe->bihe", scores, v).reshape(b, window, window, c)
            out[:, top : top + window, left : left + window] = linear(mixed, f"{name}.proj")
    return out.roll((shift, shift), dims=(1, 2))[:, :rows, :columns]


@pytest.fixture(scope="module")
def pth(tmp_path_factory):
    """The path of an original file for a window."""
    folder = tmp_path_factory.mktemp("original")

    def path(window):
        file = folder / f"swin_window{window}.pth"
        if not file.exists():
            torch.save({"model": original_weights(window)}, file)
        return file

    return path


def swin(name, window, size, **more):
    return ImageEncoder(name, image_size=size, options={**SWIN, "window_size": window}, **more).eval()


@pytest.mark.parametrize("name", [TIMM, HUGGING])
def test_original_weights_give_the_original_features(name, pth):
    image = torch.randn(2, 3, 128, 192)  # maps of 32x48 to 4x6: whole windows, all smaller than their map
    encoder = swin(name, 2, 128, weights=pth(2)).double()
    expected = original_features(original_weights(2), image, 2)
    with torch.no_grad():
        got = encoder(image.double())
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("high", "wide"), [(97, 130), (100, 77)])
def test_transformers_pads_and_rolls_as_the_original_does(high, wide, pth):
    image = torch.randn(1, 3, high, wide)
    expected = original_features(original_weights(4), image, 4)
    with torch.no_grad():
        got = swin(HUGGING, 4, 64, weights=pth(4)).double()(image.double())
        other = swin(TIMM, 4, 256, weights=pth(4)).double()(image.double())
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)
    # timm rolls, then pads: what the choice between the two is about.
    assert (other[-1] - expected[-1]).abs().max() > 1e-2


@pytest.mark.parametrize("name", [TIMM, HUGGING])
def test_original_weights_of_another_window_are_resized(name, pth, tmp_path):
    weights = original_weights(2)
    for key in [key for key in weights if key.endswith("relative_position_bias_table")]:
        weights[key] = weights[key].mean(dim=0).expand_as(weights[key]).clone()
    torch.save(weights, tmp_path / "flat.pth")
    encoder = swin(name, 4, 256, weights=tmp_path / "flat.pth")
    tables = {k: x for k, x in encoder.state_dict().items() if k.endswith("relative_position_bias_table")}
    assert len(tables) == 8
    for (key, table), was in zip(tables.items(), (x for k, x in weights.items() if k.endswith("_table"))):
        assert len(table) == 49, key
        torch.testing.assert_close(table, was[:1].expand_as(table), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [TIMM, HUGGING])
@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda w: w.pop("layers.2.blocks.1.attn.qkv.bias"), r"lacks layers\.2\.blocks\.1\.attn\.qkv\.bias"),
        (lambda w: w.pop("layers.1.downsample.norm.bias"), r"lacks layers\.1\.downsample\.norm\.bias"),
        (
            lambda w: w.update({"layers.3.blocks.0.mlp.fc1.weight": torch.zeros(3, 64)}),
            r"layers\.3\.blocks\.0\.mlp\.fc1\.weight has shape \(3, 64\), but image_encoder builds \(256,",
        ),
        (
            lambda w: w.update({"layers.0.blocks.0.attn.relative_position_bias_table": torch.zeros(9, 7)}),
            r"layers\.0\.blocks\.0\.attn\.relative_position_bias_table has shape \(9, 7\)",
        ),
        (
            lambda w: w.update({"layers.2.blocks.2.norm1.bias": torch.zeros(32)}),
            r"holds 1 weights that image_encoder has no place for, first layers\.2\.blocks\.2\.norm1\.bias",
        ),
    ],
)
def test_original_weights_that_do_not_fit_are_refused_by_name(name, change, says, tmp_path):
    weights = original_weights(2)
    change(weights)
    torch.save({"model": weights}, tmp_path / "swin.pth")
    with pytest.raises(InputError, match=says) as caught:
        swin(name, 2, 128, weights=tmp_path / "swin.pth")
    assert "\n" not in str(caught.value) and "swin.pth" in str(caught.value)


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", [TIMM, HUGGING, "resnet10t"])
def test_weight_file_that_runs_code_is_refused_and_does_not_run_it(name, tmp_path):
    (tmp_path / "swin.pth").write_bytes(pickle.dumps({"model": Payload(tmp_path / "executed")}))
    with pytest.raises(InputError, match=r"swin\.pth") as caught:
        ImageEncoder(name, image_size=64, weights=tmp_path / "swin.pth", options={})
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "executed").exists()


def test_transformers_refuses_a_file_of_another_layout(tmp_path):
    torch.save({"stem.weight": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(InputError, match=r"other\.pth is not laid out as the original Swin"):
        swin(HUGGING, 2, 64, weights=tmp_path / "other.pth")


# Image encoders


def test_every_map_of_transformers_swin_is_normalised_once_and_all_weights_learn():
    encoder = swin(HUGGING, 4, 64)
    image = torch.randn(2, 3, 64, 64)
    maps = encoder(image)
    raw = encoder.backbone(image, output_hidden_states=True).hidden_states[1:]
    assert (encoder.channels, encoder.strides) == ([8, 16, 32, 64], [4, 8, 16, 32])
    for got, before in zip(maps, raw, strict=True):
        expected = F.layer_norm(before.permute(0, 2, 3, 1), before.shape[1:2]).permute(0, 3, 1, 2)
        torch.testing.assert_close(got, expected, rtol=0, atol=2e-6)
    sum((x * torch.randn_like(x)).sum() for x in maps).backward()
    assert [name for name, p in encoder.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_window_that_divides_the_maps_is_taken_and_nothing_is_padded(monkeypatch):
    # As window 15 divides the maps of 480 px, 120 to 15, so does 3 those of 96 px, 24 to 3; 12 and 2 do not.
    pads = []
    pad = F.pad
    spy = lambda x, sides, *rest, **more: pads.append(sum(sides)) or pad(x, sides, *rest, **more)
    monkeypatch.setattr(torch.nn.functional, "pad", spy)
    padded = {}
    for window in (3, 2):
        pads.clear()
        encoder = swin(TIMM, window, 96)
        with torch.no_grad():
            encoder(torch.randn(1, 3, 96, 96))
        padded[window] = sum(pads)
        tables = [x for name, x in encoder.named_parameters() if name.endswith("_table")]
        assert {len(table) for table in tables} == {(2 * window - 1) ** 2}
    assert padded[3] == 0 < padded[2]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        (TIMM, {**SWIN, "window_size": 3}),
        (HUGGING, {**SWIN, "window_size": 3}),
        ("resnet10t", RESNET),
        ("convnext_atto", {"depths": [1, 1, 1, 1], "dims": [8, 12, 16, 24]}),
    ],
)
@pytest.mark.parametrize(("high", "wide"), [(97, 130), (100, 77), (64, 64)])
def test_logits_have_the_size_of_the_image_whatever_it_is(name, options, high, wide, small):
    model = build_metris(replace(small, image_encoder=name, image_encoder_options=options)).eval()
    image, ids = torch.randn(2, 3, high, wide), torch.randint(5, 120, (2, 5))
    with torch.no_grad():
        logits = model(image, ids, torch.ones(2, 5).bool()).logits
        maps = model.image_encoder(image)
    assert logits.shape == (2, high, wide) and logits.isfinite().all()
    strides = model.image_encoder.strides
    if "swin" not in name:  # to whole cells of the coarsest map
        high, wide = (ceil(side / strides[-1]) * strides[-1] for side in (high, wide))
    sizes = [(ceil(high / stride), ceil(wide / stride)) for stride in strides]
    assert [tuple(x.shape[-2:]) for x in maps] == sizes


@pytest.mark.parametrize("name", [TIMM, HUGGING])
def test_logits_are_cut_where_the_image_ends(name, small):
    options = {**SWIN, "window_size": 3}
    model = build_metris(replace(small, image_encoder=name, image_encoder_options=options)).eval()
    image, ids = torch.randn(2, 3, 61, 62), torch.randint(5, 99, (2, 6))
    found, padded = model(image, ids, ids > 0), model(F.pad(image, (0, 2, 0, 3)), ids, ids > 0)
    torch.testing.assert_close(found.logits, padded.logits[:, :61, :62], rtol=0, atol=1e-5)


def test_image_is_padded_right_and_bottom_with_zeros_to_whole_patches():
    image = torch.randn(1, 3, 61, 50)
    for name in (TIMM, HUGGING):
        encoder = swin(name, 4, 64)
        with torch.no_grad():
            for ours, theirs in zip(encoder(image), encoder(F.pad(image, (0, 2, 0, 3))), strict=True):
                torch.testing.assert_close(ours, theirs)


def test_image_of_a_size_that_a_model_cannot_take_is_refused():
    options = {"depth": 4, "embed_dim": 12, "num_heads": 2, "out_indices": [0, 1, 2, 3]}
    fixed = ImageEncoder("vit_tiny_patch16_224", image_size=64, options=options)
    assert fixed(torch.randn(1, 3, 64, 64))[-1].shape == (1, 12, 4, 4)
    with pytest.raises(InputError, match=r"cannot take an image of 97x130 .*; resize it to 64x64") as caught:
        fixed(torch.randn(1, 3, 97, 130))
    assert "\n" not in str(caught.value)
    dynamic = {**options, "dynamic_img_size": True}
    flexible = ImageEncoder("vit_tiny_patch16_224", image_size=64, options=dynamic)
    assert flexible(torch.randn(1, 3, 97, 130))[-1].shape == (1, 12, 7, 9)


def test_transformers_swin_comes_from_a_folder_and_is_built_again_without_it(small, tmp_path):
    donor = SwinForImageClassification(SwinConfig(**SWIN, window_size=3, num_labels=7)).half().eval()
    donor.save_pretrained(tmp_path)
    options = {"drop_path_rate": 0.0}
    config = replace(small, image_encoder=HUGGING, image_encoder_options=options, image_weights=tmp_path)
    model = build_metris(config).eval()
    image = torch.randn(1, 3, 96, 96)
    donor = donor.float()
    with torch.no_grad():
        raw = donor.swin(image, always_partition=True, output_hidden_states=True).reshaped_hidden_states[-1]
        got = model.image_encoder(image)[-1]
    expected = F.layer_norm(raw.permute(0, 2, 3, 1), raw.shape[1:2]).permute(0, 3, 1, 2)
    assert got.dtype == torch.float32  # whatever the file is kept in
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    again = build_metris(replace(model.config, image_weights=None))
    again.load_state_dict(model.state_dict())
    assert again.eval().image_encoder(image)[-1].equal(model.image_encoder(image)[-1])


def test_transformers_folder_that_lacks_weights_is_refused(tmp_path):
    SwinForImageClassification(SwinConfig(**SWIN, window_size=3)).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"depths": [2, 2, 3, 2]}))
    with pytest.raises(InputError, match=r"lacks \d+ weights, first swin\.encoder\.layers\.2\.blocks\.2"):
        ImageEncoder(HUGGING, image_size=64, weights=tmp_path)


def test_transformers_name_gives_the_size():
    with torch.device("meta"):
        encoder = ImageEncoder("transformers/microsoft/swin-base-patch4-window12-384-in22k", image_size=480)
    assert encoder.channels == [128, 256, 512, 1024]
    assert (encoder.options["window_size"], encoder.options["depths"]) == (12, [2, 2, 18, 2])
    # 88 M at 384 px (Swin Transformer, Table 1), less the 1.03 M of a thousand classes.
    assert sum(p.numel() for p in encoder.parameters()) / 1e6 == pytest.approx(88 - 1.03, abs=0.5)


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("transformers/somebody/swim", {}, "does not tell its size; give embed_dim, depths, num_heads"),
        (HUGGING, {"windowsize": 7}, "transformers' Swin has no windowsize"),
        (HUGGING, {**SWIN, "depths": [2, 2]}, "transformers cannot build it"),
        (HUGGING, {**SWIN, "embed_dim": "many"}, "image_encoder_options: .*embed_dim.*many"),
        (TIMM + ".nobodys", {}, "timm cannot build it"),
    ],
)
def test_image_encoder_refuses_what_cannot_be_built(name, options, says):
    with pytest.raises(InputError, match=says) as caught:
        ImageEncoder(name, image_size=64, options=options)
    assert "\n" not in str(caught.value)


# Text encoders

TINY = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
T5 = {"d_model": 24, "d_kv": 12, "d_ff": 24, "num_layers": 2, "num_heads": 2}
DISTIL = {"dim": 24, "n_layers": 2, "n_heads": 2, "hidden_dim": 24}
KINDS = {
    "bert": TINY,
    "clip": {"model_type": "clip_text_model", **TINY, "max_position_embeddings": 20},
    "roberta": {"model_type": "roberta", **TINY, "max_position_embeddings": 22},
    "distilbert": {"model_type": "distilbert", **DISTIL},
    **{kind: {"model_type": kind, **T5} for kind in ("t5", "mt5", "umt5")},
    "gpt2": {"model_type": "gpt2", "n_embd": 24, "n_layer": 2, "n_head": 2, "n_positions": 20},
    "llama": {"model_type": "llama", **TINY, "max_position_embeddings": 20},
    "qwen2": {"model_type": "qwen2", **TINY, "num_key_value_heads": 1, "max_position_embeddings": 20},
    # As its smallest published one, whose states are narrower than what it computes with.
    "opt": {"model_type": "opt", "hidden_size": 24, "word_embed_proj_dim": 12, "num_hidden_layers": 2}
    | {"num_attention_heads": 2, "ffn_dim": 24, "max_position_embeddings": 20},
}
CLOSING = ("clip", "t5", "mt5", "umt5", "gpt2", "llama", "qwen2", "opt")


def text_encoder(kind):
    return TextEncoder("unused", vocab_size=60, options=KINDS[kind]).eval()


def sentences():
    """Ids (3, 8) and mask of 8, 5 and 3 real tokens: 2 opens, 3 closes, 0 pads."""
    mask = torch.arange(8) < torch.tensor([[8], [5], [3]])
    ids = torch.randint(5, 60, (3, 8)).masked_fill(~mask, 0)
    ids[:, 0] = 2
    ids[torch.arange(3), mask.sum(dim=1) - 1] = 3
    return ids, mask


@pytest.mark.parametrize("kind", KINDS)
def test_first_token_is_the_global_cue_and_hears_every_word(kind):
    encoder, (ids, mask) = text_encoder(kind), sentences()
    language = encoder(ids, mask)
    assert language.tokens.shape == (3, 8, encoder.dim) and language.mask.equal(mask)
    assert language.tokens[:, 0].equal(language.cue)
    for row, word in ((0, 6), (1, 1), (2, 1)):
        other = ids.clone()
        other[row, word] = 5 + (ids[row, word] - 4) % 55
        change = (encoder(other, mask).cue[row] - language.cue[row]).abs().max()
        assert change > 1e-4 * language.cue[row].abs().max()  # rounding is 1e-6 of it


@pytest.mark.parametrize("kind", KINDS)
def test_padding_changes_neither_tokens_nor_cue(kind):
    encoder, (ids, mask) = text_encoder(kind), sentences()
    short = encoder(ids, mask)
    noise = torch.where(
        mask, ids, torch.randint(2, 60, ids.shape)
    )  # closing tokens behind the closing one, too
    longer = F.pad(noise, (0, 5), value=3), F.pad(mask, (0, 5))
    long = encoder(*longer)
    torch.testing.assert_close(long.cue, short.cue, rtol=0, atol=1e-5)
    torch.testing.assert_close(long.tokens[:, :8][mask], short.tokens[mask], rtol=0, atol=1e-5)
    alone = [encoder(ids[i : i + 1, :n], mask[i : i + 1, :n]).cue for i, n in enumerate(mask.sum(dim=1))]
    torch.testing.assert_close(torch.cat(alone), short.cue, rtol=0, atol=1e-5)


def test_clip_gives_the_state_of_the_first_eos_in_place_of_the_constant_one():
    encoder, (ids, mask) = text_encoder("clip"), sentences()
    encoder.bert.eos_token_id = 3  # then transformers pools there by itself
    ids = ids.masked_fill(~mask, 3)  # CLIP pads with its EOS
    theirs = encoder.bert(input_ids=ids, attention_mask=mask.long())
    assert theirs.last_hidden_state[:, 0].std(dim=0).max() < 1e-6
    language = encoder(ids, mask)
    torch.testing.assert_close(language.cue, theirs.pooler_output)
    assert language.tokens[:, 1:].equal(theirs.last_hidden_state[:, 1:])


@pytest.mark.parametrize("kind", CLOSING)
def test_cue_is_the_state_of_the_last_token_as_transformers_gives_it_without_padding(kind):
    encoder, (ids, mask) = text_encoder(kind), sentences()
    language = encoder(ids, mask)
    start = 1 if "t5" in kind else 0  # T5 knows no token that opens a sentence
    for row, length in enumerate(mask.sum(dim=1)):
        states = encoder.bert(input_ids=ids[row : row + 1, start:length]).last_hidden_state[0]
        torch.testing.assert_close(language.cue[row], states[-1], rtol=0, atol=1e-5)
        torch.testing.assert_close(language.tokens[row, 1:length], states[1 - start :], rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_reaches_every_weight_of_a_text_encoder(kind):
    encoder, (ids, mask) = text_encoder(kind), sentences()
    tokens = encoder(ids, mask).tokens[mask]
    (tokens * torch.randn_like(tokens)).sum().backward()
    # A shift of all keys alike shifts all scores of a softmax alike: its gradient is zero but for rounding.
    assert [name for name, p in encoder.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("kind", KINDS)
def test_options_build_a_text_encoder_again(kind):
    encoder, (ids, mask) = text_encoder(kind), sentences()
    again = TextEncoder("unused", vocab_size=encoder.vocab_size, options=encoder.options).eval()
    again.load_state_dict(encoder.state_dict())
    assert again(ids, mask).tokens.equal(encoder(ids, mask).tokens)


def test_text_encoder_takes_as_many_tokens_as_it_has_places_for():
    xlnet = {"model_type": "xlnet", "d_model": 24, "n_layer": 1, "n_head": 2, "d_inner": 24}
    for relative in (text_encoder("t5"), TextEncoder("unused", vocab_size=60, options=xlnet).eval()):
        assert relative.longest is None
        assert relative(torch.ones(1, 600).long(), torch.ones(1, 600).bool()).cue.isfinite().all()
    for kind, longest in (("bert", 512), ("clip", 20), ("roberta", 20), ("distilbert", 512), ("gpt2", 20)):
        encoder = text_encoder(kind)
        assert encoder.longest == longest
        ids = torch.randint(5, 60, (1, longest + 1))
        encoder(ids[:, :longest], torch.ones(1, longest).bool())
        with pytest.raises(InputError, match=f"has {longest + 1} tokens, but it has places for {longest}"):
            encoder(ids, torch.ones(1, longest + 1).bool())


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"model_type": "brt"}, "transformers has no model_type brt"),
        ({"model_type": "bart"}, "bart gives no global cue"),
        ({"model_type": "siglip_text_model"}, "siglip_text_model gives no global cue"),
        ({"model_type": "git"}, "git gives no global cue"),
        ({"model_type": "gemma3"}, "gemma3 gives no global cue"),
        ({"model_type": "clip_text_model", "hiden_size": 3}, "CLIPTextConfig has no hiden_size"),
        ({"hidden_size": "many"}, "text_encoder_options: .*hidden_size.*many"),
    ],
)
def test_text_encoder_refuses_what_it_cannot_be(options, says):
    with pytest.raises(InputError, match=says) as caught:
        TextEncoder("unused", vocab_size=60, options=options)
    assert "\n" not in str(caught.value)


def clip_folder(path):
    """A folder as openai/clip-vit-* has it: both towers, the EOS id that old files had, no tokenizer.json."""
    alphabet = [*"abcdefghijklmnopqrstuvwxyz", *(f"{x}</w>" for x in "abcdefghijklmnopqrstuvwxyz")]
    words = ["th", "the</w>", "an</w>", "re", "red</w>"]
    entries = [*alphabet, *words, "<|startoftext|>", "<|endoftext|>"]
    text = {**TINY, "vocab_size": len(entries), "max_position_embeddings": 20, "eos_token_id": 2}
    vision = {**TINY, "image_size": 32, "patch_size": 16}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision)).eval()
    model.save_pretrained(path)
    (path / "vocab.json").write_text(json.dumps({entry: i for i, entry in enumerate(entries)}))
    (path / "merges.txt").write_text("#version: 0.2\nt h\nth e</w>\na n</w>\nr e\nre d</w>\n")
    return model


def test_clip_folder_gives_its_text_tower_and_its_tokenizer(tmp_path):
    model = clip_folder(tmp_path)
    encoder, tokenizer = (
        TextEncoder("unused", vocab_size=9, weights=tmp_path).eval(),
        load_tokenizer(tmp_path),
    )
    assert encoder.vocab_size == len(tokenizer) and isinstance(tokenizer, CLIPTokenizer)
    assert tokenizer.tokenize("the red an") == ["the</w>", "red</w>", "an</w>"]
    rows = tokenizer(["the red cat", "an elk"], padding=True, return_tensors="pt")
    language = encoder(rows["input_ids"], rows["attention_mask"].bool())
    model.text_model.eos_token_id = tokenizer.eos_token_id
    theirs = model.text_model(**rows)
    torch.testing.assert_close(language.cue, theirs.pooler_output)
    assert len(encoder.state_dict()) == len(model.text_model.state_dict())
    tokenizer.save_pretrained(tmp_path / "saved")
    again = load_tokenizer(tmp_path / "saved")
    assert isinstance(again, CLIPTokenizer) and again("the red cat") == tokenizer("the red cat")


WORDS = ["the", "a", "an", "red", "star", "ring", "near"]


def published(path):
    """Add to a folder's config what older versions of transformers left in published ones."""
    old = {"gradient_checkpointing": False, "n_ctx": 20, "task_specific_params": {"x": {"do_sample": True}}}
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | old))


def t5_folder(path):
    """As google/flan-t5-* has it: encoder and decoder, a tokenizer that closes sentences but opens none."""
    model = T5ForConditionalGeneration(T5Config(**{**KINDS["t5"], "vocab_size": 48})).eval()
    model.save_pretrained(path)
    published(path)
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), ("▁", -5.0)]
    pieces += [*((f"▁{word}", -1.0) for word in WORDS), *((sign, -7.0) for sign in ascii_lowercase)]
    T5Tokenizer(vocab=pieces, extra_ids=2).save_pretrained(path)
    return model


def gpt2_folder(path):
    """As openai-community/gpt2 has it: a tokenizer that adds nothing and knows no padding."""
    pieces = ["<|endoftext|>", *ascii_lowercase, "Ġ"]
    merges = []
    for word in WORDS:
        merges += [(word[:end], word[end]) for end in range(1, len(word))] + [("Ġ", word)]
    pieces += dict.fromkeys("".join(merge) for merge in merges)
    signs = {"bos_token_id": 0, "eos_token_id": 0}
    model = GPT2LMHeadModel(GPT2Config(**{**KINDS["gpt2"], "vocab_size": len(pieces), **signs})).eval()
    model.save_pretrained(path)
    published(path)
    vocab = {piece: i for i, piece in enumerate(pieces)}
    GPT2Tokenizer(vocab=vocab, merges=list(dict.fromkeys(merges))).save_pretrained(path)
    return model


def bert_folder(path):
    """As bert-base-uncased has it."""
    tokenizer = build_tokenizer(["the red star near a ring", "an elk"])
    model = BertForMaskedLM(BertConfig(vocab_size=len(tokenizer), **TINY)).eval()
    model.save_pretrained(path)
    published(path)
    tokenizer.save_pretrained(path)
    return model


FOLDERS = {"t5": (t5_folder, T5Tokenizer), "gpt2": (gpt2_folder, GPT2Tokenizer)}
ALL_FOLDERS = {"bert": (bert_folder, BertTokenizer), "clip": (clip_folder, CLIPTokenizer), **FOLDERS}


@pytest.mark.parametrize("kind", FOLDERS)
def test_folder_of_a_language_model_gives_the_states_that_it_gives(kind, tmp_path):
    make, tokenizer_class = FOLDERS[kind]
    model = make(tmp_path)
    encoder = TextEncoder("unused", vocab_size=9, weights=tmp_path).eval()
    tokenizer = load_tokenizer(tmp_path)
    assert isinstance(tokenizer, tokenizer_class)
    assert encoder.vocab_size == len(model.get_input_embeddings().weight)
    tokens = tokenize(tokenizer, ["the red star", "a ring near the red star"], 20)
    names = tokenizer.convert_ids_to_tokens(tokens.token_ids[0])
    closing = ["</s>"] if kind == "t5" else []
    assert [name.strip("▁Ġ") for name in names] == (
        [tokenizer.eos_token, "the", "red", "star", *closing] + tokenizer.convert_ids_to_tokens([0]) * 3
    )
    language = encoder(*tokens)
    for row, sentence in enumerate(("the red star", "a ring near the red star")):
        ids = tokenizer(sentence, return_tensors="pt")["input_ids"]
        # GPT reads the sign of a beginning, between any two texts of its training; T5 never saw one.
        if kind == "t5":
            states = model.encoder(ids).last_hidden_state[0]
        else:
            states = model.transformer(torch.cat([tokens.token_ids[:1, :1], ids], dim=1)).last_hidden_state[
                0, 1:
            ]
        torch.testing.assert_close(language.cue[row], states[-1], rtol=0, atol=1e-5)
        torch.testing.assert_close(language.tokens[row, 1 : len(states) + 1], states, rtol=0, atol=1e-5)
    tokenizer.save_pretrained(tmp_path / "saved")
    again = tokenize(load_tokenizer(tmp_path / "saved"), ["the red star", "a ring near the red star"], 20)
    assert again.token_ids.equal(tokens.token_ids) and again.language_mask.equal(tokens.language_mask)


def test_tokenizer_of_bytes_needs_no_file_of_words(tmp_path):
    ByT5Tokenizer().save_pretrained(tmp_path)
    tokens = tokenize(load_tokenizer(tmp_path), ["red"])
    assert tokens.token_ids.tolist() == [[1, *(3 + byte for byte in b"red"), 1]]


def test_tokenizer_that_knows_no_padding_or_no_sign_at_all(tmp_path):
    gpt2_folder(tmp_path)
    plain = load_tokenizer(tmp_path)
    tokens = tokenize(plain, ["red", "the red star"])
    assert tokens.language_mask.tolist() == [[True, True, False, False], [True] * 4]
    assert tokens.token_ids[0, 2:].tolist() == [0, 0]
    plain.bos_token = plain.eos_token = None
    with pytest.raises(ValueError, match="no sign for the beginning or the end"):
        tokenize(plain, ["red"])
    with pytest.raises(InputError, match="has no word"):
        tokenize(plain, [" \n"])


def test_letter_of_several_tokens_keeps_their_own_names():
    bytes_ = ByT5Tokenizer()
    pair = bytes_("é", add_special_tokens=False)["input_ids"]
    assert len({named(bytes_, token) for token in pair}) == 2
    assert named(bytes_, bytes_("e", add_special_tokens=False)["input_ids"][0]) == "e"


def test_sentence_of_any_vocabulary_is_cut_between_its_opening_and_its_closing_token(tmp_path):
    sentence = "the red star near a ring"
    for kind, (make, _) in FOLDERS.items():
        make(tmp_path / kind)
        tokenizer = load_tokenizer(tmp_path / kind)
        with pytest.warns(UserWarning, match=r"has [78] tokens with the special ones, 4 are kept"):
            ids = tokenize(tokenizer, [sentence], 4).token_ids[0].tolist()
        words = tokenizer(sentence, add_special_tokens=False)["input_ids"]
        eos = tokenizer.eos_token_id
        assert ids == ([eos, *words[:2], eos] if kind == "t5" else [eos, *words[:3]])
        with pytest.raises(InputError, match="has no word"):
            tokenize(tokenizer, ["red", ""], 4)
        with pytest.raises(ValueError, match="max_tokens is 1"):
            tokenize(tokenizer, ["red"], 1)


def test_text_weights_that_lack_some_are_refused(tmp_path):
    BertModel(BertConfig(vocab_size=60, **TINY)).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(InputError, match=r"lacks 16 weights, first encoder\.layer\.2\.") as caught:
        TextEncoder("unused", vocab_size=60, weights=tmp_path)
    assert "\n" not in str(caught.value)


def test_tokenizer_comes_from_a_bare_list_of_words(tmp_path):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "red", "star"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    tokenizer = load_tokenizer(tmp_path)
    assert isinstance(tokenizer, BertTokenizer)
    assert tokenizer("The red star")["input_ids"] == [2, 5, 6, 7, 3]


def test_tokenizer_without_words_is_refused(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]))
    with pytest.raises(InputError, match="knows no word"):
        load_tokenizer(tmp_path)


def test_articles_are_found_in_every_kind_of_vocabulary(tmp_path):
    built = build_tokenizer(["a red star", "the star", "an elk"])
    assert built.convert_ids_to_tokens(article_ids(built)) == ["a", "an", "the"]
    without = build_tokenizer(["red star"])  # knows the letter a, and spells the others
    assert without.convert_ids_to_tokens(article_ids(without)) == ["a"]
    clip_folder(tmp_path)
    clip = load_tokenizer(tmp_path)
    assert clip.convert_ids_to_tokens(article_ids(clip)) == ["a</w>", "an</w>", "the</w>"]


@pytest.mark.parametrize("kind", ALL_FOLDERS)
@pytest.mark.parametrize("start", ["from scratch", "from its folder"])
def test_text_encoders_train_and_their_checkpoints_predict(kind, start, another, tmp_path):
    make, tokenizer_class = ALL_FOLDERS[kind]
    config = another(steps=2)
    if start == "from scratch":
        changes = {"text_encoder_options": KINDS[kind]}
    else:
        make(tmp_path / "folder")
        changes = {"text_weights": tmp_path / "folder"}
    out = train(replace(config, model=replace(config.model, articles=False, **changes)))
    loaded = load_checkpoint(out)
    assert loaded.model.text_encoder.fills_gaps == (kind == "bert")
    assert isinstance(loaded.tokenizer, BertTokenizer if start == "from scratch" else tokenizer_class)
    assert loaded.config.article_ids == article_ids(loaded.tokenizer) != []
    tokens = tokenize(loaded.tokenizer, ["the red star", "the red star near the ring"])
    with torch.no_grad():
        output = loaded.model(torch.randn(1, 3, 64, 64).expand(2, -1, -1, -1), *tokens)
    (found,) = explain(loaded, encode(loaded, Image.new("RGB", (64, 64))), ["the red star"])
    assert found.tokens[1:3] == ["the", "red"]  # as one reads them, whatever the vocabulary has for a space
    # The global cue of a causal encoder tells two sentences apart only behind their last word.
    assert (output.scores[0, 0] - output.scores[1, 0]).abs().max() > 1e-5
