"""The guidance set: linguistic and visual expression tokens side by side, with one mask (METRIS 3.3)."""

from typing import NamedTuple

import torch
from torch import Tensor

from metris_blocks.ops.masks import zero_unless_any
from metris_blocks.ops.shapes import check_axes


class GuidanceSet(NamedTuple):
    """Tokens for a decoder to attend to, g of them, and which of these take part: ``G = [Q̂_L, Q̂_V]``.

    Example:
        >>> import torch
        >>> words, real = torch.randn(2, 5, 32), torch.arange(5) < torch.tensor([[5], [3]])
        >>> tokens, mask = GuidanceSet.join((words, real), (torch.randn(2, 4, 32), None))
        >>> tokens.shape, mask.sum(dim=1).tolist()
        (torch.Size([2, 9, 32]), [9, 7])

    `masked_attention` and `layers.MultiHeadAttention` take ``mask`` as it is, and so does
    `torch.nn.functional.scaled_dot_product_attention` as ``mask[:, None, None]``;
    `torch.nn.MultiheadAttention` wants ``key_padding_mask=~mask``, and gives NaN where no token takes part:
    let one do, for they are zero.
    """

    tokens: Tensor
    """(b, g, d); zero where ``mask`` is False."""
    mask: Tensor
    """(b, g) bool; True = takes part."""

    @classmethod
    def join(cls, *parts: tuple[Tensor, Tensor | None]) -> "GuidanceSet":
        """Put parts side by side: G = [Q̂_L, Q̂_V], or any others of one width.

        ``GuidanceSet.join((language, language_mask), (expression.tokens, expression.mask))``

        Args:
            parts: Tokens (b, s, d) and their mask (b, s) bool, True = takes part, or None: all do. Tokens
                that take no part may hold anything, NaN too.

        Raises:
            ValueError: There is no part, or batch or width differ between parts.
            TypeError: A mask is not bool.
        """
        if not parts:
            raise ValueError("GuidanceSet.join: needs at least one part, (tokens, mask)")
        axes: dict[str, tuple[Tensor | int | None, str]] = {}
        for i, (part, mask) in enumerate(parts):
            axes |= {f"part_{i}": (part, f"b s{i} d"), f"mask_{i}": (mask, f"b s{i} bool")}
        check_axes("GuidanceSet.join", **axes)
        tokens, masks = [], []
        for part, mask in parts:
            if mask is None:
                mask = torch.ones(part.shape[:2], dtype=torch.bool, device=part.device)
            else:
                (part,) = zero_unless_any(mask, part)
            tokens.append(part)
            masks.append(mask)
        return cls(torch.cat(tokens, dim=1), torch.cat(masks, dim=1))
