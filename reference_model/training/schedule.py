"""Optimiser and learning rate of the recipe."""

from collections import defaultdict
from collections.abc import Mapping

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR


def adamw(
    module: nn.Module,
    *,
    learning_rate: float,
    weight_decay: float,
    multipliers: Mapping[nn.Module, float] | None = None,
) -> torch.optim.AdamW:
    """AdamW over all parameters that require a gradient; biases, norms and scalars are not decayed.

    Args:
        module: What is trained. A parameter that two of its parts share is there once.
        learning_rate: Of all that no multiplier names.
        weight_decay: Of parameters with two or more axes.
        multipliers: Parts of ``module`` -> what their learning rate is multiplied by.
    """
    factors = {p: factor for part, factor in (multipliers or {}).items() for p in part.parameters()}
    groups: dict[tuple[float, bool], list[nn.Parameter]] = defaultdict(list)
    for p in module.parameters():
        if p.requires_grad:
            groups[factors.get(p, 1.0), p.ndim >= 2].append(p)
    return torch.optim.AdamW(
        [
            {"params": params, "lr": learning_rate * factor, "weight_decay": weight_decay * decayed}
            # Those that are decayed first, as ever: the order of a sum of norms is in its last bit.
            for (factor, decayed), params in sorted(groups.items(), key=lambda group: -group[0][1])
        ],
        lr=learning_rate,
        fused=True,
    )


def polynomial_decay(
    optimiser: torch.optim.Optimizer, *, steps: int, power: float, warmup_steps: int, done: int = 0
) -> LambdaLR:
    """Rise over ``warmup_steps`` and fall to zero as ``(1 - t)^power``, t the share of steps done.

    Args:
        optimiser: Fresh, with each group's learning rate as it is without warm-up at the start.
        steps: Of the whole run.
        power: Of the decay.
        warmup_steps: Of the rise.
        done: Steps that the run did before.
    """

    def factor(step: int) -> float:
        warm = min(1.0, (step + 1) / (warmup_steps + 1))
        return warm * max(0.0, 1 - step / steps) ** power

    for group in optimiser.param_groups:
        group["initial_lr"] = group["lr"]
    return LambdaLR(optimiser, factor, last_epoch=done - 1)
