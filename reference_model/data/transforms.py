"""From images and masks to square tensors, resized together."""

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate


def image_pixels(image: Image.Image, size: int) -> Tensor:
    """Resize an RGB image to (3, size, size) uint8 whatever its aspect, bilinear with antialiasing.

    Torch's resizing is Pillow's but for roundings by 1, quicker, and lays out channels in the same pass.
    """
    pixels = rearrange(torch.from_numpy(np.array(image)), "h w c -> 1 c h w")
    return interpolate(pixels, (size, size), mode="bilinear", antialias=True)[0].contiguous()


def resize_mask(mask: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize a bool mask to (height, width) bool: each pixel takes the value under its centre."""
    resized = Image.fromarray(mask.view(np.uint8)).resize((width, height), Image.Resampling.NEAREST)
    return np.array(resized).view(bool)


def probabilities_at(logits: Tensor, height: int, width: int) -> Tensor:
    """Bring (k, h, w) mask logits to (k, height, width) probabilities, bilinearly, float32."""
    return interpolate(logits[:, None].float(), (height, width), mode="bilinear")[:, 0].sigmoid()
