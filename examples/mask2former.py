"""Mask2Former (transformers), whose queries attend to the guidance set before each decoder layer.

Replaced: nothing. It gets a text encoder, and its result is the masks of the queries by their class scores.
Its tokens come from the pixel decoder; the global cue is the mean of the words.
Changed: 15 lines, marked VE; without them this file is Mask2Former. Run: python -m examples.mask2former
"""

import torch
from einops import einsum
from torch import Tensor
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig
from transformers.models.bert import BertConfig, BertModel  # VE

from examples.scenes import SIZE, main
from metris_blocks import GuidanceSet, VisualExpressionExtractor, ops  # VE


class GuidedMask2Former(Mask2FormerForUniversalSegmentation):
    def __init__(self, config: Mask2FormerConfig) -> None:
        super().__init__(config)
        dim = config.hidden_dim  # VE
        self.text = BertModel(BertConfig(hidden_size=dim, num_hidden_layers=1, num_attention_heads=2))  # VE
        self.extractor = VisualExpressionExtractor(dim, dim, dim, num_heads=2, global_cue="mean")  # VE
        for layer in self.model.transformer_module.decoder.layers:  # VE
            layer.register_forward_pre_hook(self._guide)  # VE

    def forward(self, image: Tensor, words: Tensor, mask: Tensor) -> Tensor:
        pixels = self.model.pixel_level_module(image)
        levels, finest = pixels.decoder_hidden_states, pixels.decoder_last_hidden_state
        language = self.text(words, mask).last_hidden_state  # VE
        ve = self.extractor(finest.flatten(2).mT, language, language_mask=mask)  # VE
        self.guidance = GuidanceSet.join((language, mask), (ve.tokens, ve.mask))  # VE
        queries = self.model.transformer_module(levels, finest)
        del self.guidance  # VE
        classes = self.class_predictor(queries.intermediate_hidden_states[-1].transpose(0, 1))
        return einsum(queries.masks_queries_logits[-1], classes[..., 0].softmax(1), "b q h w, b q -> b h w")

    def _guide(self, layer, args):  # VE
        queries, tokens = args[0].transpose(0, 1)[:, :, None], self.guidance.tokens[:, :, None]  # VE
        found = ops.masked_attention(queries, tokens, tokens, self.guidance.mask)  # VE
        return args[0] + found[:, :, 0].transpose(0, 1), *args[1:]  # VE


def build() -> GuidedMask2Former:
    """Build a small one with random weights."""
    torch.manual_seed(0)
    stages = {"depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2], "window_size": 4, "initializer_range": 0.1}
    names = ["stage1", "stage2", "stage3", "stage4"]
    config = Mask2FormerConfig(
        backbone_config=SwinConfig(image_size=SIZE, patch_size=4, embed_dim=16, out_features=names, **stages),
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_layers=1,
        encoder_feedforward_dim=64,
        decoder_layers=3,
        dim_feedforward=64,
        num_attention_heads=2,
        num_queries=4,
        num_labels=1,
        dropout=0.0,
        init_std=0.2,
    )
    return GuidedMask2Former(config)


if __name__ == "__main__":
    main(build())
