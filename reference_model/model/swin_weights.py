"""Weights of the original Swin Transformer, for timm's and transformers' Swin.

The files of github.com/microsoft/Swin-Transformer, such as swin_base_patch4_window12_384_22k.pth, hold
``{"model": {...}}``. Against timm, a stage's downsampling belongs to the stage before it; against
transformers, queries, keys and values are one matrix.
"""

import math
import pickle
import re
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.layers import resize_rel_pos_bias_table
from torch import Tensor, nn

from reference_model.files import InputError

# The classifier, the norm before it, and what every implementation computes anew.
_UNUSED = re.compile(r"head\.|norm\.|.*(relative_position_index|attn_mask)$")
# transformers' names, in parts, and the original ones.
_PARTS = {
    "swin.embeddings.patch_embeddings.projection.": "patch_embed.proj.",
    "swin.embeddings.": "patch_embed.",
    "swin.encoder.": "",
    ".attention.relative_position_bias.": ".attn.",
    ".attention.o_proj.": ".attn.proj.",
    ".layernorm_before.": ".norm1.",
    ".layernorm_after.": ".norm2.",
}


def read_original(path: Path) -> dict[str, Tensor] | None:
    """Read a file of the original Swin Transformer; None if its names are another layout's.

    Nothing but tensors and plain containers is unpickled.

    Raises:
        InputError: The file cannot be read.
    """
    try:
        if path.suffix == ".safetensors":
            held = load_file(path)
        else:
            held = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError, SafetensorError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"image_weights {path}: cannot be read ({first}); give a file of weights") from error
    weights = held.get("model", held) if isinstance(held, dict) else None
    if not isinstance(weights, dict) or not all(isinstance(x, Tensor) for x in weights.values()):
        return None
    # timm's first stage has no downsampling, the original's has.
    signs = {
        "patch_embed.proj.weight",
        "layers.0.blocks.0.attn.qkv.weight",
        "layers.0.downsample.norm.weight",
    }
    return weights if signs <= weights.keys() else None


def load_original(backbone: nn.Module, weights: dict[str, Tensor], source: Path) -> None:
    """Fill timm's or transformers' Swin with original weights.

    Tables of relative positions made for another window are resized as timm does. transformers' norms of the
    feature maps are in no such file and stay as initialised; its last norm nobody reads.

    Args:
        backbone: timm's Swin with ``features_only``, or a `SwinBackbone`.
        weights: As from `read_original`.
        source: The file, for messages.

    Raises:
        InputError: A weight is missing, has another shape, or has no place in ``backbone``; names the first.
    """
    fitted, left = {}, {key for key in weights if not _UNUSED.match(key)}
    for name, here in backbone.state_dict().items():
        if name.startswith(("hidden_states_norms.", "swin.layernorm.")):
            continue
        key, third = _original_name(name)
        if key not in weights:
            raise InputError(f"image_weights {source}: lacks {key}; give weights of this image_encoder")
        tensor = weights[key] if third is None else weights[key].chunk(3)[third]
        if key.endswith("relative_position_bias_table"):
            tensor = _for_window_of(here, tensor)
        if tensor.shape != here.shape:
            shapes = f"{tuple(tensor.shape)}, but image_encoder builds {tuple(here.shape)}"
            raise InputError(f"image_weights {source}: {key} has shape {shapes}; give weights of this model")
        fitted[name] = tensor
        left.discard(key)
    if left:
        count = f"{len(left)} weights that image_encoder has no place for, first {min(left)}"
        raise InputError(f"image_weights {source}: holds {count}; give weights of this model")
    backbone.load_state_dict(fitted, strict=False)


def _original_name(name: str) -> tuple[str, int | None]:
    """Name of a timm or transformers weight -> its original name, and which third of that tensor it is."""
    stage = re.match(r"layers_(\d+)\.(.*)", name)
    if stage:
        number, rest = int(stage[1]), stage[2]
        return f"layers.{number - rest.startswith('downsample')}.{rest}", None
    for theirs, original in _PARTS.items():
        name = name.replace(theirs, original)
    third = re.search(r"\.attention\.([qkv])_proj\.", name)
    if third:
        return name.replace(third[0], ".attn.qkv."), "qkv".index(third[1])
    return name, None


def _for_window_of(here: Tensor, table: Tensor) -> Tensor:
    """Resize a table ((2 w - 1)^2, heads) to the window of another one, if both are such tables."""
    side, old = math.isqrt(len(here)), math.isqrt(len(table))
    if table.shape[1:] != here.shape[1:] or side**2 != len(here) or old**2 != len(table):
        return table
    window = (side + 1) // 2
    return resize_rel_pos_bias_table(table, new_window_size=(window, window), new_bias_shape=here.shape)
