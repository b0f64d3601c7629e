"""What a reader of the paper would write first: the equations as printed, and with what torch offers.

All run on the weights of our blocks, so that results can be compared and only the way of computing differs.
"""

import copy
import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.nn import functional as F

from metris_blocks import VisualExpressionExtractor
from metris_blocks.layers import AttentionLayer, MultiHeadAttention
from metris_blocks.ops.backends import triton

# (b, heads, l, e), (b, heads, n, e) twice, (b, l, n) bool or None -> (b, heads, l, e)
Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


def literal_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Eq. 6-7 with the paper's mask of 0 and -inf."""
    logits = q @ k.mT / math.sqrt(q.shape[-1])
    return (logits if mask is None else logits + _additive(mask)).softmax(dim=-1) @ v


def sdpa_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """torch's scaled_dot_product_attention, left to choose its kernel."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=None if mask is None else mask[:, None])


def flex_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """torch's FlexAttention; it reads the mask at each score: a block mask would be made anew each time."""
    from torch.nn.attention.flex_attention import flex_attention

    def masked(score: Tensor, b: Tensor, head: Tensor, l: Tensor, n: Tensor) -> Tensor:
        return torch.where(mask[b, l, n], score, -math.inf)

    return flex_attention(q, k, v, score_mod=masked)


def torch_multihead(module: MultiHeadAttention, x: Tensor, context: Tensor, mask: Tensor | None) -> Tensor:
    """What torch.nn.MultiheadAttention(kdim=c, vdim=c) runs under an `attn_mask`, on the weights of ours."""
    heads = module.num_heads
    hidden = None if mask is None else repeat(~mask, "b l n -> (b heads) l n", heads=heads)
    bias = torch.cat([module.q_proj.bias, torch.zeros_like(module.q_proj.bias), module.v_proj.bias])
    out, _ = F.multi_head_attention_forward(
        *(rearrange(tokens, "b s c -> s b c") for tokens in (x, context, context)),
        x.shape[-1],
        heads,
        None,
        bias,
        None,
        None,
        False,
        0.0,
        module.out_proj.weight,
        module.out_proj.bias,
        need_weights=False,
        attn_mask=hidden,
        use_separate_proj_weight=True,
        q_proj_weight=module.q_proj.weight,
        k_proj_weight=module.k_proj.weight,
        v_proj_weight=module.v_proj.weight,
    )
    return rearrange(out, "l b d -> b l d")


def projected(
    module: MultiHeadAttention, x: Tensor, context: Tensor, mask: Tensor | None, attend: Attend
) -> Tensor:
    """Project keys and values of all n tokens, then attend."""
    q, k, v = (
        rearrange(proj(tokens), "b s (heads e) -> b heads s e", heads=module.num_heads)
        for proj, tokens in ((module.q_proj, x), (module.k_proj, context), (module.v_proj, context))
    )
    return module.out_proj(rearrange(attend(q, k, v, mask), "b heads l e -> b l (heads e)"))


def layer(
    module: AttentionLayer, x: Tensor, context: Tensor | None, mask: Tensor | None, attend: Attend
) -> Tensor:
    """Eq. 6 or 7: attention and MLP, each added to its input."""
    normed = module.attention_norm(x)
    x = x + projected(module.attention, normed, normed if context is None else context, mask, attend)
    return x + module.mlp(module.mlp_norm(x))


def literal_aggregation(scores: Tensor, mask: Tensor, visual: Tensor) -> Tensor:
    """Eq. 5 word for word: Repeat(F_v, L), weighted and summed."""
    weights = scores.masked_fill(~mask, -math.inf).softmax(dim=-1)
    repeated = repeat(visual, "b n c -> b l n c", l=scores.shape[1])
    weighted = weights[..., None].to(visual.dtype) * repeated
    return weighted.sum(dim=2) / mask.sum(dim=-1, keepdim=True)


def matmul_aggregation(scores: Tensor, mask: Tensor, visual: Tensor) -> Tensor:
    """Eq. 5 as a matrix product."""
    weights = scores.masked_fill(~mask, -math.inf).softmax(dim=-1)
    return weights.to(visual.dtype) @ visual / mask.sum(dim=-1, keepdim=True)


def literal_relevance(visual: Tensor, language: Tensor) -> Tensor:
    """Eq. 2 in the dtype of its inputs."""
    return F.normalize(language, dim=-1) @ F.normalize(visual, dim=-1).mT


def literal_selection(scores: Tensor, ratio: float) -> Tensor:
    """Eq. 2-3 by torch.topk, which leaves open whom ties favour."""
    count = max(1, math.floor(ratio * scores.shape[-1] + 0.5))
    chosen = scores.topk(count, dim=-1).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, chosen, True)


def literal_extractor(extractor: VisualExpressionExtractor, visual: Tensor, language: Tensor) -> Tensor:
    """METRIS Eq. 1-7 word for word: Repeat(F_v, L), an additive mask, keys and values of all n tokens."""
    return _extractor(extractor, visual, language, literal_aggregation, literal_attention)


def sdpa_extractor(extractor: VisualExpressionExtractor, visual: Tensor, language: Tensor) -> Tensor:
    """The same with a matrix product for Eq. 5 and torch's scaled_dot_product_attention for Eq. 6 and 7."""
    return _extractor(extractor, visual, language, matmul_aggregation, sdpa_attention)


def _extractor(
    extractor: VisualExpressionExtractor,
    visual: Tensor,
    language: Tensor,
    aggregate: Callable[[Tensor, Tensor, Tensor], Tensor],
    attend: Attend,
) -> Tensor:
    curation = extractor.curation
    scores = literal_relevance(curation.visual_proj(visual), curation.language_proj(language))
    mask = literal_selection(scores, curation.ratio)
    aggregated = extractor.aggregation.proj(aggregate(scores, mask, visual))
    refined = layer(extractor.refinement.layer, aggregated, visual, mask, attend)
    return layer(extractor.relationship.layer, refined, None, None, attend)


def _additive(mask: Tensor) -> Tensor:
    return torch.zeros_like(mask, dtype=torch.float32).masked_fill(~mask, -math.inf)[:, None]


def on_backend(module: nn.Module, backend: str) -> nn.Module:
    """Copy ``module`` with every kernel from ``backend``, "eager" or "triton"; the weights are shared."""
    twin = copy.deepcopy(module, {id(p): p for p in module.parameters()})
    for part in twin.modules():
        if hasattr(part, "backend"):
            part.backend = backend
    return twin


def on_triton(module: nn.Module, leaves: Sequence[Tensor], *arguments: Tensor) -> Callable[..., Tensor] | str:
    """Give ``module`` with every kernel from Triton, or the reason why not; the weights are shared."""
    if why := triton.reasons(*leaves):
        return "; ".join(why)
    twin = on_backend(module, "triton")
    return lambda *inputs: twin(*inputs, *arguments)


def extractor_ways(extractor: VisualExpressionExtractor) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """Give (visual, language) -> tokens of the extractor itself and as written out."""
    return {
        "auto": lambda visual, language: extractor(visual, language).tokens,
        "literal": partial(literal_extractor, extractor),
        "sdpa": partial(sdpa_extractor, extractor),
    }
