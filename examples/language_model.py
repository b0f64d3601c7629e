"""A decoder-only language model as the language side: the paper's future work (transformers' Llama, timm).

The guest multiplies each pixel with the last hidden state of the sentence, as LISA does with its token.
Replaced: that state, by itself plus what it finds among the visual expression tokens. Token 0 of a causal
model has read nothing, so the global cue is the last real token, on whichever side padding is.
Changed: 7 lines, marked VE; without them this file is the guest. Run: python -m examples.language_model
"""

import timm
import torch
from einops import einsum
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel, PreTrainedModel

from examples.scenes import IDS, main
from metris_blocks import VisualExpressionExtractor  # VE
from metris_blocks.ops import masked_attention  # VE


class GuidedByLanguageModel(nn.Module):
    def __init__(self, backbone: nn.Module, language_model: PreTrainedModel) -> None:
        super().__init__()
        self.backbone, self.language_model = backbone, language_model
        width, dim = backbone.feature_info[-1]["num_chs"], language_model.config.hidden_size
        self.pixels = nn.Conv2d(width, dim, 1)
        self.extractor = VisualExpressionExtractor(width, dim, dim, num_heads=2, global_cue="last")  # VE

    def forward(self, image: Tensor, words: Tensor, mask: Tensor) -> Tensor:
        features = self.backbone.forward_features(image)
        # Llama's places are relative. A model of absolute ones needs position_ids where padding is left.
        language = self.language_model(words, attention_mask=mask.long()).last_hidden_state
        last = (mask * torch.arange(mask.shape[1], device=mask.device)).argmax(dim=1)
        query = language.take_along_dim(last[:, None, None], dim=1)
        visual = features.flatten(2).mT  # VE
        ve = self.extractor(visual, language, language_mask=mask)  # VE
        tokens = ve.tokens[:, :, None]  # VE
        query = query + masked_attention(query[:, :, None], tokens, tokens, ve.mask)[:, :, 0]  # VE
        return einsum(self.pixels(features), query[:, 0], "b d h w, b d -> b h w")


def build() -> GuidedByLanguageModel:
    """Build a small one with random weights. One frozen in 16 bits gives ``language.float()``."""
    torch.manual_seed(0)
    options = {"depths": [1, 1, 1, 1], "dims": [16, 24, 32, 32], "output_stride": 8}
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    language_model = LlamaModel(LlamaConfig(vocab_size=len(IDS), pad_token_id=0, **small))
    return GuidedByLanguageModel(timm.create_model("convnext_atto", **options), language_model)


if __name__ == "__main__":
    main(build())
