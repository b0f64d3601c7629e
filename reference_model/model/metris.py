"""METRIS: image + sentence -> mask logits, guided by linguistic and visual expression tokens."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from reference_model.model.config import ModelConfig
from reference_model.model.guidance import Guidance
from reference_model.model.image_encoder import ImageEncoder
from reference_model.model.mask_decoder import MaskDecoder
from reference_model.model.no_target import NoTargetHead
from reference_model.model.text_encoder import TextEncoder

Cues = Literal["all", "global", "local"]


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
    ) -> None:
        super().__init__()
        self.image_encoder = image_encoder
        self.text_encoder = text_encoder
        self.guidance = guidance
        self.decoder = decoder
        self.no_target = no_target
        self.cues = cues
        self.silent_ids = tuple(silent_ids)
        # What sharing needs: `build_metris` sets the first, whoever has a tokenizer the second, loading all.
        self.config: ModelConfig | None = None
        self.tokenizer: PreTrainedTokenizerBase | None = None
        self.source: Path | None = None

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        revision: str | None = None,
        token: str | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        device: torch.device | str = "cpu",
        strict: bool = True,
    ) -> "METRIS":
        """Load a checkpoint, ready for inference, with its ``config`` and ``tokenizer``.

        Args:
            source: Folder that train or `save_pretrained` wrote, or OWNER/NAME on the Hugging Face Hub.
            revision: Branch, tag or commit, on the Hub.
            token: Of the Hub, for what is not public. None: that of ``hf auth login``, where there is one.
            cache_dir: Where the Hub's files are kept. None: huggingface_hub's place.
            local_files_only: Take the Hub's files from that place alone.
            device: Where the model goes.
            strict: Refuse a checkpoint that lacks weights or has others; False warns and loads what fits.

        Raises:
            InputError: The checkpoint cannot be had, is broken, or does not fit its config.
        """
        from reference_model.checkpoints import checkpoint
        from reference_model.checkpoints import hub as sharing

        folder = sharing.fetch(
            source, revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only
        )
        return checkpoint.load_checkpoint(folder, device=device, strict=strict).model

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a checkpoint with a model card, whole or not at all; as `sharing.save`."""
        from reference_model.checkpoints import hub as sharing

        sharing.save(self, Path(folder))

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | None = None,
        commit_message: str = "Upload METRIS",
    ) -> str:
        """Upload a checkpoint with a model card to the Hugging Face Hub; as `sharing.push`."""
        from reference_model.checkpoints import hub as sharing

        return sharing.push(self, repo_id, private=private, token=token, commit_message=commit_message)

    def encode_image(self, image: Tensor) -> ImageFeatures:
        """(b, 3, h, w), ImageNet-normalised -> features, once per image."""
        h, w = image.shape[-2:]
        return ImageFeatures(self.image_encoder(image), (h, w))

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
        """Encode (u, 3, h, w) images, ImageNet-normalised, and refer to them; the rest as in `refer`."""
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
