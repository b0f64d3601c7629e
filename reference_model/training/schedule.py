"""Optimiser and learning rate of the recipe."""

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR


def adamw(modules: list[nn.Module], *, learning_rate: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW over all parameters; biases, norms and scalars are not decayed."""
    # In one list, a parameter that two modules share is there once.
    parameters = [p for p in nn.ModuleList(modules).parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=learning_rate, fused=True)


def polynomial_decay(
    optimiser: torch.optim.Optimizer, *, steps: int, power: float, warmup_steps: int
) -> LambdaLR:
    """Rise over ``warmup_steps`` and fall to zero as ``(1 - t)^power``, t the share of steps done."""

    def factor(step: int) -> float:
        warm = min(1.0, (step + 1) / (warmup_steps + 1))
        return warm * max(0.0, 1 - step / steps) ** power

    return LambdaLR(optimiser, factor)
