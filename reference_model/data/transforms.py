"""From images and masks to square tensors, resized together."""

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from reference_model.data.images import open_image as open_image  # the cards of shared models name it here

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def image_pixels(image: Image.Image, size: int) -> Tensor:
    """Resize an RGB image to (3, size, size) uint8 whatever its aspect, bilinear with antialiasing.

    Torch's resizing is Pillow's but for roundings by 1, quicker, and lays out channels in the same pass.
    """
    pixels = rearrange(torch.from_numpy(np.array(image)), "h w c -> 1 c h w")
    return interpolate(pixels, (size, size), mode="bilinear", antialias=True)[0].contiguous()


def normalized(pixels: Tensor) -> Tensor:
    """Bring (..., 3, h, w) uint8 pixels to float32 with ImageNet's mean and standard deviation."""
    statistics = torch.tensor((IMAGENET_MEAN, IMAGENET_STD), device=pixels.device)
    mean, std = statistics.reshape(2, 3, 1, 1)
    # In place after the first copy: half the time of (x / 255 - mean) / std, to the same bit.
    return pixels.to(torch.float32, copy=True).div_(255).sub_(mean).div_(std)


def image_tensor(image: Image.Image, size: int) -> Tensor:
    """Resize an RGB image to a square and normalise it: (3, size, size) float32."""
    return normalized(image_pixels(image, size))


def resize_mask(mask: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize a bool mask to (height, width) bool: each pixel takes the value under its centre."""
    resized = Image.fromarray(mask.view(np.uint8)).resize((width, height), Image.Resampling.NEAREST)
    return np.array(resized).view(bool)
