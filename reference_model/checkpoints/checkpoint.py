"""A checkpoint is a folder: weights (safetensors), the resolved config and the tokenizer."""

import os
import warnings
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from reference_model.checkpoints.config import CONFIG as CONFIG
from reference_model.checkpoints.config import TOKENIZER as TOKENIZER
from reference_model.checkpoints.config import WEIGHTS as WEIGHTS
from reference_model.checkpoints.config import refuse_incomplete
from reference_model.configs import build, read_yaml
from reference_model.data.images import rgb_image
from reference_model.data.transforms import image_pixels, probabilities_at
from reference_model.files import InputError, written_whole
from reference_model.model.build import build_metris
from reference_model.model.config import ModelConfig
from reference_model.model.metris import ImageFeatures, MetrisOutput
from reference_model.tokens import load_tokenizer, tokenize

GENERATED = "generated.json"
"""In a checkpoint trained on what `metris generate` made: the settings of that, as beside the data."""

RENAMED = {
    "enhancer.": "guidance.enhancer.",
    "extractor.": "guidance.extractor.",
}
"""How the names of weights began in old checkpoints -> how they begin now; a rename adds its line."""

LEARNED_TEMPERATURE = "guidance.extractor.aggregation.log_temperature"
"""In old checkpoints: the logarithm of what is now the config's ``aggregation_temperature``."""


class Referrer(Protocol):
    """What a checkpoint holds: METRIS, or an exported program that is called alike."""

    @property
    def device(self) -> torch.device:
        """Where it runs."""

    def encode_image(self, image: Tensor) -> ImageFeatures:
        """(u, 3, s, s) uint8 -> features, once for any number of sentences."""

    def refer(
        self, features: ImageFeatures, token_ids: Tensor, language_mask: Tensor, image_index: Tensor, /
    ) -> MetrisOutput:
        """Refer to encoded images; axes as `METRIS.refer` has them."""


class Prediction(NamedTuple):
    """What `Checkpoint.predict` finds for k sentences about one image of h x w pixels."""

    masks: np.ndarray
    """(k, h, w) bool."""
    probabilities: np.ndarray
    """(k, h, w) float32, probability that a pixel belongs to the mask, before a no-target classifier."""
    no_target: np.ndarray | None
    """(k) float32, probability that the image holds nothing of the kind; None without that classifier."""
    scores: np.ndarray | None
    """(k, l, rows, columns) relevance S_c of each token, cosine, token 0 the global cue's; None in variants
    without extractor. Rows of padding are zeros."""
    curated: np.ndarray | None
    """(k, l, rows, columns) bool, the visual tokens that each word curates; None with ``scores``."""


@dataclass(frozen=True)
class Checkpoint:
    """A model ready to use, with its tokenizer and its config."""

    model: Referrer
    tokenizer: PreTrainedTokenizerBase
    config: ModelConfig

    @property
    def device(self) -> torch.device:
        """Where the model runs."""
        return self.model.device

    @torch.inference_mode()
    def encode(self, image: Image.Image | np.ndarray | str | Path) -> ImageFeatures:
        """Encode one image of any size; the encoder never sees language, so this serves all sentences."""
        pixels = image_pixels(rgb_image(image), self.config.image_size)
        return self.model.encode_image(pixels[None].to(self.device))

    @torch.inference_mode()
    def refer(self, features: ImageFeatures, sentences: Sequence[str], **options: bool) -> MetrisOutput:
        """Refer to an encoded image.

        Args:
            features: Of one image, from `encode`.
            sentences: k of them.
            options: ``return_maps`` of `METRIS.refer`.

        Raises:
            InputError: A sentence has no word.
        """
        token_ids, language_mask = tokenize(self.tokenizer, sentences, self.config.max_tokens)
        index = torch.zeros(len(sentences), dtype=torch.long, device=self.device)
        ids, mask = token_ids.to(self.device), language_mask.to(self.device)
        return self.model.refer(features, ids, mask, index, **options)

    def predict(
        self,
        image: Image.Image | np.ndarray | str | Path,
        sentences: Sequence[str],
        *,
        threshold: float = 0.5,
        no_target_threshold: float = 0.5,
        return_scores: bool = False,
    ) -> np.ndarray | Prediction:
        """Predict the mask of each sentence at the image's own size; the image is encoded once.

        Args:
            image: A path, a Pillow image, or an array as `rgb_image` takes it; of any size.
            sentences: k of them, such as ``["the red boat", "the boat on the left"]``.
            threshold: Probability above which a pixel belongs to the mask, in (0, 1).
            no_target_threshold: Probability of "no target" above which a mask is empty, in (0, 1).
            return_scores: Return all of `Prediction`.

        Returns:
            (k, h, w) bool masks, or a `Prediction`.

        Raises:
            InputError: The image cannot be used, a sentence has no word, or a threshold is out of range.
        """
        for name, value in (("threshold", threshold), ("no_target_threshold", no_target_threshold)):
            if not 0 < value < 1:
                raise InputError(name, f"must be in (0, 1), got {value:g}", "0.5 is usual")
        image = rgb_image(image)
        output = self.refer(self.encode(image), sentences)
        probabilities = probabilities_at(output.logits, image.height, image.width)
        masks = probabilities > threshold
        absent = None
        if output.no_target is not None:
            absent = output.no_target.float().sigmoid()
            masks &= (absent <= no_target_threshold)[:, None, None]
        if not return_scores:
            return masks.cpu().numpy()
        grid = lambda x: None if x is None else x.unflatten(-1, output.grid)
        rest = (masks, probabilities, absent, grid(output.scores), grid(output.dynamic_mask))
        return Prediction(*(None if x is None else x.cpu().numpy() for x in rest))


def start_checkpoint(folder: Path, config_yaml: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write what stays the same during a run: the config (with a section ``model``) and the tokenizer."""
    with written_whole(folder / TOKENIZER) as path:
        tokenizer.save_pretrained(path)
    with written_whole(folder / CONFIG) as path:
        path.write_text(config_yaml, encoding="utf-8")


def save_weights(folder: Path, model: nn.Module, *, step: int | None = None) -> None:
    """Write or replace the weights of a checkpoint, with the step that they are of."""
    metadata = {} if step is None else {"step": str(step)}
    with written_whole(folder / WEIGHTS) as path:
        try:
            weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
            save_file(weights, path, metadata)
        except SafetensorError as error:
            raise InputError(f"{folder / WEIGHTS}: cannot be written ({error}); make room there") from error
        path.chmod((folder / CONFIG).stat().st_mode)  # safetensors gives the owner alone the right to read


def step_of_weights(folder: Path) -> int | None:
    """Tell which step the weights of a checkpoint are of; None where there are none, or it does not say."""
    try:
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            return int((file.metadata() or {})["step"])
    except (SafetensorError, OSError, KeyError, ValueError):
        return None


def load_weights(folder: Path) -> dict[str, Tensor]:
    """Read the weights of a checkpoint, under the names of today.

    Raises:
        InputError: The file cannot be read, or mixes names of today with older ones.
    """
    try:
        weights = load_file(folder / WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{folder / WEIGHTS}: cannot be read ({error}); copy or train it again") from error
    for old, new in RENAMED.items():
        renamed = [name for name in weights if name.startswith(old)]
        today = [name for name in weights if name.startswith(new)]
        if renamed and today:
            both = f"{_few(today)} and, under the old name of {new}*, {_few(renamed)}"
            raise InputError(f"{folder / WEIGHTS}: holds {both}; take the weights of one sound run")
        for name in renamed:
            weights[new + name.removeprefix(old)] = weights.pop(name)
    return weights


def load_checkpoint(
    source: str | os.PathLike[str],
    *,
    device: torch.device | str = "cpu",
    strict: bool = True,
) -> Checkpoint:
    """Load the folder of a checkpoint for inference; never fetches anything.

    Args:
        source: What train, `METRIS.save_pretrained` or the Hub gave.
        device: Where the model goes.
        strict: Refuse weights that are missing or that the config has no place for. False: warn, leave the
            missing ones as initialised and the others aside.

    Raises:
        InputError: A part is missing or broken, or the weights do not fit the config.
    """
    folder = Path(source)
    refuse_incomplete(folder)
    config = build(
        ModelConfig,
        read_yaml(folder / CONFIG, ModelConfig, section="model"),
        source=f"{folder / CONFIG}, model",
    )
    # The weights come from the checkpoint itself, whatever the run started from.
    config = replace(config, pretrained=False, image_weights=None, text_weights=None)
    tokenizer = load_tokenizer(folder / TOKENIZER)
    refuse_larger(tokenizer, config, str(folder / TOKENIZER))
    weights = load_weights(folder)
    learned = weights.get(LEARNED_TEMPERATURE)
    if learned is not None and learned.shape == () and learned.isfinite():
        config = replace(config, aggregation_temperature=float(weights.pop(LEARNED_TEMPERATURE).exp()))
    model = build_metris(config)
    _refuse_misfit(folder / WEIGHTS, model.state_dict(), weights, strict=strict)
    model.load_state_dict(weights, strict=strict)
    return Checkpoint(model.to(device).eval(), tokenizer, config)


def refuse_larger(tokenizer: PreTrainedTokenizerBase, config: ModelConfig, source: str) -> None:
    """Refuse a tokenizer with ids that the text encoder of a config lacks."""
    if len(tokenizer) > config.vocab_size:
        sizes = f"{len(tokenizer)} entries, but the model has vocab_size {config.vocab_size}"
        raise InputError(f"{source}: the tokenizer has {sizes}; take both from one run")


def _refuse_misfit(file: Path, wanted: dict[str, Tensor], found: dict[str, Tensor], *, strict: bool) -> None:
    missing = [name for name in wanted if name not in found]
    extra = [name for name in found if name not in wanted]
    problems = [f"lacks {len(missing)} of {len(wanted)} weights ({_few(missing)})"] * bool(missing)
    problems += [f"has {len(extra)} that the config has no place for ({_few(extra)})"] * bool(extra)
    if problems and strict:
        steps = f"take weights and {CONFIG} from one sound run, or load what fits with strict=False"
        raise InputError(f"{file}: {' and '.join(problems)}; {steps}")
    for name in (name for name in wanted if name in found):
        tensor = found[name]
        if tensor.shape != wanted[name].shape:
            shapes = f"{tuple(tensor.shape)}, but the config builds {tuple(wanted[name].shape)}"
            problem = f"has shape {shapes}"
        elif wanted[name].is_floating_point() and not tensor.is_floating_point():
            problem = f"is {tensor.dtype}, expected floating point"
        elif not tensor.isfinite().all():
            problem = "is not finite everywhere"
        else:
            continue
        raise InputError(f"{file}: weight {name} {problem}; take weights and {CONFIG} from one sound run")
    if problems:
        rest = "; the lacking ones stay as initialised, the others are left aside"
        warnings.warn(f"{file}: {' and '.join(problems)}{rest}", stacklevel=3)


def _few(names: Collection[str], most: int = 3) -> str:
    return ", ".join([*list(names)[:most], *["..."] * (len(names) > most)])
