"""CLIPSeg as anyone would bring it to the evaluator: a callable that knows nothing of this package.

Its weights are random and its tokenizer knows letters alone, so that nothing is downloaded; with
``CIDAS/clipseg-rd64-refined`` in place of both it is the published model.
"""

import json
import tempfile
from pathlib import Path

import torch
from PIL import Image
from transformers import (
    CLIPSegConfig,
    CLIPSegForImageSegmentation,
    CLIPSegProcessor,
    CLIPTokenizer,
    ViTImageProcessorPil,
)

SIDE = 32


def _tokenizer() -> CLIPTokenizer:
    letters = [chr(code) for code in range(33, 127)]
    pieces = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "vocab.json").write_text(json.dumps({piece: i for i, piece in enumerate(pieces)}))
        (Path(folder) / "merges.txt").write_text("#version: 0.2\n")
        return CLIPTokenizer.from_pretrained(folder, model_max_length=24)


def _model(tokenizer: CLIPTokenizer) -> CLIPSegForImageSegmentation:
    torch.manual_seed(0)
    tower = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    ids = {f"{which}_token_id": getattr(tokenizer, f"{which}_token_id") for which in ("bos", "eos", "pad")}
    text = {**tower, **ids, "vocab_size": len(tokenizer), "max_position_embeddings": 24}
    image = {**tower, "image_size": SIDE, "patch_size": 8}
    config = CLIPSegConfig(
        text_config=text,
        vision_config=image,
        projection_dim=16,
        reduce_dim=16,
        extract_layers=[0, 1],
        decoder_num_attention_heads=2,
        decoder_intermediate_size=16,
        conditional_layer=0,
    )
    return CLIPSegForImageSegmentation(config).eval()


tokenizer = _tokenizer()
processor = CLIPSegProcessor(ViTImageProcessorPil(size={"height": SIDE, "width": SIDE}), tokenizer)
model = _model(tokenizer)


def segment(image: Image.Image, sentences: list[str]) -> torch.Tensor:
    """Answer k sentences about an image: (k, 32, 32) probabilities."""
    inputs = processor(
        text=sentences, images=[image] * len(sentences), padding=True, truncation=True, return_tensors="pt"
    )
    logits = model(**inputs).logits
    return logits.reshape(len(sentences), SIDE, SIDE).sigmoid()
