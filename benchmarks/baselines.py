"""What a reader of the paper would write first: the equations as printed, and the same with SDPA.

Both run on the weights of a `VisualExpressionExtractor`, so that results can be compared and only the way of
computing differs.
"""

import math

import torch
from einops import rearrange, repeat
from torch import Tensor
from torch.nn import functional as F

from metris_blocks import VisualExpressionExtractor
from metris_blocks.layers import AttentionLayer


def literal_extractor(extractor: VisualExpressionExtractor, visual: Tensor, language: Tensor) -> Tensor:
    """METRIS Eq. 1-7 word for word: Repeat(F_v, L), an additive mask, keys and values of all n tokens."""
    scores, mask = _curated(extractor, visual, language)
    weights = (scores + mask).softmax(dim=-1)[..., None]
    repeated = repeat(visual, "b n c -> b l n c", l=language.shape[1])
    aggregated = (weights * repeated).sum(dim=2) / _count(extractor, visual)
    refined = _layer(
        extractor.refinement.layer, extractor.aggregation.proj(aggregated), visual, mask, _softmax
    )
    return _layer(extractor.relationship.layer, refined, None, None, _softmax)


def sdpa_extractor(extractor: VisualExpressionExtractor, visual: Tensor, language: Tensor) -> Tensor:
    """The same with a matrix product for Eq. 5 and torch's scaled_dot_product_attention for Eq. 6 and 7."""
    scores, mask = _curated(extractor, visual, language)
    aggregated = (scores + mask).softmax(dim=-1) @ visual / _count(extractor, visual)
    refined = _layer(extractor.refinement.layer, extractor.aggregation.proj(aggregated), visual, mask, _sdpa)
    return _layer(extractor.relationship.layer, refined, None, None, _sdpa)


def _count(extractor: VisualExpressionExtractor, visual: Tensor) -> int:
    return max(1, math.floor(extractor.curation.ratio * visual.shape[1] + 0.5))


def _curated(extractor: VisualExpressionExtractor, visual: Tensor, language: Tensor) -> tuple[Tensor, Tensor]:
    x, y = extractor.curation.visual_proj(visual), extractor.curation.language_proj(language)
    scores = F.normalize(y, dim=-1) @ F.normalize(x, dim=-1).mT
    chosen = scores.topk(_count(extractor, visual), dim=-1).indices
    return scores, torch.full_like(scores, -math.inf).scatter(-1, chosen, 0.0)


def _softmax(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    logits = q @ k.mT / math.sqrt(q.shape[-1])
    return (logits if mask is None else logits + mask[:, None]).softmax(dim=-1) @ v


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=None if mask is None else mask[:, None])


def _layer(layer: AttentionLayer, x: Tensor, context: Tensor | None, mask: Tensor | None, attend) -> Tensor:
    attention, normed = layer.attention, layer.attention_norm(x)
    context = normed if context is None else context
    q, k, v = (
        rearrange(proj(tokens), "b s (heads e) -> b heads s e", heads=attention.num_heads)
        for proj, tokens in (
            (attention.q_proj, normed),
            (attention.k_proj, context),
            (attention.v_proj, context),
        )
    )
    x = x + attention.out_proj(rearrange(attend(q, k, v, mask), "b heads l e -> b l (heads e)"))
    return x + layer.mlp(layer.mlp_norm(x))
