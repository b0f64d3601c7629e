"""Any timm backbone: ViT and DINOv2 give (b, n, c) tokens, ConvNeXt a (b, c, h, w) map.

The guest is a linear head on each token, which hears nothing.
Replaced: the head's input, by the tokens plus what they find in the guidance set [LE, VE]. The global
cue is a learned average of the words.
Changed: 10 lines, marked VE; without them this file is the guest. Run: python -m examples.timm_backbones
"""

import timm
import torch
from einops import rearrange
from torch import Tensor, nn
from transformers.models.bert import BertConfig, BertModel  # VE

from examples.scenes import SIZE, main
from metris_blocks import GuidanceSet, VisualExpressionExtractor  # VE
from metris_blocks.ops import masked_attention  # VE

CELL = 8
"""Pixels of the image's side per token, with the options below."""
_VIT = {"img_size": SIZE, "patch_size": CELL, "embed_dim": 32, "depth": 2, "num_heads": 2}
BACKBONES = {
    "vit_tiny_patch16_224": _VIT,
    "vit_small_patch14_reg4_dinov2": _VIT,
    "convnext_atto": {"depths": [1, 1, 1, 1], "dims": [16, 24, 32, 32], "output_stride": CELL},
}


class GuidedBackbone(nn.Module):
    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone, dim = backbone, backbone.num_features
        self.head = nn.Linear(dim, CELL**2)
        self.text = BertModel(BertConfig(hidden_size=dim, num_hidden_layers=1, num_attention_heads=2))  # VE
        self.extractor = VisualExpressionExtractor(dim, dim, dim, num_heads=2, global_cue="learned")  # VE

    def forward(self, image: Tensor, words: Tensor, mask: Tensor) -> Tensor:
        visual = self.backbone.forward_features(image)
        if visual.ndim == 4:
            visual = rearrange(visual, "b c h w -> b (h w) c")
        else:
            visual = visual[:, self.backbone.num_prefix_tokens :]
        language = self.text(words, mask).last_hidden_state  # VE
        ve = self.extractor(visual, language, language_mask=mask)  # VE
        tokens, real = GuidanceSet.join((language, mask), (ve.tokens, ve.mask))  # VE
        tokens = tokens[:, :, None]  # VE
        visual = visual + masked_attention(visual[:, :, None], tokens, tokens, real)[:, :, 0]  # VE
        rows = image.shape[-2] // CELL
        return rearrange(self.head(visual), "b (h w) (y x) -> b (h y) (w x)", h=rows, y=CELL)


def build(name: str = "convnext_atto") -> GuidedBackbone:
    """Build a small one with random weights."""
    torch.manual_seed(0)
    return GuidedBackbone(timm.create_model(name, **BACKBONES[name]))


if __name__ == "__main__":
    for backbone in BACKBONES:
        main(build(backbone))
