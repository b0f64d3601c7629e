"""SAM (transformers), whose mask decoder is prompted by visual expression tokens.

Replaced: points and boxes, by the tokens as sparse prompts; SAM's own attention is told which are padding.
It gets a text encoder; the global cue is a learned average of the words.
Changed: 15 lines, marked VE; without them this file is SAM without a prompt. Run: python -m examples.sam
"""

import torch
from torch import Tensor
from torch.nn.functional import pad  # VE
from transformers import SamConfig, SamModel
from transformers.models.bert import BertConfig, BertModel  # VE

from examples.scenes import SIZE, main
from metris_blocks import VisualExpressionExtractor  # VE


class GuidedSam(SamModel):
    def __init__(self, config: SamConfig) -> None:
        super().__init__(config)
        dim = config.mask_decoder_config.hidden_size  # VE
        self.text = BertModel(BertConfig(hidden_size=dim, num_hidden_layers=1, num_attention_heads=2))  # VE
        self.extractor = VisualExpressionExtractor(dim, dim, dim, num_heads=2, global_cue="learned")  # VE
        for layer in self.mask_decoder.transformer.layers:  # VE
            layer.self_attn.register_forward_pre_hook(self._hide, with_kwargs=True)  # VE
            layer.cross_attn_image_to_token.register_forward_pre_hook(self._hide, with_kwargs=True)  # VE

    def forward(self, image: Tensor, words: Tensor, mask: Tensor) -> Tensor:
        embedding = self.vision_encoder(image).last_hidden_state
        position = self.get_image_wide_positional_embeddings().repeat(len(image), 1, 1, 1)
        prompts, dense = self.prompt_encoder(None, None, None, None)
        language = self.text(words, mask).last_hidden_state  # VE
        ve = self.extractor(embedding.flatten(2).mT, language, language_mask=mask)  # VE
        prompts, self.real = ve.tokens[:, None], ve.mask  # VE
        logits, _ = self.mask_decoder(embedding, position, prompts, dense, multimask_output=False)
        return logits[:, 0, 0]

    def _hide(self, attention, args, kwargs):  # VE
        mask = pad(self.real, (1 + self.mask_decoder.num_mask_tokens, 0), value=True)  # VE
        return args, {**kwargs, "attention_similarity": (~mask)[:, None, None] * -1e9}  # VE


def build() -> GuidedSam:
    """Build a small one with random weights."""
    torch.manual_seed(0)
    size, heads = {"image_size": SIZE, "patch_size": 8}, {"mlp_dim": 64, "num_attention_heads": 2}
    config = SamConfig(
        vision_config={
            **size,
            **heads,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "window_size": 4,
            "global_attn_indexes": [1],
            "output_channels": 32,
            "num_pos_feats": 16,
            "initializer_range": 0.1,
        },
        prompt_encoder_config={**size, "hidden_size": 32, "mask_input_channels": 4},
        mask_decoder_config={**heads, "hidden_size": 32, "iou_head_hidden_dim": 16},
        initializer_range=0.1,
    )
    return GuidedSam(config)


if __name__ == "__main__":
    main(build())
