"""An image encoded once, and what the model makes of sentences: masks and all on the way to them."""

import copy
from dataclasses import replace
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
from einops import rearrange, reduce
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from reference_model.checkpoints.checkpoint import Checkpoint
from reference_model.data.transforms import probabilities_at
from reference_model.files import InputError
from reference_model.model.metris import METRIS, ImageFeatures, MetrisOutput
from reference_model.tokens import tokenize


class Encoded(NamedTuple):
    """An image with its features, for any number of sentences."""

    image: Image.Image
    """RGB."""
    features: ImageFeatures
    """Of this one image."""


class Explanation(NamedTuple):
    """What the model makes of one sentence; l tokens, special ones among them, no padding."""

    expression: str
    tokens: list[str]
    """l word pieces, the first one the global cue."""
    probability: Tensor
    """(s, s) probability of each pixel of the square that the model sees, before a no-target classifier."""
    logits: Tensor
    """(s, s) of the same."""
    no_target: float | None
    """Probability that nothing is meant; None from a model without that classifier."""
    scores: np.ndarray | None
    """(l, gh, gw) relevance S_c over the square, cosine; None in variants without extractor."""
    curated: np.ndarray | None
    """(l, gh, gw) bool; None with ``scores``."""
    to_language: list[np.ndarray] | None
    """Of each decoder stage, coarse to fine, (l, h_i, w_i): each cell's attention to the LE tokens, mean of
    the heads; None in variants without LE."""
    to_visual: list[np.ndarray] | None
    """The same, (v, h_i, w_i), of the VE tokens; None in variants without. With ``to_language`` they sum to 1
    in each cell."""
    expressed: np.ndarray
    """(l) bool, True for the v words that have a VE token: those that curate something."""

    @property
    def visual_tokens(self) -> list[str]:
        """The v word pieces that have a VE token."""
        return [token for token, has in zip(self.tokens, self.expressed) if has]

    def mask(self, height: int, width: int, *, threshold: float = 0.5) -> np.ndarray:
        """(height, width) bool; where ``no_target`` is above 0.5 the caller may withdraw it."""
        return (probabilities_at(self.logits[None], height, width)[0] > threshold).numpy()

    def confidence(self, *, threshold: float = 0.5) -> float:
        """Mean probability of the pixels inside the mask, 0 to 1; 0 where it is empty."""
        inside = self.probability > threshold
        return float(self.probability[inside].mean()) if inside.any() else 0.0


def encode(checkpoint: Checkpoint, image: Image.Image) -> Encoded:
    """Encode an RGB image of any size; the encoder never sees language, so this is done once."""
    return Encoded(image, checkpoint.encode(image))


def explain(
    checkpoint: Checkpoint, encoded: Encoded, expressions: list[str], *, ratio: float | None = None
) -> list[Explanation]:
    """Refer to an encoded image, sentence by sentence, and keep what happened on the way.

    Args:
        checkpoint: A loaded model.
        encoded: By its own encoder.
        expressions: k sentences.
        ratio: r, share of visual tokens that a word curates, in (0, 1]. None: the model's own.

    Raises:
        InputError: A sentence has no word, or ``ratio`` is out of range or the model curates nothing.
    """
    model = checkpoint.model if ratio is None else with_ratio(checkpoint.model, ratio)
    tokens = tokenize(checkpoint.tokenizer, expressions, checkpoint.config.max_tokens, warn=False)
    output = replace(checkpoint, model=model).refer(encoded.features, expressions, return_maps=True)
    pieces = [[named(checkpoint.tokenizer, i) for i in row.tolist()] for row in tokens.token_ids]
    return [
        _explanation(model, output, row, expression, pieces[row], tokens.language_mask[row])
        for row, expression in enumerate(expressions)
    ]


def with_ratio(model: METRIS, ratio: float) -> METRIS:
    """Give a model of the very same weights that curates another share r; ``model`` itself stays as it is.

    Raises:
        InputError: ``ratio`` is outside of (0, 1], or the model has no extractor.
    """
    if not 0 < ratio <= 1:
        raise InputError(f"ratio: must be in (0, 1], got {ratio:g}; the paper's 30 per cent is 0.3")
    if model.guidance.extractor is None:
        raise InputError(
            "ratio: this model has no visual expression, so that it curates nothing; leave it out"
        )
    # The copy's modules are its own, its parameters and buffers the original's.
    shared = {id(x): x for x in chain(model.guidance.parameters(), model.guidance.buffers())}
    guidance = copy.deepcopy(model.guidance, shared)
    guidance.extractor.curation.ratio = ratio
    return model.with_parts(guidance=guidance)


def unknown_words(checkpoint: Checkpoint, expression: str) -> list[str]:
    """List the words that the model's vocabulary lacks, or can only spell, so that they say little to it."""
    tokenizer = checkpoint.tokenizer
    found = []
    for word in expression.split():
        pieces = tokenizer(word, add_special_tokens=False)["input_ids"]
        spelled = len(pieces) > 1 and all(len(named(tokenizer, i).removeprefix("##")) == 1 for i in pieces)
        if tokenizer.unk_token_id in pieces or spelled:
            found.append(word)
    return found


def named(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    """Give a token as a person reads it: vocabularies have signs of their own for the space beside a word."""
    name = tokenizer.decode([token]).strip()
    # Half a letter decodes to nothing that could be told from another half.
    return tokenizer.convert_ids_to_tokens(token) if not name or "\N{REPLACEMENT CHARACTER}" in name else name


def _explanation(
    model: METRIS, output: MetrisOutput, row: int, expression: str, tokens: list[str], real: Tensor
) -> Explanation:
    real = real.to(output.logits.device)
    length, size = len(real), output.logits.shape[-2:]
    gh, gw = output.grid
    scores = curated = to_language = to_visual = None
    expressed = torch.zeros(length, dtype=torch.bool)
    if output.scores is not None:
        grid = lambda x: _within(rearrange(x[row, real], "l (h w) -> l h w", h=gh, w=gw), output.extent, size)
        scores, curated = grid(output.scores).cpu().numpy(), grid(output.dynamic_mask).cpu().numpy()
    stages = []
    for stage, weights in zip(reversed(model.image_encoder.strides), output.maps):
        maps = reduce(weights[row], "heads h w g -> g h w", "mean")
        extent = (max(maps.shape[1] * stage, size[0]), max(maps.shape[2] * stage, size[1]))
        stages.append(_within(maps, extent, size).float().cpu())
    if model.guidance.language:
        to_language = [maps[:length][real.cpu()].numpy() for maps in stages]
    if model.guidance.extractor is not None:
        expressed = output.dynamic_mask[row].any(dim=-1).cpu()
        to_visual = [maps[-length:][expressed].numpy() for maps in stages]
    logits = output.logits[row].float().cpu()
    absent = None if output.no_target is None else float(output.no_target[row].float().sigmoid())
    kept = [token for token, is_real in zip(tokens, real.tolist()) if is_real]
    return Explanation(
        expression=expression,
        tokens=kept,
        probability=logits.sigmoid(),
        logits=logits,
        no_target=absent,
        scores=scores,
        curated=curated,
        to_language=to_language,
        to_visual=to_visual,
        expressed=expressed[real.cpu()].numpy(),
    )


def _within(maps: Tensor, extent: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Cut (k, h, w) cells that cover ``extent`` pixels to those of the image; as they are where all do."""
    if tuple(extent) == tuple(size):
        return maps
    spread = F.interpolate(maps[None].float(), extent, mode="nearest")[0].to(maps.dtype)
    return spread[:, : size[0], : size[1]]
