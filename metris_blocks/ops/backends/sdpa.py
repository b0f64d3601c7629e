"""torch.nn.functional.scaled_dot_product_attention, pinned to the kernels that read a mask as we mean it."""

import math

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

# Not cuDNN, the default with a mask on H100: wrong gradients at some lengths (pytorch#196678, #191612).
_KERNELS = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
# Kernels read the bias in vectors; a row that does not start on one is refused (pytorch#121943).
_ALIGNMENT = 8


def reasons(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> list[str]:
    """Say nothing: the math kernel runs what the memory-efficient one cannot."""
    return []


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """(b, l, heads, e), (b, n, heads, e), (b, n, heads, e), (b, l, n) bool -> (b, l, heads, e)."""
    q, k, v = (rearrange(x, "b s heads e -> b heads s e") for x in (query, key, value))
    with sdpa_kernel(_KERNELS):
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=_bias(mask, q), scale=scale)
    return rearrange(out, "b heads l e -> b l heads e")


def _bias(mask: Tensor | None, q: Tensor) -> Tensor | None:
    """(b, l, n) bool -> (b, heads, l, n) of 0 and -inf, its rows aligned in memory."""
    if mask is None:
        return None
    n = mask.shape[-1]
    # -inf and never finfo.min: a row of -inf gives zeros and zero gradient, a row of finfo.min the mean of V.
    bias = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill(~mask, -math.inf)
    # Pad, slice, expand, and nothing after: any later op would lose the aligned stride.
    bias = F.pad(bias, (0, -n % _ALIGNMENT))[..., :n]
    return bias[:, None].expand(-1, q.shape[1], -1, -1)
