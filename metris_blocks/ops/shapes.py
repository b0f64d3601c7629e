"""One check for every tensor contract: axes, widths and masks."""

import torch
from torch import Tensor


def check_axes(op: str, **arguments: tuple[Tensor | int | None, str]) -> dict[str, int]:
    """Bind axis letters to sizes in argument order and refuse the first contradiction.

    ``check_axes("op", scores=(s, "b l n"), visual_mask=(m, "b n bool"))`` returns ``{"b": 2, "l": 20, ...}``.
    A pattern that ends in "bool" is a mask's, "b l n | b n" takes either form, and None is skipped. A number
    is a width that its owner was built for, given before the tensors: ``visual_dim=(64, "c")``.

    Raises:
        ValueError: Names the op, the argument, the axis, both sizes and who set the first one.
        TypeError: A mask is not bool; names the op, the mask and its dtype.
    """
    sizes: dict[str, int] = {}
    owner: dict[str, str] = {}
    widths = {pattern for value, pattern in arguments.values() if isinstance(value, int)}
    for name, (value, pattern) in arguments.items():
        if value is None:
            continue
        if isinstance(value, int):
            sizes[pattern], owner[pattern] = value, name
            continue
        axes = pattern.removesuffix(" bool")
        if axes != pattern and value.dtype is not torch.bool:
            raise TypeError(f"{op}: {name} must be bool (True = takes part), got {value.dtype}")
        form = next((form for form in axes.split(" | ") if len(form.split()) == value.ndim), None)
        if form is None:
            raise ValueError(f"{op}: {name} has shape {tuple(value.shape)}, expected axes '{axes}'")
        for axis, size in zip(form.split(), value.shape, strict=True):
            if sizes.setdefault(axis, size) != size:
                first, other = owner[axis], sizes[axis]
                raise ValueError(
                    f"{op}: {name} has {axis}={size}, expected {first}={other}; "
                    f"tokens are ({', '.join(form.split())})"
                    if axis in widths
                    else f"{op}: {name} '{form}' has {axis}={size}, but {first} has {axis}={other}"
                )
            owner.setdefault(axis, name)
    return sizes


def at_least_float32(tensor: Tensor) -> Tensor:
    """Widen 16-bit floats to float32; leave float32 and float64 as they are."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
