"""No-target classifier: does the sentence name anything in the image at all? (METRIS appendix A, gRefCOCO)"""

from torch import Tensor, nn

from reference_model.model.guidance import Guided


class NoTargetHead(nn.Module):
    """MLP on each guidance token, averaged over those that take part, as ReLA does on its queries.

    Args:
        dim: d, channels of the guidance tokens.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, 1))

    def forward(self, guidance: Guided) -> Tensor:
        """Guidance tokens (b, g, d) -> logits (b); > 0 means that there is no target."""
        votes = self.mlp(guidance.tokens)[..., 0].masked_fill(~guidance.mask, 0)
        return votes.sum(dim=1) / guidance.mask.sum(dim=1).clamp_min(1)
