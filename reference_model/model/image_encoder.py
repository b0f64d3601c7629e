"""Image encoder: any timm model with feature maps, as normalised (b, c, h, w) maps, fine to coarse."""

from pathlib import Path
from typing import Any

import timm
import torch
from einops import rearrange
from torch import Tensor, nn

from reference_model.files import InputError


class ImageEncoder(nn.Module):
    """Four feature maps F_1..F_4 of an image (METRIS 3.1); it never sees language.

    Args:
        name: timm model, such as "swin_base_patch4_window12_384.ms_in22k".
        image_size: Side of the input in pixels; encoders with fixed windows are built for it.
        coordinates: Add a learned linear map of a cell's (x, y) in [-1, 1] to each map, so that "left" can be
            seen; without it position is known from the borders alone.
        pretrained: Fetch timm's weights for ``name``.
        weights: Local weight file, instead of fetching.
        options: Further keyword arguments for `timm.create_model`.

    Raises:
        InputError: timm does not know the model or an option, or the weights cannot be had or do not fit.
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
        options = dict(options or {})
        if name.startswith("swin"):
            # Window tables and shift masks depend on the size; 480 is not a multiple of 32 x window 12.
            options = {"img_size": image_size, "strict_img_size": False, **options}
        self.backbone = _timm_model(name, options, pretrained=pretrained, weights=weights)
        # Four stages; some families give a fifth map, finer than the paper's.
        self.channels: list[int] = self.backbone.feature_info.channels()[-4:]
        self.strides: list[int] = self.backbone.feature_info.reduction()[-4:]
        self.channels_last = getattr(self.backbone, "output_fmt", "NCHW") == "NHWC"
        # timm's feature maps come unnormalised; LAVT and transformers' SwinBackbone add a norm per stage too.
        self.norms = nn.ModuleList(nn.LayerNorm(c) for c in self.channels)
        self.coordinates = nn.ModuleList(nn.Linear(2, c) for c in self.channels if coordinates)

    def forward(self, image: Tensor) -> list[Tensor]:
        """(b, 3, h, w), ImageNet-normalised -> maps (b, c_i, h_i, w_i), fine to coarse."""
        maps = self.backbone(image)[-4:]
        if not self.channels_last:
            maps = [rearrange(x, "b c h w -> b h w c") for x in maps]
        maps = [norm(x) for norm, x in zip(self.norms, maps, strict=True)]
        if self.coordinates:
            maps = [x + place(_cell_centres(x)) for place, x in zip(self.coordinates, maps, strict=True)]
        return [rearrange(x, "b h w c -> b c h w") for x in maps]


def _timm_model(name: str, options: dict[str, Any], *, pretrained: bool, weights: Path | None) -> nn.Module:
    overlay = {} if weights is None else {"pretrained_cfg_overlay": {"file": str(weights)}}
    load = pretrained or weights is not None
    state = torch.random.get_rng_state()
    try:
        model = timm.create_model(name, pretrained=load, features_only=True, **options, **overlay)
    except (RuntimeError, TypeError, ValueError, AssertionError, LookupError, OSError) as error:
        source = weights or ("timm's own weights" if pretrained else "no weights")
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(
            f"image_encoder {name}: timm cannot build it from {source} with {options}: {first}"
        ) from error
    if weights is not None:
        # timm passes over what a file lacks. A matrix that is as it was drawn has not been in the file.
        torch.random.set_rng_state(state)
        drawn = timm.create_model(name, features_only=True, **options).state_dict()
        matrices = {key: x for key, x in model.state_dict().items() if x.ndim > 1 and x.is_floating_point()}
        kept = [key for key, x in matrices.items() if x.equal(drawn[key]) and x.any()]
        if kept:
            count = f"{len(kept)} of its {len(matrices)} weight matrices, first {kept[0]}"
            raise InputError(f"image_encoder {name}: {weights} lacks {count}; give weights of this model")
    return model


def _cell_centres(x: Tensor) -> Tensor:
    """(b, h, w, c) map -> (h, w, 2) coordinates (x, y) of its cells, -1 left and top, 1 right and bottom."""
    h, w = x.shape[1:3]
    rows, columns = ((2 * torch.arange(size, device=x.device) + 1) / size - 1 for size in (h, w))
    return torch.stack(torch.meshgrid(columns, rows, indexing="xy"), dim=-1).to(x.dtype)
