"""Custom ops that traced code sees as one node: what compile, export and autograd must know of a kernel."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def opaque(
    name: str,
    forward: Callable[..., Any],
    like: Callable[..., Any],
    backward: Callable[..., Any] | None = None,
    *,
    results: str = "",
    gradients: str = "",
) -> Callable[..., Any]:
    """Register a kernel as ``torch.ops.metris_blocks.<name>``, its gradient as ``<name>_backward``.

    Args:
        name: Of the op.
        forward: Computes; its type hints are the op's schema.
        like: Gives empty tensors of the shapes and dtypes of what ``forward`` gives.
        backward: Takes the gradient of the first result and then whatever its parameters name, of the
            arguments and results of ``forward``; gives the gradients. None: not differentiable.
        results: Names of what ``forward`` gives.
        gradients: Names of the arguments that ``backward`` gives the gradients of, each of its argument's
            shape and dtype.

    Returns:
        The op.
    """
    op = torch.library.custom_op(f"metris_blocks::{name}", forward, mutates_args=())
    op.register_fake(like)
    if backward is None:
        return op
    arguments, kept = (list(inspect.signature(f).parameters) for f in (forward, backward))
    kept = kept[1:]
    backward_op = torch.library.custom_op(f"metris_blocks::{name}_backward", backward, mutates_args=())

    def backward_like(grad: Tensor, *values: Any) -> tuple[Tensor, ...]:
        named = dict(zip(kept, values, strict=True))
        return tuple(named[one].new_empty(named[one].shape) for one in gradients.split())

    def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        named = dict(zip([*arguments, *results.split()], [*inputs, *output], strict=True))
        values = [named[one] for one in kept]
        ctx.save_for_backward(*(x if isinstance(x, Tensor) else None for x in values))
        ctx.others = [None if isinstance(x, Tensor) else x for x in values]

    def differentiate(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        pairs = zip(ctx.saved_tensors, ctx.others, strict=True)
        grads = backward_op(grad, *(other if saved is None else saved for saved, other in pairs))
        named = dict(zip(gradients.split(), grads, strict=True))
        return tuple(named.get(one) for one in arguments)

    backward_op.register_fake(backward_like)
    op.register_autograd(differentiate, setup_context=save)
    return op


def opaque_attention(
    name: str, forward: Callable[..., Any], backward: Callable[..., Any]
) -> Callable[..., Any]:
    """Register attention that gives its output and the logsumexp of each row, (b, heads, l) float32."""

    def like(
        query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
    ) -> tuple[Tensor, Tensor]:
        b, l, heads, _ = query.shape
        return query.new_empty(query.shape), query.new_empty((b, heads, l), dtype=torch.float32)

    return opaque(name, forward, like, backward, results="out logsumexp", gradients="query key value")
