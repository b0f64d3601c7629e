"""METRIS: image + sentence -> mask logits, guided by linguistic and visual expression tokens."""

from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from metris_blocks import LanguageEnhancer, VisualExpressionExtractor
from reference_model.files import InputError
from reference_model.model.config import ModelConfig
from reference_model.model.image_encoder import ImageEncoder
from reference_model.model.mask_decoder import MaskDecoder
from reference_model.model.text_encoder import TextEncoder


class ImageFeatures(NamedTuple):
    """An encoded batch of images; language-free, so it serves any number of sentences."""

    maps: list[Tensor]
    """F_1..F_4, (b, c_i, h_i, w_i), fine to coarse."""
    size: tuple[int, int]
    """Height and width of the images in pixels."""

    def select(self, index: Tensor) -> "ImageFeatures":
        """(k) int64 image numbers -> the features of those images, repeated as asked."""
        return ImageFeatures([x.index_select(0, index) for x in self.maps], self.size)


class MetrisOutput(NamedTuple):
    """What `METRIS` returns."""

    logits: Tensor
    """(b, h, w) mask logits at full resolution; > 0 is inside the mask."""
    scores: Tensor
    """(b, l, n) relevance S_c, cosine; row 0 is the global cue's."""
    dynamic_mask: Tensor
    """(b, l, n) bool; True = curated."""
    grid: tuple[int, int]
    """Rows and columns of the n visual tokens."""


class METRIS(nn.Module):
    """The paper's model, made of interchangeable parts (METRIS Fig. 3).

    Args:
        image_encoder: Gives four maps, fine to coarse.
        text_encoder: Gives expression tokens, the first one global.
        enhancer: Lets language look at the image.
        extractor: Makes the visual expression.
        decoder: Turns maps and guidance set into logits.
    """

    def __init__(
        self,
        image_encoder: ImageEncoder,
        text_encoder: TextEncoder,
        enhancer: LanguageEnhancer,
        extractor: VisualExpressionExtractor,
        decoder: MaskDecoder,
    ) -> None:
        super().__init__()
        self.image_encoder = image_encoder
        self.text_encoder = text_encoder
        self.enhancer = enhancer
        self.extractor = extractor
        self.decoder = decoder

    def encode_image(self, image: Tensor) -> ImageFeatures:
        """(b, 3, h, w), ImageNet-normalised -> features, once per image."""
        h, w = image.shape[-2:]
        return ImageFeatures(self.image_encoder(image), (h, w))

    def refer(self, features: ImageFeatures, token_ids: Tensor, language_mask: Tensor) -> MetrisOutput:
        """Features of b images, (b, l) token ids, (b, l) bool -> one mask per image and sentence."""
        coarsest = features.maps[-1]
        grid = (coarsest.shape[-2], coarsest.shape[-1])
        visual = rearrange(coarsest, "b c h w -> b (h w) c")
        language = self.text_encoder(token_ids, language_mask)
        language = self.enhancer(language, visual, language_mask=language_mask)
        expression = self.extractor(visual, language, language_mask=language_mask)
        guidance = torch.cat([language, expression.tokens], dim=1)
        guidance_mask = torch.cat([language_mask, language_mask], dim=1)
        logits = self.decoder(features.maps, guidance, guidance_mask)
        logits = F.interpolate(logits[:, None], features.size, mode="bilinear", align_corners=False)[:, 0]
        return MetrisOutput(logits, expression.scores, expression.dynamic_mask, grid)

    def forward(
        self, image: Tensor, token_ids: Tensor, language_mask: Tensor, image_index: Tensor | None = None
    ) -> MetrisOutput:
        """Encode the images and refer to them.

        Args:
            image: (u, 3, h, w), ImageNet-normalised.
            token_ids: (b, l) int64.
            language_mask: (b, l) bool; True = real token.
            image_index: (b) int64, the image of each sentence. None: u = b, one sentence an image.
        """
        features = self.encode_image(image)
        if image_index is not None:
            features = features.select(image_index)
        return self.refer(features, token_ids, language_mask)


def build_metris(config: ModelConfig) -> METRIS:
    """Build the model of a config: the one place where a config becomes keyword arguments.

    Raises:
        InputError: A value is out of range, or an encoder cannot be had.
    """
    for name, least, most in (
        ("image_size", 32, 4096),
        ("max_tokens", 3, 512),
        ("vocab_size", 5, 10**7),
        ("num_heads", 1, 1024),
        *((name, 1, 2**16) for name in ("guidance_dim", "joint_dim", "decoder_dim")),
    ):
        if not least <= getattr(config, name) <= most:
            raise InputError(f"model: {name} must be in [{least}, {most}], got {getattr(config, name)}")
    try:
        return _built(config)
    except InputError:
        raise
    # What the encoders' own constructors raise on options that they cannot mean.
    except (ValueError, TypeError, ArithmeticError, LookupError, RuntimeError) as error:
        raise InputError(f"model: {' '.join(str(error).split()) or type(error).__name__}") from error


def _built(config: ModelConfig) -> METRIS:
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
    layer = {
        "num_heads": config.num_heads,
        "mlp_ratio": config.mlp_ratio,
        "dropout": config.dropout,
        "norm": config.norm,
        "backend": config.backend,
    }
    return METRIS(
        image_encoder,
        text_encoder,
        LanguageEnhancer(language_dim, visual_dim, depth=config.enhancer_depth, **layer),
        VisualExpressionExtractor(
            visual_dim,
            language_dim,
            dim,
            joint_dim=config.joint_dim,
            ratio=config.ratio,
            temperature=config.aggregation_temperature,
            divide_by_count=config.divide_by_count,
            **layer,
        ),
        MaskDecoder(image_encoder.channels, dim, config.decoder_dim, **layer),
    )
