"""The guidance set and the variants of the paper's ablations: what each may see, and how large each is."""

from dataclasses import replace

import pytest
import torch

from reference_model.configs import build, preset_file, read_yaml
from reference_model.files import InputError
from reference_model.model.build import build_metris
from reference_model.model.config import GuidanceName, ModelConfig
from reference_model.model.loss import MetrisLoss
from tests.conftest import assert_equal
from tests.support import paper

VARIANTS = list(GuidanceName.__args__)
B, L = 2, 6


@pytest.fixture
def batch():
    torch.manual_seed(0)
    images, ids = torch.randn(B, 3, 64, 64), torch.randint(5, 120, (B, L))
    return images, ids, torch.tensor([[True] * L, [True] * 4 + [False] * 2])


def guidance_of(config, batch, *, image=None):
    """The guidance set that a model makes of a batch, or of another image."""
    torch.manual_seed(0)
    model = build_metris(config).eval()
    images, ids, mask = batch
    visual = model.encode_image(images if image is None else image).maps[-1].flatten(2).mT
    return model.guidance(visual, model.text_encoder(ids, mask).tokens, mask, model._cue_mask(ids, mask))


def test_each_variant_holds_its_tokens(small, batch):
    mask, n = batch[2], 16
    full = guidance_of(small, batch)
    le, ve = full.tokens[:, :L], full.tokens[:, L:]
    for variant in VARIANTS:
        found = guidance_of(replace(small, guidance=variant), batch)
        expected = {"ve": L, "enhanced_le+ve": 2 * L, "enhanced_le+pixels": L + n}.get(variant, L)
        assert found.tokens.shape[1] == found.mask.shape[1] == expected
        assert (found.scores is None) == ("ve" not in variant.split("+"))
        if variant in ("enhanced_le", "enhanced_le+pixels"):
            torch.testing.assert_close(found.tokens[:, :L], le)
        if variant == "ve":
            torch.testing.assert_close(found.tokens, ve)
            assert found.mask.equal(mask)
    pixels = guidance_of(replace(small, guidance="enhanced_le+pixels"), batch)
    assert pixels.mask.equal(torch.cat([mask, torch.ones(B, n).bool()], dim=1))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("match_size", [False, True])
def test_pure_le_alone_never_sees_the_image(small, batch, variant, match_size):
    config = replace(small, guidance=variant, match_size=match_size)
    same, other = guidance_of(config, batch), guidance_of(config, batch, image=torch.randn(B, 3, 64, 64))
    assert torch.equal(same.tokens, other.tokens) == (variant == "pure_le")


@pytest.mark.parametrize("preset", ["metris_tiny", "metris_swin_b"])
@pytest.mark.parametrize(
    "changes",
    [*({"guidance": variant} for variant in VARIANTS), {"refine": False}, {"relate": False}],
    ids=lambda changes: "-".join(map(str, changes.values())),
)
def test_matched_variants_have_the_size_of_the_whole_within_2_per_cent(preset, changes):
    config = build(ModelConfig, read_yaml(preset_file(preset), ModelConfig, section="model"), source=preset)
    whole, variant = (
        replace(config, pretrained=False, **given) for given in ({}, {"match_size": True, **changes})
    )
    with torch.device("meta"):
        sizes = [sum(p.numel() for p in build_metris(given).parameters()) for given in (whole, variant)]
    assert abs(sizes[1] / sizes[0] - 1) < 0.02


@pytest.mark.parametrize("mask_softmax", [True, False])
@pytest.mark.parametrize("refine", [True, False])
@pytest.mark.parametrize("relate", [True, False])
def test_extractor_of_an_ablation_equals_the_paper_equations(small, mask_softmax, refine, relate):
    torch.manual_seed(0)
    steps = {"mask_softmax": mask_softmax, "refine": refine, "relate": relate}
    extractor = build_metris(replace(small, **steps)).guidance.extractor.double().eval()
    visual = torch.randn(B, 9, extractor.curation.visual_dim, dtype=torch.float64)
    language = torch.randn(B, L, small.guidance_dim, dtype=torch.float64)
    masks = {"language_mask": torch.tensor([[True] * L, [True] * 4 + [False] * 2])}
    out = extractor(visual, language, **masks)
    options = {"num_heads": small.num_heads, "ratio": small.ratio, "divide_by_count": small.divide_by_count}
    options["temperature"] = small.aggregation_temperature
    expected = paper.extract(visual, language, extractor.state_dict(), **options, **steps, **masks)
    assert_equal(out.tokens.detach(), expected[0].detach())
    assert out.dynamic_mask.equal(expected[2])


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_trains_every_parameter(small, batch, variant):
    model = build_metris(replace(small, guidance=variant, match_size=True, no_target=True)).train()
    loss = MetrisLoss(contrastive_weight=0.1, temperature=0.07)
    loss(model(*batch), (torch.rand(B, 64, 64) < 0.3).float()).total.backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert silent == []


@pytest.mark.parametrize("variant", VARIANTS)
def test_padding_changes_no_logit_in_any_variant(small, batch, variant):
    images, ids, mask = batch
    model = build_metris(replace(small, guidance=variant, match_size=True, cues="local")).eval()
    other = torch.where(mask, ids, (ids + 7) % 120)
    longer = [torch.nn.functional.pad(x, (0, 3)) for x in (other, mask)]
    torch.testing.assert_close(model(images, *longer).logits, model(*batch).logits, rtol=0, atol=1e-5)


def test_cues_choose_who_gets_a_visual_token(small, batch):
    _, ids, mask = batch
    article = int(ids[0, 2])
    first = torch.arange(L) == 0
    for changes, expected in (
        ({"cues": "global"}, mask & first),
        ({"cues": "local"}, mask & ~first),
        ({"articles": False, "article_ids": [article]}, mask & (ids != article)),
        ({"articles": True, "article_ids": [article]}, mask),
    ):
        found = guidance_of(replace(small, **changes), batch)
        assert found.mask[:, L:].equal(expected) and found.mask[:, :L].equal(mask), changes
        assert found.dynamic_mask.any(dim=-1).equal(expected)
        assert found.scores[mask].abs().amax(dim=-1).gt(0).all(), "all words are scored, for Eq. 4"


def test_without_scores_the_contrastive_loss_is_zero(small, batch):
    output = build_metris(replace(small, guidance="enhanced_le")).eval()(*batch)
    losses = MetrisLoss(contrastive_weight=1.0, temperature=0.5)(output, torch.zeros(B, 64, 64))
    assert losses.contrastive == 0 and losses.total == losses.mask


def test_no_target_loss_is_the_cross_entropy_of_its_label(small, batch):
    output = build_metris(replace(small, no_target=True)).eval()(*batch)
    loss = MetrisLoss(contrastive_weight=0.0, temperature=0.5, no_target_weight=0.25)
    empty, p = torch.zeros(B, 64, 64), output.no_target.double().sigmoid()
    told = loss(output, empty, torch.tensor([True, False]))
    torch.testing.assert_close(told.no_target.double(), -(p[0].log() + (1 - p[1]).log()) / 2)
    torch.testing.assert_close(told.total, told.mask + 0.25 * told.no_target)
    torch.testing.assert_close(loss(output, empty).no_target.double(), -p.log().mean())


def test_unknown_variant_is_refused():
    with pytest.raises(InputError, match="guidance"):
        build(ModelConfig, {"guidance": "images"}, source="here")
