"""METRIS end to end: what a batch, its padding and its other images may not change."""

import copy
import math
from dataclasses import replace

import pytest
import timm
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from reference_model.configs import build, preset_file, read_yaml
from reference_model.cost import multiply_adds
from reference_model.files import InputError
from reference_model.model.build import build_metris
from reference_model.model.config import ModelConfig
from reference_model.model.image_encoder import ImageEncoder
from reference_model.model.loss import MetrisLoss
from reference_model.model.metris import METRIS
from reference_model.tokens import build_tokenizer, load_tokenizer
from tests.reference_model.conftest import SMALL


def inputs(b=3, l=7, size=64, vocab=120):
    images = torch.randn(b, 3, size, size)
    token_ids = torch.randint(5, vocab, (b, l))
    lengths = torch.randint(3, l + 1, (b,))
    return images, token_ids, torch.arange(l) < lengths[:, None]


@pytest.fixture
def model(small) -> METRIS:
    return build_metris(small).eval()


@pytest.fixture(
    scope="module", params=["small", "metris_tiny", pytest.param("metris_swin_b", marks=pytest.mark.slow)]
)
def any_model(request) -> METRIS:
    """The test's own network and the presets, for images of 64 px: what must hold is the same at 480."""
    config = SMALL
    if request.param != "small":
        values = read_yaml(preset_file(request.param), ModelConfig, section="model")
        config = build(ModelConfig, values, source=request.param)
    torch.manual_seed(0)
    return build_metris(replace(config, pretrained=False, image_size=64)).eval()


def test_padding_a_sentence_further_changes_no_logit(any_model):
    images, ids, mask = inputs()
    longer_ids, longer_mask = F.pad(ids, (0, 6), value=99), F.pad(mask, (0, 6))
    short, long = any_model(images, ids, mask), any_model(images, longer_ids, longer_mask)
    torch.testing.assert_close(short.logits, long.logits, rtol=0, atol=1e-5)
    assert short.dynamic_mask.equal(long.dynamic_mask[:, : ids.shape[1]])


@pytest.mark.parametrize("size", [(70, 97), (33, 31)], ids=str)
def test_image_of_any_size_has_logits_of_its_own_size_and_heeds_its_last_pixels(any_model, size):
    images, ids, mask = inputs()
    images = torch.randn(len(images), 3, *size)
    together, alone = any_model(images, ids, mask).logits, any_model(images[:1], ids[:1], mask[:1]).logits
    assert together.shape == (len(images), *size)
    torch.testing.assert_close(together[:1], alone, rtol=0, atol=1e-5)
    other = images.clone()
    other[:, :, -1, -1] += 5  # beyond the last whole patch
    assert (any_model(other, ids, mask).logits - together).abs().amax(dim=(1, 2)).min() > 1e-6


def test_words_behind_the_mask_have_no_influence(any_model):
    images, ids, mask = inputs()
    other = torch.where(mask, ids, torch.randint(5, 120, ids.shape))
    torch.testing.assert_close(any_model(images, ids, mask).logits, any_model(images, other, mask).logits)


def test_words_before_the_mask_have_influence(any_model):
    images, ids, mask = inputs()
    other = torch.where(mask, (ids + 1) % 120, ids)
    difference = (
        (any_model(images, ids, mask).logits - any_model(images, other, mask).logits).abs().amax(dim=(1, 2))
    )
    assert (difference > 1e-3).all()


def test_batch_of_k_equals_k_batches_of_one(any_model):
    images, ids, mask = inputs()
    together = any_model(images, ids, mask).logits
    alone = [any_model(images[i : i + 1], ids[i : i + 1], mask[i : i + 1]).logits for i in range(len(images))]
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-5)


def test_image_encoded_once_serves_many_sentences(any_model):
    images, ids, mask = inputs(b=5)
    index = torch.tensor([1, 0, 1, 1, 0])
    shared = any_model(images[:2], ids, mask, index).logits
    features = any_model.encode_image(images[:2])
    torch.testing.assert_close(shared, any_model.refer(features.select(index), ids, mask).logits)
    torch.testing.assert_close(shared, any_model(images[index], ids, mask).logits, rtol=0, atol=1e-5)


def test_ragged_numbers_of_sentences_equal_separate_forwards(any_model):
    images, ids, mask = inputs(b=6)
    images, counts = images[:3], [1, 3, 2]
    index = torch.repeat_interleave(torch.arange(3), torch.tensor(counts))
    together = any_model.refer(any_model.encode_image(images), ids, mask, index).logits
    for i, sentence in enumerate(index):
        alone = any_model(images[sentence : sentence + 1], ids[i : i + 1], mask[i : i + 1]).logits
        torch.testing.assert_close(together[i : i + 1], alone, rtol=0, atol=1e-5)


def test_many_sentences_cost_one_encoding(model):
    images, ids, mask = inputs(b=4)
    runs = []
    model.image_encoder.register_forward_hook(lambda *_: runs.append(len(_[1][0])))
    model(images[:1], ids, mask, torch.zeros(4, dtype=torch.long))
    assert runs == [1]


def test_padded_images_in_the_batch_change_no_logit(any_model):
    images, ids, mask = inputs()
    more = any_model(
        F.pad(images, (0, 0, 0, 0, 0, 0, 0, 2)), F.pad(ids, (0, 0, 0, 2)), F.pad(mask, (0, 0, 0, 2))
    )
    torch.testing.assert_close(more.logits[:3], any_model(images, ids, mask).logits, rtol=0, atol=1e-5)
    assert more.logits.isfinite().all()


def test_evaluation_is_deterministic(any_model):
    batch = inputs()
    first, second = any_model(*batch), any_model(*batch)
    assert first.logits.equal(second.logits) and first.dynamic_mask.equal(second.dynamic_mask)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_stays_finite_forward_and_backward(any_model, dtype):
    images, ids, mask = inputs()
    model = copy.deepcopy(any_model).train()
    with torch.autocast("cpu", dtype=dtype):
        output = model(images, ids, mask)
        losses = MetrisLoss(contrastive_weight=0.1, temperature=0.07)(
            output, (torch.rand(3, 64, 64) < 0.3).float()
        )
    losses.total.backward()
    assert output.logits.isfinite().all() and losses.total.isfinite()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_maps_are_those_of_the_decoder_and_cost_nothing_when_off(model):
    images, ids, mask = inputs()
    off, on = model(images, ids, mask), model(images, ids, mask, return_maps=True)
    assert off.maps is None and on.logits.equal(off.logits)
    guided, l = torch.cat([mask, mask], dim=1), ids.shape[1]
    assert len(on.maps) == len(model.decoder.stages)
    for attention in on.maps:
        assert attention.shape[-1] == 2 * l
        torch.testing.assert_close(attention.sum(dim=-1), torch.ones(attention.shape[:-1]))
        assert attention.movedim(-1, 1)[~guided].eq(0).all()


def test_maps_are_the_weights_inside_the_fused_path(model):
    batch, seen = inputs(), []
    for stage in model.decoder.stages:
        stage.attention.register_forward_hook(lambda module, given, out: seen.append((module, *given, out)))
    maps = model(*batch, return_maps=True).maps
    for weights, (module, _, context, _, out) in zip(maps, seen, strict=True):
        value = module.v_proj(context).unflatten(-1, (module.num_heads, -1)).transpose(1, 2)
        attended = (weights.flatten(2, 3) @ value).transpose(1, 2).flatten(2)
        torch.testing.assert_close(module.out_proj(attended), out, rtol=0, atol=1e-5)


def test_decoder_may_narrow_stage_by_stage(small):
    model = build_metris(replace(small, decoder_dim=[16, 12, 8, 4])).eval()
    batch = inputs()
    logits = model(*batch).logits
    assert logits.shape == batch[0].shape[:1] + batch[0].shape[2:]
    assert [stage.attention.out_proj.out_features for stage in model.decoder.stages] == [16, 12, 8, 4]
    with pytest.raises(InputError, match="dim has 3 widths, but there are 4 stages"):
        build_metris(replace(small, decoder_dim=[16, 12, 8]))


def test_logits_have_the_resolution_of_the_image(model, small):
    images, ids, mask = inputs(b=1)
    output = model(images, ids, mask)
    assert output.logits.shape[-2:] == images.shape[-2:]
    assert math.prod(output.grid) == output.scores.shape[-1] == output.dynamic_mask.shape[-1]
    assert output.dynamic_mask[0, 0].sum() == math.floor(small.ratio * math.prod(output.grid) + 0.5)


def test_gradient_reaches_every_parameter_of_model_and_loss(model):
    images, ids, mask = inputs()
    model.train()
    loss = MetrisLoss(contrastive_weight=0.1, temperature=0.07)
    loss(model(images, ids, mask), (torch.rand(3, 64, 64) < 0.3).float()).total.backward()
    named = [*model.named_parameters(), *loss.named_parameters()]
    # Word vectors of ids that do not occur, and BERT's second segment, have nothing to learn here.
    silent = [name for name, p in named if p.grad is None or not p.grad.abs().sum() > 0]
    assert silent == []


def test_loss_is_cross_entropy_plus_weighted_eq4(model):
    images, ids, mask = inputs()
    output = model(images, ids, mask)
    target = (torch.rand(3, 64, 64) < 0.3).float()
    losses = MetrisLoss(contrastive_weight=0.25, temperature=0.5)(output, target)
    p = output.logits.double().sigmoid()
    expected = -(target * p.log() + (1 - target) * (1 - p).log()).mean()
    torch.testing.assert_close(losses.mask.double(), expected)
    rows, columns = output.grid
    cells = target.reshape(3, rows, 64 // rows, columns, 64 // columns).double().mean(dim=(2, 4)).flatten(1)
    q = (output.scores[:, 0].double() / 0.5).sigmoid()
    eq4 = -(cells * q.log() + (1 - cells) * (1 - q).log()).mean()
    torch.testing.assert_close(losses.contrastive.double(), eq4)
    torch.testing.assert_close(losses.total.double(), expected + 0.25 * eq4)


def test_model_memorises_four_pairs(small):
    images, ids, mask = inputs(b=4)
    target = torch.zeros(4, 64, 64)
    for i in range(4):  # one quarter of the picture each
        target[i, 32 * (i // 2) : 32 * (i // 2) + 32, 32 * (i % 2) : 32 * (i % 2) + 32] = 1
    model, loss = build_metris(small).train(), MetrisLoss(contrastive_weight=0.1, temperature=0.07)
    optimiser = torch.optim.AdamW([*model.parameters(), *loss.parameters()], lr=3e-3)
    for _ in range(120):
        optimiser.zero_grad()
        loss(model(images, ids, mask), target).total.backward()
        optimiser.step()
    predicted = model.eval()(images, ids, mask).logits > 0
    union = (predicted | target.bool()).sum(dim=(1, 2))
    assert ((predicted & target.bool()).sum(dim=(1, 2)) / union).min() > 0.9


@pytest.mark.parametrize(
    ("name", "size", "options"),
    [
        ("convnext_atto", 64, {"depths": [1, 1, 1, 1], "dims": [8, 12, 16, 24]}),
        ("resnet10t", 64, {"out_indices": [1, 2, 3, 4]}),
        (
            "swin_tiny_patch4_window7_224",
            96,
            {"embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2], "window_size": 4},
        ),
    ],
)
def test_image_encoder_gives_timms_maps_normalised_fine_to_coarse(name, size, options):
    encoder = ImageEncoder(name, image_size=size, options=options).eval()
    x = torch.randn(2, 3, size, size)
    maps = encoder(x)
    assert encoder.strides == sorted(encoder.strides)
    for got, raw, c, stride in zip(maps, encoder.backbone(x), encoder.channels, encoder.strides):
        assert got.shape == (2, c, size // stride, size // stride)
        raw = raw.permute(0, 3, 1, 2) if raw.shape[-1] == c and raw.shape[1] != c else raw
        raw = raw.double()
        variance = raw.var(dim=1, unbiased=False, keepdim=True)
        expected = (raw - raw.mean(dim=1, keepdim=True)) / (variance + 1e-5).sqrt()
        torch.testing.assert_close(got.double(), expected, rtol=1e-3, atol=1e-3)


def test_image_encoder_takes_a_local_weight_file(tmp_path):
    options = {"depths": [1, 1, 1, 1], "dims": [8, 12, 16, 24]}
    donor = timm.create_model("convnext_atto", **options)
    torch.save(donor.state_dict(), tmp_path / "weights.pth")
    encoder = ImageEncoder("convnext_atto", image_size=64, weights=tmp_path / "weights.pth", options=options)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        deepest = donor.eval().forward_features(x)
        ours = encoder.backbone.eval()(x)[-1]
    # timm's ConvNeXt ends forward_features without a norm of its own: the same map.
    torch.testing.assert_close(ours, deepest)


def test_image_encoder_refuses_weights_of_another_model(tmp_path):
    torch.save({"foo.weight": torch.zeros(2, 2)}, tmp_path / "weights.pth")
    options = {"depths": [1, 1, 1, 1], "dims": [8, 12, 16, 24]}
    with pytest.raises(InputError, match=r"weights\.pth"):
        ImageEncoder("convnext_atto", image_size=64, weights=tmp_path / "weights.pth", options=options)


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("swin_bse_patch4", {}, "image_encoder swin_bse_patch4"),
        ("convnext_atto", {"depth": 3}, "depth"),
    ],
)
def test_image_encoder_refuses_what_timm_cannot_build(name, options, says):
    with pytest.raises(InputError, match=says) as caught:
        ImageEncoder(name, image_size=64, options=options)
    assert "\n" not in str(caught.value)


SENTENCES = ["the red star", "leftmost blue circle", "the star left of the square"]


def test_tokenizer_knows_its_words_and_spells_the_others():
    tokenizer = build_tokenizer(SENTENCES)
    assert tokenizer.tokenize("The red square") == ["the", "red", "square"]
    assert tokenizer.tokenize("zebra, 7")[:2] == ["z", "##e"]
    assert tokenizer.unk_token_id not in tokenizer("zebra: 7 starfish!")["input_ids"]
    ids = tokenizer("the red star")["input_ids"]
    assert (ids[0], ids[-1]) == (tokenizer.cls_token_id, tokenizer.sep_token_id) and len(ids) == 5


def test_tokenizer_knows_words_beside_punctuation():
    tokenizer = build_tokenizer(["Man's shirt, left-most!"])
    assert tokenizer.tokenize("the shirt: left man")[-3:] == [":", "left", "man"]
    assert "shirt" in tokenizer.get_vocab() and "most" in tokenizer.get_vocab()


def test_tokenizer_does_not_depend_on_the_order_of_sentences():
    assert build_tokenizer(SENTENCES).get_vocab() == build_tokenizer(SENTENCES[::-1]).get_vocab()


def test_tokenizer_is_the_same_after_saving(tmp_path):
    tokenizer = build_tokenizer(SENTENCES)
    tokenizer.save_pretrained(tmp_path)
    sentence = "the LEFTMOST purple star"
    assert load_tokenizer(tmp_path)(sentence)["input_ids"] == tokenizer(sentence)["input_ids"]


def test_presets_are_what_they_say():
    """One keeps the letter, the others have what was measured to learn, and lite is narrower, no more."""
    from reference_model.training.config import TrainConfig

    read = lambda name: read_yaml(preset_file(name), TrainConfig)
    paper, whole, lite, tiny = map(
        read, ("metris_paper", "metris_swin_b", "metris_swin_b_lite", "metris_tiny")
    )
    assert paper == {"model": {"pretrained": True, "norm": "none"}}
    letter = build(TrainConfig, paper | {"data": {"root": "unused"}}, source="metris_paper")
    assert (letter.model.aggregation_temperature, letter.model.divide_by_count) == (1.0, True)
    assert (letter.model.coordinates, letter.model.ratio) == (False, 0.3)
    assert lite["model"].pop("decoder_dim") and lite == whole
    for name in ("aggregation_temperature", "divide_by_count"):
        assert tiny["model"][name] == whole["model"][name] != getattr(letter.model, name)
    assert tiny["loss"] == whole["loss"] == {"contrastive_weight": 1.0}


@pytest.mark.slow
def test_paper_model_runs_forward_and_backward_at_480():
    from reference_model.training.config import TrainConfig

    values = read_yaml(preset_file("metris_swin_b"), TrainConfig)
    values["data"] = {"root": "unused"}
    values["model"]["pretrained"] = False
    config = build(TrainConfig, values, source="metris_swin_b").model
    model = build_metris(config).train()
    loss = MetrisLoss(contrastive_weight=0.1, temperature=0.07)
    images, ids, mask = inputs(b=1, l=20, size=480, vocab=config.vocab_size)
    output = model(images, ids, mask)
    assert output.grid == (15, 15) and output.dynamic_mask[0, 0].sum() == 68
    losses = loss(output, (torch.rand(1, 480, 480) < 0.1).float())
    losses.total.backward()
    assert losses.total.isfinite() and output.logits.shape == (1, 480, 480)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        model.eval()(images, ids, mask)
    # Table 2 counts 432 G multiply-adds; the counter counts both operations of each.
    assert counter.get_total_flops() / 2 == pytest.approx(432e9, rel=0.05)


@pytest.mark.slow
def test_lite_model_costs_at_most_110_gmacs():
    values = read_yaml(preset_file("metris_swin_b_lite"), ModelConfig, section="model")
    config = build(ModelConfig, values | {"pretrained": False}, source="metris_swin_b_lite")
    with torch.inference_mode():
        model, (images, ids, mask) = build_metris(config).eval(), inputs(b=1, l=20, size=480)
        assert multiply_adds(model, images, ids, mask)[""] <= 110e9


def test_coordinates_tell_left_from_right(small):
    uniform = torch.zeros(1, 3, 64, 64)
    encoder = build_metris(replace(small, coordinates=True)).image_encoder.eval()
    for with_place, place, plain in zip(encoder(uniform), encoder.coordinates, encoder.backbone(uniform)):
        h, w = plain.shape[-2:]
        added = (with_place - build_plain(encoder, plain)).detach()
        for row, column in ((0, 0), (h - 1, 0), (0, w - 1), (h // 2, w // 2)):
            centre = torch.tensor([(2 * column + 1) / w - 1, (2 * row + 1) / h - 1])
            torch.testing.assert_close(added[0, :, row, column], place(centre).detach(), rtol=1e-4, atol=1e-5)


def build_plain(encoder, raw):
    norm = encoder.norms[encoder.channels.index(raw.shape[1])]
    return norm(raw.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
