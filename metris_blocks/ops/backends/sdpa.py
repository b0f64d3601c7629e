"""torch.nn.functional.scaled_dot_product_attention, pinned to the kernels that read a mask as we mean it."""

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from metris_blocks.ops.masks import aligned_bias

# Not cuDNN, the default with a mask on H100: wrong gradients at some lengths (pytorch#196678, #191612).
_CUDA = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
_MATH = [SDPBackend.MATH]
# CPU only: on CUDA this kernel takes no mask.
_FLASH = [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]


def reasons(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> list[str]:
    """Say nothing: the math kernel runs what the others cannot."""
    return []


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """(b, l, heads, e), (b, n, heads, e), (b, n, heads, e), (b, l, n) bool -> (b, l, heads, e)."""
    q, k, v = (rearrange(x, "b s heads e -> b heads s e") for x in (query, key, value))
    some = None
    if mask is not None and torch.compiler.is_exporting():
        # PyTorch gives zeros to a row of -inf, a softmax in other runtimes NaN: in a program such a row
        # attends to all, and is zeroed after.
        some = mask.any(dim=-1, keepdim=True)
        mask = mask | ~some
    bias = None if mask is None else aligned_bias(mask, q.shape[1], q.dtype)
    with sdpa_kernel(_kernels(query, key)):
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
    out = rearrange(out, "b heads l e -> b l heads e")
    return out if some is None else out * some[..., None].to(out.dtype)


def _kernels(query: Tensor, key: Tensor) -> list[SDPBackend]:
    """Choose by device; on a CPU the flash kernel while keys outnumber queries (bench_attention.py)."""
    if query.device.type == "cuda":
        return _CUDA
    # An exported program holds for all sizes, so it may not ask; it does not keep the pin either.
    if torch.compiler.is_exporting():
        return _FLASH
    return _FLASH if key.shape[1] >= query.shape[1] else _MATH
