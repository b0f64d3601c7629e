"""A global cue for expression tokens that have no [CLS] in front, as those of language models."""

import math
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from metris_blocks.ops.masks import masked_softmax, zero_unless_any
from metris_blocks.ops.shapes import check_axes

Cue = Literal["first", "last", "mean", "learned"]


class GlobalCue(nn.Module):
    """Put a global cue before expression tokens that have no [CLS] in front.

    "last" is the last real token, which has read all others in a decoder-only language model; "mean" is the
    mean of the real tokens; "learned" weights them by the softmax of their product with a learned query,
    which starts at zero, as the mean: ``cue = Σ_l w[l] · Q_L[l]``.

    Example:
        >>> import torch
        >>> cue = GlobalCue(32, "last")
        >>> tokens, mask = cue(torch.randn(2, 5, 32), torch.arange(5) < torch.tensor([[5], [3]]))
        >>> tokens.shape, mask.sum(dim=1).tolist()
        (torch.Size([2, 6, 32]), [6, 4])

    Args:
        language_dim: d, channels of the expression tokens.
        kind: "last", "mean" or "learned".

    Raises:
        ValueError: ``kind`` is none of them.
    """

    def __init__(self, language_dim: int, kind: Cue) -> None:
        super().__init__()
        kinds = get_args(Cue)
        if kind not in kinds[1:]:
            raise ValueError(f"GlobalCue: global_cue must be one of {list(kinds)}, got {kind!r}")
        self.language_dim = language_dim
        self.kind = kind
        self.query = nn.Parameter(torch.zeros(language_dim)) if kind == "learned" else None

    def forward(self, language: Tensor, language_mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Prepend the cue.

        Args:
            language: (b, l, d) tokens.
            language_mask: (b, l) bool; True = real token, padding may be left, right or between.

        Returns:
            (b, 1 + l, d) tokens and (b, 1 + l) bool mask, None where there was none. The cue of a sentence
            without a real token is zero, and masked.
        """
        check_axes(
            "GlobalCue",
            language_dim=(self.language_dim, "d"),
            language=(language, "b l d"),
            language_mask=(language_mask, "b l bool"),
        )
        if language_mask is None:
            real = torch.ones(language.shape[:2], dtype=torch.bool, device=language.device)
        else:
            real = language_mask
            (language,) = zero_unless_any(real, language)
        if self.kind == "last":
            # The only real token that has none behind it.
            weights = real & (real.flip(1).cumsum(dim=1).flip(1) == 1)
        else:
            flat = language.new_zeros(language.shape[-1]) if self.query is None else self.query
            weights = masked_softmax(language @ flat / math.sqrt(language.shape[-1]), real)
        cue = weights.to(language.dtype)[:, None] @ language
        if language_mask is not None:
            language_mask = torch.cat([real.any(dim=1, keepdim=True), real], dim=1)
        return torch.cat([cue, language], dim=1), language_mask
