"""From a config to a model: the one place where a config becomes keyword arguments."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from metris_blocks import LanguageEnhancer, VisualExpressionExtractor
from reference_model.files import InputError, one_line
from reference_model.model.config import ModelConfig
from reference_model.model.guidance import Guidance, SelfAttention, UnmaskedAggregation
from reference_model.model.image_encoder import ImageEncoder
from reference_model.model.mask_decoder import MaskDecoder
from reference_model.model.metris import METRIS
from reference_model.model.no_target import NoTargetHead
from reference_model.model.text_encoder import TextEncoder


def build_metris(config: ModelConfig) -> METRIS:
    """Build the model of a config.

    Raises:
        InputError: A value is out of range, or an encoder cannot be had.
    """
    for name, least, most in (
        ("image_size", 32, 4096),
        ("max_tokens", 3, 512),
        ("vocab_size", 5, 10**7),
        ("num_heads", 1, 1024),
        *((name, 1, 2**16) for name in ("guidance_dim", "joint_dim")),
    ):
        if not least <= getattr(config, name) <= most:
            raise InputError(f"model: {name} must be in [{least}, {most}], got {getattr(config, name)}")
    widths = config.decoder_dim if isinstance(config.decoder_dim, list) else [config.decoder_dim]
    if not all(1 <= width <= 2**16 for width in widths):
        raise InputError(f"model: decoder_dim must be in [1, 65536], got {config.decoder_dim}")
    image_encoder = ImageEncoder(
        config.image_encoder,
        image_size=config.image_size,
        coordinates=config.coordinates,
        pretrained=config.pretrained,
        weights=config.image_weights,
        options=config.image_encoder_options,
    )
    text_encoder = TextEncoder(
        config.text_encoder,
        vocab_size=config.vocab_size,
        pretrained=config.pretrained,
        weights=config.text_weights,
        options=config.text_encoder_options,
    )
    visual_dim, language_dim, dim = image_encoder.channels[-1], text_encoder.dim, config.guidance_dim
    if dim != language_dim:
        raise InputError(
            f"model: guidance_dim is {dim}, but the text encoder gives {language_dim} channels, and one "
            f"guidance set holds the tokens of both; set guidance_dim={language_dim}"
        )
    try:
        guidance = _guidance(config, visual_dim, dim)
        decoder = MaskDecoder(image_encoder.channels, dim, config.decoder_dim, **_layer(config))
    except ValueError as error:  # so the blocks refuse widths, heads and ratios
        raise InputError(f"model: {one_line(error)}") from error
    return METRIS(
        image_encoder,
        text_encoder,
        guidance,
        decoder,
        NoTargetHead(dim) if config.no_target else None,
        cues=config.cues,
        silent_ids=() if config.articles else config.article_ids,
        # What the encoders turned out to be, wherever their weights came from: it builds them again without.
        config=replace(
            config,
            image_encoder_options=image_encoder.options,
            vocab_size=text_encoder.vocab_size,
            text_encoder_options=text_encoder.options,
        ),
    )


def _layer(config: ModelConfig) -> dict[str, Any]:
    return {
        "num_heads": config.num_heads,
        "mlp_ratio": config.mlp_ratio,
        "dropout": config.dropout,
        "norm": config.norm,
        "backend": config.backend,
    }


def _guidance(config: ModelConfig, visual_dim: int, dim: int) -> Guidance:
    if config.guidance == "pure_le":
        enhance: Callable[..., nn.Module] = partial(SelfAttention, dim)
        depth = 0
    else:
        enhance = partial(LanguageEnhancer, dim, visual_dim)
        depth = config.enhancer_depth
    layer = _layer(config)
    if config.match_size:
        depth, layer["mlp_ratio"] = _matched(config, visual_dim, dim, enhance)
    return Guidance(
        enhance(depth=depth, **layer),
        _extractor(config, visual_dim, dim) if "+ve" in f"+{config.guidance}" else None,
        pixels=nn.Linear(visual_dim, dim) if config.guidance.endswith("pixels") else None,
        language=config.guidance != "ve",
    )


def _extractor(config: ModelConfig, visual_dim: int, dim: int) -> VisualExpressionExtractor:
    extractor = VisualExpressionExtractor(
        visual_dim,
        dim,
        dim,
        joint_dim=config.joint_dim,
        ratio=config.ratio,
        temperature=config.aggregation_temperature,
        divide_by_count=config.divide_by_count,
        **_layer(config),
    )
    if not config.mask_softmax:
        extractor.aggregation = UnmaskedAggregation(
            visual_dim,
            dim,
            temperature=config.aggregation_temperature,
            divide_by_count=config.divide_by_count,
            backend=extractor.aggregation.backend,
        )
    if not config.refine:
        extractor.refinement = None
    if not config.relate:
        extractor.relationship = None
    return extractor


def _matched(
    config: ModelConfig, visual_dim: int, dim: int, enhance: Callable[..., nn.Module]
) -> tuple[int, float]:
    """Give the enhancer's layers and their ``mlp_ratio`` that bring a variant to the size of the whole model.

    The paper "added more attention layers into the ablation models" and does not say where or how many.
    """
    size = lambda module: sum(p.numel() for p in module.parameters())
    layer = _layer(config)
    bare = replace(
        config, match_size=False, enhancer_depth=0, guidance=config.guidance.replace("pure", "enhanced")
    )
    whole = replace(config, match_size=False, guidance="enhanced_le+ve", refine=True, relate=True)
    with torch.device("meta"):
        wanted = size(_guidance(whole, visual_dim, dim)) - size(_guidance(bare, visual_dim, dim))
        usual, thin, thick = (
            size(enhance(depth=1, **(layer | {"mlp_ratio": ratio}))) for ratio in (config.mlp_ratio, 1, 2)
        )
    depth = round(wanted / usual)
    if depth == 0:
        return 0, config.mlp_ratio
    return depth, 1 + (wanted / depth - thin) / (thick - thin)
