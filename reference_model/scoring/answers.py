"""What a model says to a sentence, and how it is brought to the size where masks are compared."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from reference_model.data.transforms import resize_mask
from reference_model.scoring.protocols import Protocol

_SURE = 1e-6


class Answer(NamedTuple):
    """What a model says to one sentence, at whatever size it works."""

    mask: Tensor
    """(h, w) bool, or floating point: logits or probabilities."""
    logits: bool
    """Whether floating-point numbers are logits."""
    no_target: float | None
    """Probability that nothing in the image is meant, 0 to 1; None from a model without that classifier."""
    threshold: float | None = None
    """Of a bool mask, the probability above which pixels are inside, where that is known."""


class Resized(NamedTuple):
    """An answer at the size where masks are compared."""

    mask: np.ndarray
    """(height, width) bool."""
    probability: np.ndarray | None
    """(height, width) float32, 0 to 1; None where the answer was bool."""


def resized(answer: Answer, height: int, width: int, protocol: Protocol) -> Resized:
    """Bring an answer to a size by the rule of a protocol. Where it has that size, nothing is interpolated.

    Probabilities go back to logits where a protocol resizes those, cut to 1e-6 ... 1 - 1e-6.
    """
    found, here = answer.mask, tuple(answer.mask.shape) == (height, width)
    if found.dtype == torch.bool:
        mask = found.cpu().numpy()
        return Resized(mask if here else resize_mask(mask, height, width), None)
    found = found.float()
    if protocol.resized == "logits" and not here:
        found = _interpolated(
            found if answer.logits else found.logit(_SURE), height, width, protocol
        ).sigmoid()
    elif answer.logits:
        found = found.sigmoid()
    sharp = found > protocol.cutoff
    if not here and protocol.resized != "logits":
        found = _interpolated(found, height, width, protocol).clamp(0, 1)  # cubic overshoots
        if protocol.resized == "probabilities":
            sharp = found > protocol.cutoff
        else:
            sharp = torch.from_numpy(resize_mask(sharp.cpu().numpy(), height, width))
    return Resized(sharp.cpu().numpy(), found.cpu().numpy())


def _interpolated(found: Tensor, height: int, width: int, protocol: Protocol) -> Tensor:
    options = {"mode": protocol.interpolation, "align_corners": protocol.align_corners}
    return F.interpolate(found[None, None], (height, width), **options)[0, 0]
