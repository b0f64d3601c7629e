"""CLIPSeg (transformers), whose conditional decoder attends to visual expression tokens.

Replaced: nothing. The tokens join the sequence of the decoder layer that FiLM conditions, and leave it after.
CLIP's text tower is causal, so the global cue is the last real token, <end>.
Changed: 14 lines, marked VE; without them this file is CLIPSeg. Run: python -m examples.clipseg
"""

import torch
from torch import Tensor
from transformers import CLIPSegConfig, CLIPSegForImageSegmentation

from examples.scenes import IDS, SIZE, main
from metris_blocks import GuidanceSet, VisualExpressionExtractor  # VE


class GuidedCLIPSeg(CLIPSegForImageSegmentation):
    def __init__(self, config: CLIPSegConfig) -> None:
        super().__init__(config)
        dims = config.vision_config.hidden_size, config.text_config.hidden_size, config.reduce_dim  # VE
        self.extractor = VisualExpressionExtractor(*dims, num_heads=2, global_cue="last")  # VE
        layer = self.decoder.layers[config.conditional_layer]  # VE
        layer.register_forward_pre_hook(self._join, with_kwargs=True)  # VE
        layer.register_forward_hook(self._leave)  # VE

    def forward(self, image: Tensor, words: Tensor, mask: Tensor) -> Tensor:
        vision = self.clip.vision_model(image, output_hidden_states=True)
        text = self.clip.text_model(words, mask)
        visual = vision.hidden_states[-1][:, 1:]  # VE
        self.expression = self.extractor(visual, text.last_hidden_state, language_mask=mask)  # VE
        activations = [vision.hidden_states[i + 1] for i in self.extract_layers]
        return self.decoder(activations, self.clip.text_projection(text.pooler_output)).logits

    def _join(self, layer, args, kwargs):  # VE
        parts = (args[0], None), (self.expression.tokens, self.expression.mask)  # VE
        tokens, mask = GuidanceSet.join(*parts)  # VE
        return (tokens,), {**kwargs, "attention_mask": (~mask)[:, None, None] * -1e9}  # VE

    def _leave(self, layer, args, tokens):  # VE
        return tokens[:, : -vars(self).pop("expression").tokens.shape[1]]  # VE


def build() -> GuidedCLIPSeg:
    """Build a small one with random weights, so CLIP trains too; published ones: `from_pretrained`."""
    torch.manual_seed(0)
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"bos_token_id": IDS["<end>"], "eos_token_id": IDS["<end>"], "pad_token_id": IDS["<pad>"]}
    config = CLIPSegConfig(
        text_config={**tower, **ids, "vocab_size": len(IDS), "max_position_embeddings": 32},
        vision_config={**tower, "image_size": SIZE, "patch_size": 8, "initializer_range": 0.2},
        initializer_range=0.1,
        projection_dim=32,
        reduce_dim=32,
        extract_layers=[0, 1],
        decoder_num_attention_heads=2,
        decoder_intermediate_size=64,
        conditional_layer=0,
    )
    return GuidedCLIPSeg(config)


if __name__ == "__main__":
    main(build())
