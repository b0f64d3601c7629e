"""Image encoder: any timm model with feature maps, or transformers' Swin; normalised maps, fine to coarse."""

import pickle
import re
from pathlib import Path
from typing import Any

import timm
import torch
from einops import rearrange
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import SwinBackbone, SwinConfig

from reference_model.files import InputError, one_line
from reference_model.model.swin_weights import load_original, read_original

TRANSFORMERS = "transformers/"
"""How the names of transformers' models begin; all others are timm's."""

_SWIN_SIZES = {
    "tiny": {"embed_dim": 96, "depths": [2, 2, 6, 2], "num_heads": [3, 6, 12, 24]},
    "small": {"embed_dim": 96, "depths": [2, 2, 18, 2], "num_heads": [3, 6, 12, 24]},
    "base": {"embed_dim": 128, "depths": [2, 2, 18, 2], "num_heads": [4, 8, 16, 32]},
    "large": {"embed_dim": 192, "depths": [2, 2, 18, 2], "num_heads": [6, 12, 24, 48]},
}
# Not those that tie it to one image size or are for other tasks.
_SWIN_OPTIONS = [
    *("patch_size", "embed_dim", "depths", "num_heads", "window_size", "mlp_ratio", "qkv_bias", "hidden_act"),
    *("hidden_dropout_prob", "attention_probs_dropout_prob", "drop_path_rate", "initializer_range"),
    "layer_norm_eps",
]
_STAGES = [f"stage{i}" for i in (1, 2, 3, 4)]
_REFUSALS = (OSError, EOFError, pickle.UnpicklingError, SafetensorError, StrictDataclassError)


class ImageEncoder(nn.Module):
    """Four feature maps F_1..F_4 of an image (METRIS 3.1); it never sees language.

    Any image size works with Swin, timm's or transformers', and with convolutional networks. The image is
    padded with zeros, right and bottom: for Swin to whole patches of 4 pixels, and inside, its maps are
    padded so, to whole windows and to even sizes; for convolutional networks, some of which would not see
    the last rows, to whole cells of the coarsest map. Map i has ceil(h / stride_i) rows, or a few more. A
    model for one size, such as a ViT without ``dynamic_img_size``, refuses others.

    Args:
        name: timm model, such as "swin_base_patch4_window12_384.ms_in22k", or transformers' Swin, such as
            "transformers/microsoft/swin-base-patch4-window12-384-in22k". Where a window is padded (stage 4 at
            480 px), transformers pads, then rolls, as the original does; timm rolls, then pads.
        image_size: Side of the input in pixels; timm's encoders with fixed windows are built for it.
        coordinates: Add a learned linear map of a cell's (x, y) in [-1, 1] to each map, so that "left" can be
            seen; without it position is known from the borders alone.
        pretrained: Fetch the weights of ``name``.
        weights: Local weights, instead of fetching: a file of timm's, a folder of transformers', or for
            either Swin a file of the original Swin Transformer.
        options: Further keyword arguments for `timm.create_model` or `transformers.SwinConfig`, such as
            ``{"window_size": 15}``, with which no window is padded at 480 px.

    Raises:
        InputError: The model or an option is unknown, or the weights cannot be had or do not fit.
    """

    def __init__(
        self,
        name: str,
        *,
        image_size: int,
        coordinates: bool = False,
        pretrained: bool = False,
        weights: Path | None = None,
        options: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.name = name
        self.options: dict[str, Any] = dict(options or {})
        """What builds this encoder again, wherever its weights came from: ``options`` as given above."""
        if name.startswith(TRANSFORMERS):
            self.backbone = _transformers_swin(name, self.options, pretrained=pretrained, weights=weights)
            config = self.backbone.config
            self.options = {key: getattr(config, key) for key in _SWIN_OPTIONS}
            self.channels: list[int] = self.backbone.channels
            self.strides: list[int] = [config.patch_size * 2**i for i in range(4)]
            self.channels_last = False
            self.norms = nn.ModuleList()  # SwinBackbone has its own
        else:
            self.backbone = _timm_model(
                name, image_size, self.options, pretrained=pretrained, weights=weights
            )
            # Four stages; some families give a fifth map, finer than the paper's.
            self.channels = self.backbone.feature_info.channels()[-4:]
            self.strides = self.backbone.feature_info.reduction()[-4:]
            self.channels_last = getattr(self.backbone, "output_fmt", "NCHW") == "NHWC"
            # timm's feature maps come unnormalised; LAVT and transformers' SwinBackbone add a norm per stage.
            self.norms = nn.ModuleList(nn.LayerNorm(c) for c in self.channels)
        self.image_size = image_size
        whole = 1 if name.startswith(TRANSFORMERS) else self.strides[-1]
        self.patch = _patch(self.backbone) or (whole, whole)
        self.coordinates = nn.ModuleList(nn.Linear(2, c) for c in self.channels if coordinates)

    def forward(self, image: Tensor) -> list[Tensor]:
        """(b, 3, h, w), ImageNet-normalised -> maps (b, c_i, h_i, w_i), fine to coarse.

        Raises:
            InputError: The encoder cannot take this image size.
        """
        maps = self._maps(image)
        if not self.channels_last:
            maps = [rearrange(x, "b c h w -> b h w c") for x in maps]
        if self.norms:
            maps = [norm(x) for norm, x in zip(self.norms, maps, strict=True)]
        if self.coordinates:
            maps = [x + place(_cell_centres(x)) for place, x in zip(self.coordinates, maps, strict=True)]
        return [rearrange(x, "b h w c -> b c h w") for x in maps]

    def _maps(self, image: Tensor) -> list[Tensor]:
        """The backbone's own maps of an image (b, 3, h, w)."""
        h, w = image.shape[-2:]
        rows, columns = self.patch
        if h % rows or w % columns:
            # Zero is the mean colour, and what Swin itself pads with.
            image = F.pad(image, (0, -w % columns, 0, -h % rows))
        try:
            maps = self.backbone(image)
        except (RuntimeError, AssertionError) as error:
            if h == w == self.image_size or isinstance(error, torch.OutOfMemoryError):
                raise
            raise InputError(
                f"image_encoder {self.name}: cannot take an image of {h}x{w} ({one_line(error)}); "
                f"resize it to {self.image_size}x{self.image_size}, or set another image_size"
            ) from error
        return list(maps.feature_maps if self.name.startswith(TRANSFORMERS) else maps)[-4:]


def _timm_model(
    name: str, image_size: int, options: dict[str, Any], *, pretrained: bool, weights: Path | None
) -> nn.Module:
    # Only for Swin is there another reader of files than timm.
    original = read_original(weights) if weights is not None and name.startswith("swin_") else None
    overlay = {} if weights is None else {"pretrained_cfg_overlay": {"file": str(weights)}}
    load = pretrained or weights is not None
    state = torch.random.get_rng_state()
    try:
        options = _sized(name, image_size, options)
        if original is not None:
            model = timm.create_model(name, features_only=True, **options)
        else:
            model = timm.create_model(name, pretrained=load, features_only=True, **options, **overlay)
    except (RuntimeError, TypeError, ValueError, AssertionError, LookupError, *_REFUSALS) as error:
        source = weights or ("timm's own weights" if pretrained else "no weights")
        raise InputError(
            f"image_encoder {name}: timm cannot build it from {source} with {options}: {one_line(error)}"
        ) from error
    if original is not None:
        load_original(model, original, weights)
    elif weights is not None:
        # timm passes over what a file lacks. A matrix that is as it was drawn has not been in the file.
        torch.random.set_rng_state(state)
        drawn = timm.create_model(name, features_only=True, **options).state_dict()
        matrices = {key: x for key, x in model.state_dict().items() if x.ndim > 1 and x.is_floating_point()}
        kept = [key for key, x in matrices.items() if x.equal(drawn[key]) and x.any()]
        if kept:
            count = f"{len(kept)} of its {len(matrices)} weight matrices, first {kept[0]}"
            raise InputError(f"image_encoder {name}: {weights} lacks {count}; give weights of this model")
    return model


def _sized(name: str, image_size: int, options: dict[str, Any]) -> dict[str, Any]:
    """Add what timm must know of the image size where a model is built for one."""
    # None for a name that timm does not know; what it says to that comes later.
    known = timm.get_pretrained_cfg(name, allow_unregistered=True)
    if known is not None and known.fixed_input_size:
        options = {"img_size": image_size, **options}
    if name.startswith("swin"):
        # Window tables and shift masks depend on the size; 480 is not a multiple of 32 x window 12.
        options = {"strict_img_size": False, **options}
    return options


def _transformers_swin(
    name: str, options: dict[str, Any], *, pretrained: bool, weights: Path | None
) -> SwinBackbone:
    for key in options:
        if key not in _SWIN_OPTIONS:
            known = ", ".join(_SWIN_OPTIONS)
            raise InputError(f"image_encoder_options: transformers' Swin has no {key}; it has {known}")
    try:
        if weights is not None and not weights.is_dir():
            original = read_original(weights)
            if original is None:
                raise InputError(
                    f"image_encoder {name}: {weights} is not laid out as the original Swin Transformer's "
                    "files; give such a file, or a folder of transformers'"
                )
            model = SwinBackbone(_swin_config(name, options))
            load_original(model, original, weights)
        elif pretrained or weights is not None:
            model = _fetched_swin(name, options, weights)
        else:
            model = SwinBackbone(_swin_config(name, options))
    except InputError:
        raise
    except (RuntimeError, ValueError, TypeError, ArithmeticError, LookupError, *_REFUSALS) as error:
        source = weights or ("its own weights" if pretrained else "no weights")
        raise InputError(
            f"image_encoder {name}: transformers cannot build it from {source} with {options}: "
            f"{one_line(error)}"
        ) from error
    # Nothing reads the last norm, and parameters without gradient break distributed training.
    model.swin.layernorm = nn.Identity()
    return model


def _fetched_swin(name: str, options: dict[str, Any], folder: Path | None) -> SwinBackbone:
    model, report = SwinBackbone.from_pretrained(
        folder or name.removeprefix(TRANSFORMERS),
        out_features=_STAGES,
        dtype=torch.float32,
        local_files_only=folder is not None,
        output_loading_info=True,
        **options,
    )
    # The norms of the maps are new: classification has none.
    missing = [x for x in sorted(report["missing_keys"]) if not x.startswith("hidden_states_norms.")]
    if missing:
        count = f"{len(missing)} weights, first {missing[0]}"
        source = folder or "what was fetched"
        raise InputError(f"image_encoder {name}: {source} lacks {count}; give weights of this model")
    return model


def _swin_config(name: str, options: dict[str, Any]) -> SwinConfig:
    """Size of a Swin from its name, as far as ``options`` leave it open."""
    said = re.search(r"swin-(tiny|small|base|large)-patch4-window(\d+)", name)
    size = _SWIN_SIZES[said[1]] | {"window_size": int(said[2])} if said else {}
    size |= options
    lacking = [key for key in ("embed_dim", "depths", "num_heads", "window_size") if key not in size]
    if lacking:
        raise InputError(
            f"image_encoder {name}: the name does not tell its size; give {', '.join(lacking)} in "
            "image_encoder_options, or a name like swin-base-patch4-window12-384-in22k"
        )
    try:
        return SwinConfig(**size, out_features=_STAGES)
    except StrictDataclassError as error:
        raise InputError(f"image_encoder_options: {' '.join(str(error).split())}") from error


def _patch(backbone: nn.Module) -> tuple[int, int] | None:
    """Height and width of the patches that a transformer of timm asks whole; None: it has no patches."""
    for module in backbone.modules():
        if hasattr(module, "patch_size") and hasattr(module, "strict_img_size"):
            return module.patch_size
    return None


def _cell_centres(x: Tensor) -> Tensor:
    """(b, h, w, c) map -> (h, w, 2) coordinates (x, y) of its cells, -1 left and top, 1 right and bottom."""
    h, w = x.shape[1:3]
    rows, columns = ((2 * torch.arange(size, device=x.device) + 1) / size - 1 for size in (h, w))
    return torch.stack(torch.meshgrid(columns, rows, indexing="xy"), dim=-1).to(x.dtype)
