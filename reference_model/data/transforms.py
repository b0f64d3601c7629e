"""From image files and masks to square tensors, resized together."""

import struct
import zlib
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from reference_model.data.plain import one_line
from reference_model.files import InputError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

_ORIENTATION_TAG = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# What Pillow raises on files that are damaged or made up; found by fuzzing.
_DAMAGED = (
    OSError,
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
    struct.error,
    zlib.error,
)


def open_image(path: str | Path, *, height_width: tuple[int, int] | None = None) -> Image.Image:
    """Open an image as a person sees it: upright, in RGB, transparent parts over white.

    Args:
        path: Image file of any kind that Pillow reads; the first picture where it holds several.
        height_width: The size that masks of this image were drawn at, pixels. An EXIF turn that
            contradicts it is not applied: the masks were then drawn on the image as stored.

    Returns:
        RGB image. 16-bit grey is scaled from 0..65535 to 0..255.

    Raises:
        InputError: The file is missing, damaged, no image, too large, or of another size.
    """
    if Path(path).exists() and not Path(path).is_file():
        raise InputError(f"{path}: is not a file; give a JPEG or PNG")
    try:
        with Image.open(path) as file:
            file.load()
            stored = _rgb(file)
            turn = _TURNS.get(_orientation(file))
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such image; check the path") from error
    except UnidentifiedImageError as error:
        raise InputError(f"{path}: not an image of a known kind; use JPEG or PNG") from error
    except Image.DecompressionBombError as error:
        raise InputError(f"{path}: too large ({one_line(error)}); scale it down first") from error
    except _DAMAGED as error:
        raise InputError(f"{path}: cannot be read as an image ({one_line(error)}); save it afresh") from error
    upright = stored if turn is None else stored.transpose(turn)
    if height_width is None or (upright.height, upright.width) == tuple(height_width):
        return upright
    if (stored.height, stored.width) == tuple(height_width):
        return stored
    raise InputError(
        f"{path}: has height {upright.height} and width {upright.width}, but its masks were drawn at height "
        f"{height_width[0]} and width {height_width[1]}; use the image that was annotated"
    )


def image_pixels(image: Image.Image, size: int) -> Tensor:
    """Resize an RGB image to (3, size, size) uint8 whatever its aspect, bilinear with antialiasing."""
    resized = image.resize((size, size), Image.Resampling.BILINEAR)
    return rearrange(torch.from_numpy(np.array(resized)), "h w c -> c h w").contiguous()


def normalized(pixels: Tensor) -> Tensor:
    """Bring (..., 3, h, w) uint8 pixels to float32 with ImageNet's mean and standard deviation."""
    mean, std = (torch.tensor(values).reshape(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return (pixels.float() / 255 - mean) / std


def image_tensor(image: Image.Image, size: int) -> Tensor:
    """Resize an RGB image to a square and normalise it: (3, size, size) float32."""
    return normalized(image_pixels(image, size))


def resize_mask(mask: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize a bool mask to (height, width) bool: each pixel takes the value under its centre."""
    resized = Image.fromarray(mask.astype(np.uint8)).resize((width, height), Image.Resampling.NEAREST)
    return np.array(resized, dtype=bool)


def _orientation(file: Image.Image) -> int:
    try:
        return file.getexif().get(_ORIENTATION_TAG, 1)
    except _DAMAGED:  # broken EXIF does not spoil the picture
        return 1


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # convert("RGB") would cut 16 bits at 255
        values = np.asarray(image).astype(np.int64).clip(0, 65535)
        grey = ((values * 255 + 32767) // 65535).astype(np.uint8)
        return Image.fromarray(grey).convert("RGB")
    if image.mode == "F":
        raise ValueError("float pixels have no fixed range")
    if image.has_transparency_data:
        colour = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", colour.size, "white"), colour).convert("RGB")
    return image.convert("RGB")
