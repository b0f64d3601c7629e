"""Plain PyTorch: the readable form, differentiable twice, on every device and dtype."""

from einops import einsum, rearrange
from torch import Tensor

from metris_blocks.ops.masks import masked_softmax


def reasons(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> list[str]:
    """Say nothing: this backend runs anything."""
    return []


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """(b, l, heads, e), (b, n, heads, e), (b, n, heads, e), (b, l, n) bool -> (b, l, heads, e)."""
    logits = einsum(query * scale, key, "b l heads e, b n heads e -> b heads l n")
    weights = masked_softmax(logits, None if mask is None else rearrange(mask, "b l n -> b 1 l n"))
    return einsum(weights.to(value.dtype), value, "b heads l n, b n heads e -> b l heads e")
