"""A checkpoint is a folder: weights (safetensors), the resolved config and the tokenizer."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import BertTokenizer

from reference_model.configs import build, read_yaml
from reference_model.files import InputError, written_whole
from reference_model.model.config import ModelConfig
from reference_model.model.metris import METRIS, build_metris
from reference_model.model.text_encoder import load_tokenizer

WEIGHTS, CONFIG, TOKENIZER = "model.safetensors", "config.yaml", "tokenizer"


@dataclass(frozen=True)
class Checkpoint:
    """A model ready to use."""

    model: METRIS
    tokenizer: BertTokenizer
    config: ModelConfig


def pick_device(name: str) -> torch.device:
    """Turn "auto", "cpu", "cuda", "cuda:1" ... into a device.

    Raises:
        InputError: torch does not know it or this machine has none.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        first = str(error).splitlines()[0]
        raise InputError(f"device {name}: cannot be used ({first}); use cpu or auto") from error


def start_checkpoint(folder: Path, config_yaml: str, tokenizer: BertTokenizer) -> None:
    """Write what stays the same during a run: the config (with a section ``model``) and the tokenizer."""
    with written_whole(folder / TOKENIZER) as path:
        tokenizer.save_pretrained(path)
    with written_whole(folder / CONFIG) as path:
        path.write_text(config_yaml, encoding="utf-8")


def save_weights(folder: Path, model: METRIS) -> None:
    """Write or replace the weights of a checkpoint."""
    with written_whole(folder / WEIGHTS) as path:
        try:
            save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, path)
        except SafetensorError as error:
            raise InputError(f"{folder / WEIGHTS}: cannot be written ({error}); make room there") from error
        path.chmod((folder / CONFIG).stat().st_mode)  # safetensors gives the owner alone the right to read


def load_checkpoint(folder: Path, *, device: torch.device | str = "cpu") -> Checkpoint:
    """Load a checkpoint for inference; never fetches anything.

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
    model = build_metris(config)
    try:
        weights = load_file(folder / WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{folder / WEIGHTS}: cannot be read ({error}); copy or train it again") from error
    _refuse_misfit(folder, model.state_dict(), weights)
    model.load_state_dict(weights)
    tokenizer = load_tokenizer(folder / TOKENIZER)
    if len(tokenizer) > config.vocab_size:
        sizes = f"{len(tokenizer)} entries, but {CONFIG} has vocab_size {config.vocab_size}"
        raise InputError(f"{folder / TOKENIZER}: has {sizes}; they are not from one run")
    return Checkpoint(model.to(device).eval(), tokenizer, config)


def _refuse_misfit(folder: Path, wanted: dict[str, torch.Tensor], found: dict[str, torch.Tensor]) -> None:
    for name, tensor in wanted.items():
        if name not in found:
            problem = f"has no weight {name}"
        elif found[name].shape != tensor.shape:
            shapes = f"{tuple(found[name].shape)}, but the config builds {tuple(tensor.shape)}"
            problem = f"weight {name} has shape {shapes}"
        elif tensor.is_floating_point() and not found[name].is_floating_point():
            problem = f"weight {name} is {found[name].dtype}, expected floating point"
        elif not found[name].isfinite().all():
            problem = f"weight {name} is not finite everywhere"
        else:
            continue
        raise InputError(f"{folder / WEIGHTS}: {problem}; take weights and {CONFIG} from one sound run")
    if extra := sorted(found.keys() - wanted.keys()):
        raise InputError(f"{folder / WEIGHTS}: has {len(extra)} weights the config lacks, first {extra[0]}")
