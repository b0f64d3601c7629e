"""A checkpoint is a folder: weights (safetensors), the resolved config and the tokenizer."""

import warnings
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from reference_model.configs import build, read_yaml
from reference_model.files import InputError, written_whole
from reference_model.model.build import build_metris
from reference_model.model.config import ModelConfig
from reference_model.model.metris import METRIS
from reference_model.tokens import load_tokenizer

WEIGHTS, CONFIG, TOKENIZER = "model.safetensors", "config.yaml", "tokenizer"
GENERATED = "generated.json"
"""In a checkpoint trained on what `metris generate` made: the settings of that, as beside the data."""

RENAMED = {
    "enhancer.": "guidance.enhancer.",
    "extractor.": "guidance.extractor.",
}
"""How the names of weights began in old checkpoints -> how they begin now; a rename adds its line."""


@dataclass(frozen=True)
class Checkpoint:
    """A model ready to use."""

    model: METRIS
    """Or, of an exported file, `ExportedMetris`, which is called alike."""
    tokenizer: PreTrainedTokenizerBase
    config: ModelConfig

    @property
    def device(self) -> torch.device:
        """Where the model runs."""
        if isinstance(self.model, METRIS):
            return next(self.model.parameters()).device
        return self.model.device


def start_checkpoint(folder: Path, config_yaml: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write what stays the same during a run: the config (with a section ``model``) and the tokenizer."""
    with written_whole(folder / TOKENIZER) as path:
        tokenizer.save_pretrained(path)
    with written_whole(folder / CONFIG) as path:
        path.write_text(config_yaml, encoding="utf-8")


def save_weights(folder: Path, model: METRIS, *, step: int | None = None) -> None:
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


def load_checkpoint(folder: Path, *, device: torch.device | str = "cpu", strict: bool = True) -> Checkpoint:
    """Load a checkpoint for inference; never fetches anything.

    Args:
        folder: What train, `METRIS.save_pretrained` or the Hub gave.
        device: Where the model goes.
        strict: Refuse weights that are missing or that the config has no place for. False: warn, leave the
            missing ones as initialised and the others aside.

    Raises:
        InputError: A part is missing or broken, or the weights do not fit the config.
    """
    missing = [name for name in (CONFIG, WEIGHTS, TOKENIZER) if not (folder / name).exists()]
    if missing:
        raise InputError(
            f"checkpoint {folder}: has no {', '.join(missing)}; give the folder that train wrote"
        )
    config = build(
        ModelConfig,
        read_yaml(folder / CONFIG, ModelConfig, section="model"),
        source=f"{folder / CONFIG}, model",
    )
    # The weights come from the checkpoint itself, whatever the run started from.
    config = replace(config, pretrained=False, image_weights=None, text_weights=None)
    tokenizer = load_tokenizer(folder / TOKENIZER)
    refuse_larger(tokenizer, config, str(folder / TOKENIZER))
    model = build_metris(config)
    weights = load_weights(folder)
    _refuse_misfit(folder / WEIGHTS, model.state_dict(), weights, strict=strict)
    model.load_state_dict(weights, strict=strict)
    model.tokenizer, model.source = tokenizer, folder
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
