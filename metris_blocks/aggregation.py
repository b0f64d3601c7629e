"""Aggregation block: curated visual tokens -> one visual token per expression token."""

from torch import Tensor, nn

from metris_blocks.ops.aggregation import masked_softmax_aggregation
from metris_blocks.ops.backends import CurationBackend
from metris_blocks.ops.shapes import check_axes


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
        divide_by_count: bool = True,
        backend: CurationBackend = "auto",
    ) -> None:
        super().__init__()
        if not temperature > 0:
            raise ValueError(f"MaskedSoftmaxAggregation: temperature must be > 0, got {temperature:g}")
        self.visual_dim = visual_dim
        self.temperature = temperature
        self.divide_by_count = divide_by_count
        self.backend: CurationBackend = backend
        # Eq. 5 leaves c -> d unsaid. Projecting after the average costs l rows instead of n.
        self.proj = nn.Linear(visual_dim, dim)

    def forward(
        self, scores: Tensor, dynamic_mask: Tensor, visual: Tensor, *, assume_finite: bool = False
    ) -> Tensor:
        """Aggregate and project.

        Args:
            scores: (b, l, n) relevance.
            dynamic_mask: (b, l, n) bool; True = curated.
            visual: (b, n, c) tokens.
            assume_finite: As in `masked_softmax_aggregation`.

        Returns:
            (b, l, d).
        """
        check_axes("MaskedSoftmaxAggregation", visual_dim=(self.visual_dim, "c"), visual=(visual, "b n c"))
        aggregated = masked_softmax_aggregation(
            scores,
            dynamic_mask,
            visual,
            temperature=self.temperature,
            divide_by_count=self.divide_by_count,
            assume_finite=assume_finite,
            backend=self.backend,
        )
        out: Tensor = self.proj(aggregated)
        return out
