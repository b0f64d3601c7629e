"""Functional ops: tensors in, tensors out, no parameters. Listed in the order the data meets them."""

from metris_blocks.ops.absorption import absorbed_attention
from metris_blocks.ops.aggregation import masked_softmax_aggregation
from metris_blocks.ops.attention import auto_backend, explain_backends, masked_attention
from metris_blocks.ops.contrastive import pixel_contrastive_loss
from metris_blocks.ops.curation import cosine_relevance, top_r_mask

__all__ = [
    "absorbed_attention",
    "auto_backend",
    "cosine_relevance",
    "explain_backends",
    "masked_attention",
    "masked_softmax_aggregation",
    "pixel_contrastive_loss",
    "top_r_mask",
]
