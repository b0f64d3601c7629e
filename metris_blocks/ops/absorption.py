"""Absorbed attention: masked attention without projecting the visual tokens (METRIS Eq. 6, reassociated)."""

import math
from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from metris_blocks.ops.masks import masked_softmax_per_head, per_row, zero_unless_any
from metris_blocks.ops.shapes import at_least_float32, check_axes


def absorbed_attention(
    query_tokens: Tensor,
    visual: Tensor,
    mask: Tensor | None,
    query_weight: Tensor,
    key_weight: Tensor,
    value_weight: Tensor,
    *,
    num_heads: int,
    query_bias: Tensor | None = None,
    value_bias: Tensor | None = None,
    scale: float | None = None,
    assume_finite: bool = False,
) -> Tensor:
    """Attend to visual tokens without projecting them to keys and values.

    The same function as projecting and calling `masked_attention`, reassociated per head h:
    ``logits_h = (Q_h W_k^h) F_v^T`` and ``out_h = (softmax(logits_h) F_v) W_v^h``. `absorbs` says when this
    takes fewer operations; a key bias is left out because it cancels in the softmax.

    Args:
        query_tokens: (b, l, d) tokens that ask.
        visual: (b, n, c) tokens that are asked; also what keys and values are made of.
        mask: (b, l, n) or (b, n) bool; True = takes part. None: all do. Tokens that no row attends to, and
            queries of rows that attend to nothing, may hold anything, NaN too.
        query_weight: (o, d) as in `torch.nn.Linear`, o = num_heads · e.
        key_weight: (o, c).
        value_weight: (o, c).
        num_heads: Number of heads; divides o.
        query_bias: (o) or None.
        value_bias: (o) or None.
        scale: Multiplies the logits; None means 1/sqrt(e).
        assume_finite: Vouch that those tokens and queries are finite as well: saves a pass over ``visual``.

    Returns:
        (b, l, o), heads side by side, before any output projection. A row that attends to nothing is zero.

    Raises:
        ValueError: An axis differs between the arguments, or ``num_heads`` does not divide o.
        TypeError: ``mask`` is not bool.
    """
    op = "absorbed_attention"
    sizes = check_axes(
        op,
        query_tokens=(query_tokens, "b l d"),
        visual=(visual, "b n c"),
        query_weight=(query_weight, "o d"),
        key_weight=(key_weight, "o c"),
        value_weight=(value_weight, "o c"),
        query_bias=(query_bias, "o"),
        value_bias=(value_bias, "o"),
        mask=(mask, "b l n | b n bool"),
    )
    if sizes["o"] % num_heads:
        raise ValueError(
            f"{op}: query_weight 'o d' has o={sizes['o']}, not a multiple of num_heads={num_heads}"
        )
    if mask is not None:
        mask = per_row(mask, sizes["l"])
        if not assume_finite:
            (visual,) = zero_unless_any(mask, visual)
            (query_tokens,) = zero_unless_any(mask.mT, query_tokens)
    scale = 1 / math.sqrt(sizes["o"] // num_heads) if scale is None else scale
    query = F.linear(query_tokens, query_weight, query_bias) * scale
    # Autocast knows no autograd.Function: its backward would meet two dtypes.
    visual, key_weight, value_weight = (x.to(query.dtype) for x in (visual, key_weight, value_weight))
    run: Any = _Absorbed.apply if torch.is_grad_enabled() else _Absorbed.forward
    out: Tensor = run(query, visual, key_weight, value_weight, mask, num_heads)[0]
    if value_bias is None:
        return out
    # The weights of a row sum to 1, or to 0 where it attends to nothing: there the bias is left out too.
    return out + (value_bias if mask is None else value_bias * mask.any(dim=-1, keepdim=True))


def absorbs(l: int, n: int, c: int, o: int, num_heads: int) -> bool:
    """Tell whether absorbing takes fewer multiply-adds than projecting n tokens to keys and values.

    Per sample, ``2·l·c·o + 2·l·n·c·heads`` against ``2·n·c·o + 2·l·n·o``: about l below the head width.
    """
    return l * c * o + l * n * c * num_heads < n * c * o + l * n * o


class _Absorbed(torch.autograd.Function):
    """What lies between the projected queries and the heads' outputs.

    Autograd alone would do the same with more passes over (b, n, c) and more of them kept.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        query: Tensor,
        visual: Tensor,
        key_weight: Tensor,
        value_weight: Tensor,
        mask: Tensor | None,
        num_heads: int,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        b = query.shape[0]
        query, key_weight, value_weight = _per_head(query, key_weight, value_weight, num_heads)
        folded = rearrange(torch.bmm(query, key_weight), "heads (b l) c -> b (l heads) c", b=b)
        logits = rearrange(torch.bmm(folded, visual.mT), "b (l heads) n -> b l heads n", heads=num_heads)
        weights = masked_softmax_per_head(logits, mask).to(visual.dtype)
        weights = rearrange(weights, "b l heads n -> b (l heads) n")
        mixed = torch.bmm(weights, visual)
        per_head = rearrange(mixed, "b (l heads) c -> heads (b l) c", heads=num_heads)
        out = rearrange(torch.bmm(per_head, value_weight.mT), "heads (b l) e -> b l (heads e)", b=b)
        return out, folded, weights, mixed

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, ctx.num_heads = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, *output[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 6
        query, visual, key_weight, value_weight, mask, folded, weights, mixed = ctx.saved_tensors
        heads, b = ctx.num_heads, grad.shape[0]
        if torch.is_grad_enabled():
            # A second derivative will be asked for: it has to know how these were made.
            inputs = query, visual, key_weight, value_weight, mask, heads
            folded, weights, mixed = _Absorbed.forward(*inputs)[1:]
        query, key_weight, value_weight = _per_head(query, key_weight, value_weight, heads)
        grad = rearrange(grad, "b l (heads e) -> heads (b l) e", heads=heads)

        mixed_grad = rearrange(torch.bmm(grad, value_weight), "heads (b l) c -> b (l heads) c", b=b)
        mixed = rearrange(mixed, "b (l heads) c -> heads (b l) c", heads=heads)
        value_weight_grad = rearrange(torch.bmm(grad.mT, mixed), "heads e c -> (heads e) c")
        weights_grad = at_least_float32(torch.bmm(mixed_grad, visual.mT))
        logits_grad = weights * (weights_grad - (weights * weights_grad).sum(dim=-1, keepdim=True))
        logits_grad = logits_grad.to(visual.dtype)
        visual_grad = None
        if ctx.needs_input_grad[1]:
            visual_grad = torch.bmm(weights.mT, mixed_grad).baddbmm_(logits_grad.mT, folded)
        folded_grad = torch.bmm(logits_grad, visual)
        folded_grad = rearrange(folded_grad, "b (l heads) c -> heads (b l) c", heads=heads)
        key_weight_grad = rearrange(torch.bmm(query.mT, folded_grad), "heads e c -> (heads e) c")
        query_grad = torch.bmm(folded_grad, key_weight.mT)
        query_grad = rearrange(query_grad, "heads (b l) e -> b l (heads e)", b=b)
        return query_grad, visual_grad, key_weight_grad, value_weight_grad, None, None


def _per_head(
    query: Tensor, key_weight: Tensor, value_weight: Tensor, heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(b, l, o), (o, c), (o, c) -> (heads, b·l, e), (heads, e, c), (heads, e, c), without a copy."""
    query = rearrange(query, "b l (heads e) -> heads (b l) e", heads=heads)
    key_weight, value_weight = (
        rearrange(w, "(heads e) c -> heads e c", heads=heads) for w in (key_weight, value_weight)
    )
    return query, key_weight, value_weight
