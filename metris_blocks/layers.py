"""What blocks share: multi-head attention, the feed-forward net, and the layer made of both."""

import math
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor, nn

from metris_blocks.ops.absorption import absorbed_attention, absorbs
from metris_blocks.ops.attention import masked_attention
from metris_blocks.ops.backends import Backend
from metris_blocks.ops.masks import masked_softmax, per_row
from metris_blocks.ops.shapes import at_least_float32, check_axes

Norm = Literal["pre", "none"]


class MultiHeadAttention(nn.Module):
    """Multi-head attention from ``dim``-wide queries to ``context_dim``-wide keys and values.

    ``MHA = concat_h(softmax(Q_h K_hᵀ/√e + M) V_h) W + b``; Q is of ``x``, K and V of ``context``,
    and e = dim / heads.

    Example:
        >>> import torch
        >>> attention = MultiHeadAttention(32, 64, num_heads=4)
        >>> attention(torch.randn(2, 5, 32), torch.randn(2, 49, 64), torch.rand(2, 49) > 0.5).shape
        torch.Size([2, 5, 32])

    With ``backend="auto"`` the key and value projections are absorbed (`absorbed_attention`) whenever that
    takes fewer multiply-adds (`absorbs`); the parameters and the result are the same either way. Projections
    that are more than an `nn.Linear` (LoRA, quantised, pruned, hooked) are called, never absorbed.

    Args:
        dim: Channels of queries and output; a multiple of ``num_heads``.
        context_dim: Channels of what is attended to.
        num_heads: Number of heads.
        dropout: Probability of zeroing an output channel, in [0, 1).
        backend: As in `masked_attention`.
    """

    def __init__(
        self,
        dim: int,
        context_dim: int,
        *,
        num_heads: int = 8,
        dropout: float = 0.0,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        if num_heads < 1 or dim < 1 or dim % num_heads:
            raise ValueError(f"MultiHeadAttention: dim={dim} is not a multiple of num_heads={num_heads}")
        self.num_heads = num_heads
        self.backend: Backend = backend
        self.q_proj = nn.Linear(dim, dim)
        # A key bias adds the same number to all logits of a row, and cancels in the softmax.
        self.k_proj = nn.Linear(context_dim, dim, bias=False)
        self.v_proj = nn.Linear(context_dim, dim)
        self.out_proj = nn.Linear(dim, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attend; all inputs are finite.

        Args:
            x: (b, l, dim) tokens that ask.
            context: (b, n, context_dim) tokens that are attended to.
            mask: (b, l, n) bool, or (b, n) for all l alike; True = takes part. None: all do.

        Returns:
            (b, l, dim).
        """
        attend = self._absorbed if self._absorbs(x, context) else self._projected
        out: Tensor = self.dropout(self.out_proj(attend(x, context, mask)))
        return out

    def attention_map(self, x: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        """Give the softmax weights that ``forward`` uses and no kernel returns: (b, heads, l, n).

        Computed anew, in at least float32; rows that attend to nothing are zero.
        """
        axes = {"x": (x, "b l dim"), "context": (context, "b n context_dim")}
        check_axes("attention_map", **axes, mask=(mask, "b l n | b n bool"))
        query, key = (
            rearrange(at_least_float32(proj(tokens)), "b s (heads e) -> b heads s e", heads=self.num_heads)
            for proj, tokens in ((self.q_proj, x), (self.k_proj, context))
        )
        with torch.autocast(x.device.type, enabled=False):
            logits = query @ key.mT / math.sqrt(query.shape[-1])
        return masked_softmax(logits, None if mask is None else per_row(mask, x.shape[1])[:, None])

    def _absorbs(self, x: Tensor, context: Tensor) -> bool:
        if self.backend != "auto":
            return False
        (l, o), (n, c) = x.shape[1:], context.shape[1:]
        cheaper = absorbs(l, n, c, o, self.num_heads)
        if torch.compiler.is_exporting():
            # A program is exported once for all sizes: it absorbs where all of them gain, and asks none.
            from torch.fx.experimental.symbolic_shapes import statically_known_true

            cheaper = statically_known_true(cheaper)
        return cheaper and all(_is_plain(part) for part in (self.q_proj, self.k_proj, self.v_proj))

    def _projected(self, x: Tensor, context: Tensor, mask: Tensor | None) -> Tensor:
        query, key, value = (
            rearrange(proj(tokens), "b s (heads e) -> b s heads e", heads=self.num_heads)
            for proj, tokens in ((self.q_proj, x), (self.k_proj, context), (self.v_proj, context))
        )
        out = masked_attention(query, key, value, mask, assume_finite=True, backend=self.backend)
        return rearrange(out, "b l heads e -> b l (heads e)")

    def _absorbed(self, x: Tensor, context: Tensor, mask: Tensor | None) -> Tensor:
        return absorbed_attention(
            x,
            context,
            mask,
            self.q_proj.weight,
            self.k_proj.weight,
            self.v_proj.weight,
            num_heads=self.num_heads,
            query_bias=self.q_proj.bias,
            value_bias=self.v_proj.bias,
            assume_finite=True,
        )


def _is_plain(proj: nn.Module) -> bool:
    """Tell whether a projection is its weight and bias alone, so that those may be used without calling it.

    A guest may have put LoRA, a quantised layer, pruning or hooks there; absorbing would pass over them.
    """
    hooks = proj._forward_hooks or proj._forward_pre_hooks or proj._backward_hooks or proj._backward_pre_hooks
    # Weights that wrap other tensors, quantised or sharded ones, know how to be multiplied, and little else.
    # accelerate's hooks put another forward on the instance.
    own = "forward" not in vars(proj)
    return type(proj) is nn.Linear and own and not hooks and not hasattr(proj.weight, "__tensor_flatten__")


class FeedForward(nn.Sequential):
    """Two linear layers with GELU between: the MLP of METRIS Eq. 6-7. (..., dim) -> (..., dim).

    Args:
        dim: Channels in and out.
        mlp_ratio: Hidden channels per channel; the paper does not say, 4 is the Transformer's.
        dropout: Probability of zeroing an output channel, in [0, 1).
    """

    def __init__(self, dim: int, *, mlp_ratio: float = 4.0, dropout: float = 0.0) -> None:
        hidden = int(dim * mlp_ratio)
        if hidden < 1:
            raise ValueError(f"FeedForward: mlp_ratio={mlp_ratio:g} leaves no channel of dim={dim}")
        super().__init__(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim), nn.Dropout(dropout))


class AttentionLayer(nn.Module):
    """Attention and MLP, each added to its input: the form that METRIS Eq. 6 and Eq. 7 share.

    ``x̂ = MHA(x, context, mask) + x``, then ``MLP(x̂) + x̂``.

    Example:
        >>> import torch
        >>> layer = AttentionLayer(32, num_heads=4)
        >>> layer(torch.randn(2, 5, 32), mask=torch.rand(2, 5, 5) > 0.5).shape
        torch.Size([2, 5, 32])

    Args:
        dim: Channels of ``x`` and of the result.
        context_dim: Channels of the context. None: self-attention, the context is ``x`` itself.
        num_heads: Number of heads.
        mlp_ratio: Hidden channels of the MLP per channel.
        dropout: Probability of zeroing a channel that attention or MLP adds, in [0, 1).
        norm: "pre" normalises ``x`` before attention and before the MLP; "none" is the equations to the
            letter.
        backend: As in `masked_attention`.
    """

    def __init__(
        self,
        dim: int,
        context_dim: int | None = None,
        *,
        num_heads: int = 8,
        mlp_ratio: float = 4.0,
        dropout: float = 0.0,
        norm: Norm = "pre",
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        if norm not in ("pre", "none"):
            raise ValueError(f"AttentionLayer: norm must be 'pre' or 'none', got {norm!r}")
        if not 0 <= dropout < 1:
            raise ValueError(f"AttentionLayer: dropout must be in [0, 1), got {dropout:g}")
        width = dim if context_dim is None else context_dim
        self.attention_norm = nn.LayerNorm(dim) if norm == "pre" else nn.Identity()
        self.attention = MultiHeadAttention(dim, width, num_heads=num_heads, dropout=dropout, backend=backend)
        self.mlp_norm = nn.LayerNorm(dim) if norm == "pre" else nn.Identity()
        self.mlp = FeedForward(dim, mlp_ratio=mlp_ratio, dropout=dropout)

    def forward(self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Attend, then the MLP; all inputs are finite.

        Args:
            x: (b, l, dim) tokens.
            context: (b, n, context_dim) tokens that are attended to. None: ``x``, n = l.
            mask: (b, l, n) bool, or (b, n) for all l alike; True = takes part. None: all do.

        Returns:
            (b, l, dim).
        """
        normed = self.attention_norm(x)
        x = x + self.attention(normed, normed if context is None else context, mask)
        out: Tensor = x + self.mlp(self.mlp_norm(x))
        return out

    def attention_map(self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Give the weights of this layer's attention, (b, heads, l, n), for the inputs of ``forward``."""
        normed = self.attention_norm(x)
        return self.attention.attention_map(normed, normed if context is None else context, mask)
