"""Curation in Triton: cosine scores in one pass over the tokens, and the top-r mask by radix select."""

import torch
from torch import Tensor

from metris_blocks.ops.backends.opaque import opaque

# A row of scores lives in the registers of one program.
LONGEST_ROW = 16384


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


def _score_forward(visual: Tensor, language: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    from metris_blocks.ops.backends.triton.kernels import score

    return score.score(visual, language)


def _score_like(visual: Tensor, language: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    (b, n, _), l = visual.shape, language.shape[1]
    scores, visual_norm, language_norm = (
        visual.new_empty(shape, dtype=torch.float32) for shape in ((b, l, n), (b, n), (b, l))
    )
    return scores, visual_norm, language_norm


def _score_backward(
    grad: Tensor,
    scores: Tensor,
    visual: Tensor,
    visual_norm: Tensor,
    language: Tensor,
    language_norm: Tensor,
) -> tuple[Tensor, Tensor]:
    from metris_blocks.ops.backends.triton.kernels import score

    x, y = (visual, visual_norm), (language, language_norm)
    # One kernel gives the gradient of either input: for the visual tokens, the scores are transposed.
    return score.score_backward(grad.mT, scores.mT, *x, *y), score.score_backward(grad, scores, *y, *x)


def _select_forward(scores: Tensor, count: Tensor, visual_mask: Tensor | None) -> Tensor:
    from metris_blocks.ops.backends.triton.kernels import select

    return select.select(scores, count, visual_mask)


def _select_like(scores: Tensor, count: Tensor, visual_mask: Tensor | None) -> Tensor:
    return scores.new_empty(scores.shape, dtype=torch.bool)


_score = opaque(
    "triton_score",
    _score_forward,
    _score_like,
    _score_backward,
    results="scores visual_norm language_norm",
    gradients="visual language",
)
_select = opaque("triton_select", _select_forward, _select_like)
