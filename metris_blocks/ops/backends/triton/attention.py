"""Flash attention in Triton for a boolean mask that all heads share; it is read as it is, in bytes."""

from torch import Tensor

from metris_blocks.ops.backends.opaque import opaque_attention
from metris_blocks.ops.backends.triton import reasons as reasons


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """(b, l, heads, e), (b, n, heads, e), (b, n, heads, e), (b, l, n) bool -> (b, l, heads, e).

    Tokens that no row attends to, and queries of rows that attend to nothing, may hold NaN.
    """
    out: Tensor = _attend(query, key, value, mask, scale)[0]
    return out


def _forward(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    from metris_blocks.ops.backends.triton.kernels import attend as kernels

    return kernels.attend(query, key, value, mask, scale)


def _backward(
    grad: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    from metris_blocks.ops.backends.triton.kernels import attend as kernels

    return kernels.attend_backward(grad, out, logsumexp, query, key, value, mask, scale)


_attend = opaque_attention("triton_attention", _forward, _backward)
