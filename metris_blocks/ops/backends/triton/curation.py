"""Curation in Triton: cosine scores in one pass over the tokens, and the top-r mask by radix select."""

from typing import Any

import torch
from torch import Tensor

# A row of scores lives in the registers of one program.
_LONGEST_ROW = 16384


def relevance(visual: Tensor, language: Tensor) -> Tensor:
    """(b, n, j), (b, l, j) -> cosines (b, l, n) float32."""
    scores: Tensor = _score(visual, language)[0]
    return scores


def select(scores: Tensor, count: Tensor, visual_mask: Tensor | None) -> Tensor:
    """(b, l, n), (b) int, (b, n) bool or None -> (b, l, n) bool, the count[b] largest among the real tokens.

    Equal scores are kept from the lowest index up, NaN ranks above every number; ``count`` must not exceed
    the number of real tokens.
    """
    kept: Tensor = _select(scores.detach(), count, visual_mask)
    return kept


def select_reasons(scores: Tensor) -> list[str]:
    """Say why `select` cannot take these scores, beyond what `triton.reasons` says."""
    n = scores.shape[-1]
    return [f"n={n} (at most {_LONGEST_ROW})"] if n > _LONGEST_ROW else []


@torch.library.custom_op("metris_blocks::triton_score", mutates_args=())
def _score(visual: Tensor, language: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    from metris_blocks.ops.backends.triton.kernels import score

    return score.score(visual, language)


@_score.register_fake
def _score_shapes(visual: Tensor, language: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    (b, n, _), l = visual.shape, language.shape[1]
    scores, visual_norm, language_norm = (
        visual.new_empty(shape, dtype=torch.float32) for shape in ((b, l, n), (b, n), (b, l))
    )
    return scores, visual_norm, language_norm


# The gradient of either input: both tensors of scores are passed transposed for the visual tokens.
@torch.library.custom_op("metris_blocks::triton_score_backward", mutates_args=())
def _score_backward(
    grad: Tensor, scores: Tensor, own: Tensor, own_norm: Tensor, other: Tensor, other_norm: Tensor
) -> Tensor:
    from metris_blocks.ops.backends.triton.kernels import score

    return score.score_backward(grad, scores, own, own_norm, other, other_norm)


@_score_backward.register_fake
def _score_backward_shapes(
    grad: Tensor, scores: Tensor, own: Tensor, own_norm: Tensor, other: Tensor, other_norm: Tensor
) -> Tensor:
    return own.new_empty(own.shape)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, *output)


def _differentiate(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, Tensor | None]:
    visual, language, scores, visual_norm, language_norm = ctx.saved_tensors
    x, y = (visual, visual_norm), (language, language_norm)
    for_visual, for_language = ctx.needs_input_grad
    return (
        _score_backward(grad.mT, scores.mT, *x, *y) if for_visual else None,
        _score_backward(grad, scores, *y, *x) if for_language else None,
    )


_score.register_autograd(_differentiate, setup_context=_save)


@torch.library.custom_op("metris_blocks::triton_select", mutates_args=())
def _select(scores: Tensor, count: Tensor, visual_mask: Tensor | None) -> Tensor:
    from metris_blocks.ops.backends.triton.kernels import select

    return select.select(scores, count, visual_mask)


@_select.register_fake
def _select_shapes(scores: Tensor, count: Tensor, visual_mask: Tensor | None) -> Tensor:
    return scores.new_empty(scores.shape, dtype=torch.bool)
