"""METRIS: image + sentence -> mask logits, guided by linguistic and visual expression tokens."""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from reference_model.model.config import ModelConfig
from reference_model.model.guidance import Guidance
from reference_model.model.image_encoder import ImageEncoder
from reference_model.model.mask_decoder import MaskDecoder
from reference_model.model.no_target import NoTargetHead
from reference_model.model.text_encoder import TextEncoder

Cues = Literal["all", "global", "local"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


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
    scores: Tensor | None
    """(b, l, n) relevance S_c, cosine; row 0 is the global cue's. None in variants without extractor."""
    dynamic_mask: Tensor | None
    """(b, l, n) bool; True = curated. None with ``scores``."""
    grid: tuple[int, int]
    """Rows and columns of the n visual tokens."""
    extent: tuple[int, int]
    """Height and width that they cover, pixels; more than the image's where the encoder pads it."""
    no_target: Tensor | None
    """(b) logits of the no-target classifier; > 0 is "nothing in the image". None without one."""
    maps: list[Tensor] | None
    """(b, heads, h_i, w_i, g) attention of each decoder stage, coarse to fine, over the guidance tokens: l of
    the expression, then l of the visual expression. None unless asked for."""


class METRIS(nn.Module):
    """The paper's model, made of interchangeable parts (METRIS Fig. 3).

    Args:
        image_encoder: Gives four maps, fine to coarse.
        text_encoder: Gives expression tokens, the first one global.
        guidance: Makes the guidance set of both.
        decoder: Turns maps and guidance set into logits.
        no_target: Tells sentences that name nothing; None: every sentence has a target.
        cues: Expression tokens that get a visual one: all, the global or the local ones (Table 6b).
        silent_ids: Token ids that get none, such as those of articles (Table 9).
        config: What builds the same network again; `build_metris` gives it.
    """

    def __init__(
        self,
        image_encoder: ImageEncoder,
        text_encoder: TextEncoder,
        guidance: Guidance,
        decoder: MaskDecoder,
        no_target: NoTargetHead | None = None,
        *,
        cues: Cues = "all",
        silent_ids: Sequence[int] = (),
        config: ModelConfig | None = None,
    ) -> None:
        super().__init__()
        self.image_encoder = image_encoder
        self.text_encoder = text_encoder
        self.guidance = guidance
        self.decoder = decoder
        self.no_target = no_target
        self.cues = cues
        self.silent_ids = tuple(silent_ids)
        self.config = config
        # Not in the state dict: they are the same for all, and old checkpoints do not hold them.
        for name, values in (("pixel_mean", IMAGENET_MEAN), ("pixel_std", IMAGENET_STD)):
            self.register_buffer(name, torch.tensor(values).reshape(3, 1, 1), persistent=False)

    def with_parts(self, kind: "type[METRIS] | None" = None, **changes: Any) -> "METRIS":
        """Put the same modules, but for ``changes``, into another METRIS; this one stays as it is.

        Args:
            kind: Its class. None: that of this one.
            changes: Keyword arguments of its constructor.
        """
        names = ("image_encoder", "text_encoder", "guidance", "decoder", "no_target")
        same = {name: getattr(self, name) for name in (*names, "cues", "silent_ids", "config")}
        return (kind or type(self))(**same | changes).train(self.training).to(self.device)

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.pixel_mean.device

    def encode_image(self, image: Tensor) -> ImageFeatures:
        """Encode images, once for any number of sentences.

        Args:
            image: (b, 3, h, w) uint8 RGB, 0 to 255; or floating point, normalised as `normalize` does it.
        """
        h, w = image.shape[-2:]
        return ImageFeatures(self.image_encoder(self.normalize(image)), (h, w))

    def normalize(self, image: Tensor) -> Tensor:
        """Turn (..., 3, h, w) uint8 RGB into float32 with ImageNet's mean and deviation; pass floats on."""
        if image.dtype != torch.uint8:
            return image
        # In place after the first copy: half the time of (x / 255 - mean) / std, to the same bit.
        return image.to(torch.float32, copy=True).div_(255).sub_(self.pixel_mean).div_(self.pixel_std)

    def refer(
        self,
        features: ImageFeatures,
        token_ids: Tensor,
        language_mask: Tensor,
        image_index: Tensor | None = None,
        *,
        return_maps: bool = False,
    ) -> MetrisOutput:
        """Refer to encoded images.

        Args:
            features: Of u images.
            token_ids: (b, l) int64.
            language_mask: (b, l) bool; True = real token.
            image_index: (b) int64, the image of each sentence. None: u = b, one sentence an image.
            return_maps: Compute the decoder's attention too.
        """
        if image_index is not None:
            features = features.select(image_index)
        coarsest = features.maps[-1]
        grid = (coarsest.shape[-2], coarsest.shape[-1])
        visual = rearrange(coarsest, "b c h w -> b (h w) c")
        language = self.text_encoder(token_ids, language_mask).tokens
        guidance = self.guidance(visual, language, language_mask, self._cue_mask(token_ids, language_mask))
        maps: list[Tensor] | None = [] if return_maps else None
        logits = self.decoder(features.maps, guidance.tokens, guidance.mask, maps=maps)
        logits = self._at_image_size(logits, features.size)
        no_target = None if self.no_target is None else self.no_target(guidance)
        extent = self._extent(grid, features.size, stage=-1)
        return MetrisOutput(logits, guidance.scores, guidance.dynamic_mask, grid, extent, no_target, maps)

    def forward(
        self,
        image: Tensor,
        token_ids: Tensor,
        language_mask: Tensor,
        image_index: Tensor | None = None,
        *,
        return_maps: bool = False,
    ) -> MetrisOutput:
        """Encode (u, 3, h, w) images and refer to them; arguments as in `encode_image` and `refer`."""
        features = self.encode_image(image)
        return self.refer(features, token_ids, language_mask, image_index, return_maps=return_maps)

    def _at_image_size(self, logits: Tensor, size: tuple[int, int]) -> Tensor:
        """Bring (b, h_1, w_1) logits to the pixels of the image, bilinearly.

        Cells that reach beyond the image, as encoders that pad right and bottom have, are cut there.
        """
        whole = self._extent(logits.shape[1:], size, stage=0)
        logits = F.interpolate(logits[:, None], whole, mode="bilinear", align_corners=False)
        return logits[:, 0, : size[0], : size[1]]

    def _extent(self, grid: Sequence[int], size: tuple[int, int], *, stage: int) -> tuple[int, int]:
        """Give the pixels that a map of ``grid`` cells covers, at least those of the image."""
        stride = self.image_encoder.strides[stage]
        return max(grid[0] * stride, size[0]), max(grid[1] * stride, size[1])

    def _cue_mask(self, token_ids: Tensor, language_mask: Tensor) -> Tensor | None:
        """Mark the expression tokens that get a visual expression token; None: all real ones."""
        if self.cues == "all" and not self.silent_ids:
            return None
        cue_mask = language_mask.clone()
        if self.cues == "global":
            cue_mask[:, 1:] = False
        if self.cues == "local":
            cue_mask[:, 0] = False
        for silent in self.silent_ids:
            cue_mask = cue_mask & (token_ids != silent)
        return cue_mask
