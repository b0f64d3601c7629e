"""Pixel contrastive loss: the global cue's relevance, supervised by the target mask (METRIS Eq. 4)."""

from functools import partial
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from metris_blocks.ops.shapes import at_least_float32, check_axes

# Far beyond any cosine over a temperature, and small enough that sums over an image stay finite.
_LARGEST_LOGIT = 1e30
# PyTorch's default calls softplus(x) = x beyond 20, an error of 2e-9 that float64 would see.
_softplus = partial(F.softplus, threshold=40)


def pixel_contrastive_loss(
    scores: Tensor,
    target: Tensor,
    temperature: Tensor | float,
    *,
    valid: Tensor | None = None,
    reduction: Literal["mean", "sum", "none"] = "mean",
) -> Tensor:
    """Pull relevant pixels towards the expression and push the others away.

    METRIS Eq. 4: ``-log σ(s_z/τ)`` on target pixels and ``-log(1 - σ(s_z/τ))`` elsewhere, that is binary
    cross-entropy with logits s/τ. Fractions of a pixel in ``target`` weigh the two terms.

    Args:
        scores: (b, n) relevance s of the global expression token; cosine, no unit.
        target: (b, n) share of each token's area that belongs to the target, in [0, 1].
        temperature: τ > 0, a number or a tensor of one element; may require grad.
        valid: (b, n) bool; True = counts. None: all count. Left-out tokens may hold NaN.
        reduction: "mean" over the tokens that count, "sum", or "none".

    Returns:
        A scalar, or (b, n) for "none" with zeros where ``valid`` is False; float32 or wider, finite for any
        finite input. With nothing valid the mean is 0.

    Raises:
        ValueError: An axis differs between the arguments, ``reduction`` is unknown, or ``temperature`` is a
            number that is not positive.
        TypeError: ``valid`` is not bool.
    """
    op = "pixel_contrastive_loss"
    check_axes(op, scores=(scores, "b n"), target=(target, "b n"), valid=(valid, "b n bool"))
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"{op}: reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
    if not isinstance(temperature, Tensor) and not temperature > 0:
        raise ValueError(f"{op}: temperature must be > 0, got {temperature:g}")
    if valid is not None:
        scores, target = scores.masked_fill(~valid, 0), target.masked_fill(~valid, 0)

    with torch.autocast(scores.device.type, enabled=False):
        logits = at_least_float32(scores) / temperature
        logits = logits.clamp(-_LARGEST_LOGIT, _LARGEST_LOGIT)
        target = target.to(logits.dtype)
        # -log σ(x) is softplus(-x), which ONNX has; log σ would be Log(Sigmoid(x)) there, 1e-3 off at -10 and
        # infinite from -18 on.
        loss = target * _softplus(-logits) + (1 - target) * _softplus(logits)
    if valid is not None:
        loss = loss.masked_fill(~valid, 0)
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    # Divide before the sum: a sum of large losses could overflow where their mean does not.
    count = valid.sum().clamp_min(1) if valid is not None else max(1, loss.numel())
    return (loss / count).sum()
