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
        InputError: timm does not know the model or an option, or the weights cannot be had.
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
        if weights is not None:
            pretrained, options["pretrained_cfg_overlay"] = True, {"file": str(weights)}
        try:
            self.backbone = timm.create_model(name, pretrained=pretrained, features_only=True, **options)
        except (RuntimeError, TypeError, ValueError, OSError) as error:
            source = weights or ("timm's own weights" if pretrained else "no weights")
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise InputError(
                f"image_encoder {name}: timm cannot build it from {source} with {options}: {first}"
            ) from error
        self.channels: list[int] = self.backbone.feature_info.channels()
        self.strides: list[int] = self.backbone.feature_info.reduction()
        self.channels_last = getattr(self.backbone, "output_fmt", "NCHW") == "NHWC"
        # timm's feature maps come unnormalised; LAVT and transformers' SwinBackbone add a norm per stage too.
        self.norms = nn.ModuleList(nn.LayerNorm(c) for c in self.channels)
        self.coordinates = nn.ModuleList(nn.Linear(2, c) for c in self.channels if coordinates)

    def forward(self, image: Tensor) -> list[Tensor]:
        """(b, 3, h, w), ImageNet-normalised -> maps (b, c_i, h_i, w_i), fine to coarse."""
        maps = self.backbone(image)
        if not self.channels_last:
            maps = [rearrange(x, "b c h w -> b h w c") for x in maps]
        maps = [norm(x) for norm, x in zip(self.norms, maps, strict=True)]
        if self.coordinates:
            maps = [x + place(_cell_centres(x)) for place, x in zip(self.coordinates, maps, strict=True)]
        return [rearrange(x, "b h w c -> b c h w") for x in maps]


def _cell_centres(x: Tensor) -> Tensor:
    """(b, h, w, c) map -> (h, w, 2) coordinates (x, y) of its cells, -1 left and top, 1 right and bottom."""
    h, w = x.shape[1:3]
    rows, columns = ((2 * torch.arange(size, device=x.device) + 1) / size - 1 for size in (h, w))
    return torch.stack(torch.meshgrid(columns, rows, indexing="xy"), dim=-1).to(x.dtype)
