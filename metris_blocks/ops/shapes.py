"""One check for every tensor contract, and what a boolean mask becomes inside an implementation."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

# Kernels read a bias in vectors of up to eight; a row that does not start on one is refused (pytorch#121943).
_ALIGNMENT = 8


def check_axes(op: str, **tensors: tuple[Tensor, str]) -> dict[str, int]:
    """Bind axis letters to sizes in argument order and refuse the first contradiction.

    ``check_axes("op", scores=(s, "b l n"), visual=(v, "b n c"))`` returns ``{"b": 2, "l": 20, ...}``.

    Raises:
        ValueError: Names the op, the argument, the axis, both sizes and who set the first one.
    """
    sizes: dict[str, int] = {}
    owner: dict[str, str] = {}
    for name, (tensor, pattern) in tensors.items():
        axes = pattern.split()
        if tensor.ndim != len(axes):
            raise ValueError(f"{op}: {name} has shape {tuple(tensor.shape)}, expected axes '{pattern}'")
        for axis, size in zip(axes, tensor.shape, strict=True):
            if sizes.setdefault(axis, size) != size:
                raise ValueError(
                    f"{op}: {name} '{pattern}' has {axis}={size}, but {owner[axis]} has {axis}={sizes[axis]}"
                )
            owner.setdefault(axis, name)
    return sizes


def check_mask(op: str, **masks: Tensor) -> None:
    """Refuse masks that are not boolean; the house reads True as "takes part".

    Raises:
        TypeError: Names the op, the mask and its dtype.
    """
    for name, mask in masks.items():
        if mask.dtype is not torch.bool:
            raise TypeError(f"{op}: {name} must be bool (True = takes part), got {mask.dtype}")


def mask_axes(mask: Tensor | None) -> dict[str, tuple[Tensor, str]]:
    """Give `check_axes` the mask of an attention, (b, l, n) or (b, n), or nothing where there is none."""
    if mask is None:
        return {}
    return {"mask": (mask, "b n" if mask.ndim == 2 else "b l n")}


def per_row(op: str, mask: Tensor, l: int) -> Tensor:
    """Check a mask (b, l, n) or (b, n) and give it as (b, l, n), without a copy.

    Raises:
        TypeError: ``mask`` is not bool.
    """
    check_mask(op, mask=mask)
    return mask if mask.ndim == 3 else mask[:, None].expand(-1, l, -1)


def at_least_float32(tensor: Tensor) -> Tensor:
    """Widen 16-bit floats to float32; leave float32 and float64 as they are."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def zero_unless_any(mask: Tensor, *tensors: Tensor) -> list[Tensor]:
    """Zero the visual tokens that no row attends to, so that NaN there cannot leak through ``0 · NaN``.

    Args:
        mask: (b, l, n) or (b, n) bool.
        tensors: (b, n, ...) each.
    """
    attended = mask.any(dim=1) if mask.ndim == 3 else mask
    # where, and not masked_fill: that copies first and fills in a second pass.
    return [torch.where(attended.reshape(*attended.shape, *(1,) * (x.ndim - 2)), x, 0) for x in tensors]


def aligned_bias(mask: Tensor, heads: int, dtype: torch.dtype) -> Tensor:
    """Turn a bool mask into the additive one that kernels take, its rows aligned in memory.

    -inf and never finfo.min: a row of -inf gives zeros and zero gradient, a row of finfo.min the mean of V.

    Args:
        mask: (b, l, n) bool; True = takes part.
        heads: Number of heads that share it.
        dtype: The query's; kernels misread any other.

    Returns:
        (b, heads, l, n) of 0 and -inf, broadcast over the heads without a copy.
    """
    n = mask.shape[-1]
    bias = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, -math.inf)
    if torch.compiler.is_exporting():
        # A program holds for every n, and PyTorch aligns the rows itself when it runs one.
        return bias[:, None].expand(-1, heads, -1, -1)
    # Pad, slice, expand, and nothing after: any later op would lose the aligned stride. Never by 0, or
    # compiled code would hold for the widths alone that do, or do not, fill whole vectors.
    return F.pad(bias, (0, _ALIGNMENT - n % _ALIGNMENT))[..., :n][:, None].expand(-1, heads, -1, -1)
