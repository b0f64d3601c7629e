"""Aggregation block: curated visual tokens -> one visual token per expression token."""

import math
from functools import partial

import torch
from torch import Tensor, nn

from metris_blocks.ops.aggregation import masked_softmax_aggregation
from metris_blocks.ops.backends import CurationBackend


class MaskedSoftmaxAggregation(nn.Module):
    """Masked-softmax aggregation followed by a projection to the guidance width (METRIS Eq. 5).

    ``F_a[l] = (1/N_p · Σ_n softmax_n(S_c[l] / temperature + M[l])[n] · F_v[n]) W + b``

    Example:
        >>> import torch
        >>> aggregation = MaskedSoftmaxAggregation(visual_dim=64, dim=32)
        >>> scores, dynamic_mask = torch.rand(2, 5, 49), torch.rand(2, 5, 49) > 0.7
        >>> aggregation(scores, dynamic_mask, torch.randn(2, 49, 64)).shape
        torch.Size([2, 5, 32])

    Args:
        visual_dim: c, channels of the visual tokens (1024 for Swin-B stage 4).
        dim: d, channels of the guidance tokens.
        temperature: Divides the scores in the softmax, > 0; 1 is Eq. 5 as printed.
        learn_temperature: Train it, stored as its log, from ``temperature`` on.
        divide_by_count: Keep the 1/N_p of Eq. 5.
        backend: As in `top_r_mask`.

    Raises:
        ValueError: ``temperature`` is not positive.
    """

    def __init__(
        self,
        visual_dim: int,
        dim: int,
        *,
        temperature: float = 1.0,
        learn_temperature: bool = False,
        divide_by_count: bool = True,
        backend: CurationBackend = "auto",
    ) -> None:
        super().__init__()
        if not temperature > 0:
            raise ValueError(f"MaskedSoftmaxAggregation: temperature must be > 0, got {temperature:g}")
        self.temperature = temperature
        self.log_temperature = (
            nn.Parameter(torch.tensor(math.log(temperature))) if learn_temperature else None
        )
        self.divide_by_count = divide_by_count
        self.backend: CurationBackend = backend
        # Eq. 5 leaves c -> d unsaid. Projecting after the average costs l rows instead of n.
        self.proj = nn.Linear(visual_dim, dim)

    def forward(
        self,
        scores: Tensor,
        dynamic_mask: Tensor,
        visual: Tensor,
        *,
        gradient_mask: Tensor | None = None,
        assume_finite: bool = False,
    ) -> Tensor:
        """Aggregate and project.

        Args:
            scores: (b, l, n) relevance.
            dynamic_mask: (b, l, n) bool; True = curated.
            visual: (b, n, c) tokens.
            gradient_mask: (b, l, n) bool; the scores' gradient is as if these were curated, straight through;
                values and other gradients stay those of ``dynamic_mask``. None: ``dynamic_mask``.
            assume_finite: As in `masked_softmax_aggregation`.

        Returns:
            (b, l, d).
        """
        temperature = self.temperature
        if self.log_temperature is not None:
            scores, temperature = scores / self.log_temperature.exp(), 1.0
        aggregate = partial(
            masked_softmax_aggregation,
            temperature=temperature,
            divide_by_count=self.divide_by_count,
            assume_finite=assume_finite,
            backend=self.backend,
        )
        if gradient_mask is None:
            aggregated = aggregate(scores, dynamic_mask, visual)
        else:
            soft = aggregate(scores, gradient_mask, visual.detach())
            aggregated = aggregate(scores.detach(), dynamic_mask, visual) + (soft - soft.detach())
        out: Tensor = self.proj(aggregated)
        return out
