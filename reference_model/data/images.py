"""Pictures and PNG masks from files nobody vouches for, and where COCO's pictures are; free of torch."""

import io
import os
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Literal

import numpy as np
from PIL import Image, UnidentifiedImageError

from reference_model.files import InputError, one_line

IMAGE_FOLDERS = (
    "images/train2014",
    "images/mscoco/images/train2014",
    "images/mscoco/train2014",
    "trainval2014",
    "images/trainval2014",
    "coco2014/train2014",
    "coco/train2014",
    "train2014",
)
"""Where the usual repositories keep COCO train2014; val2014, where Ref-ZOM needs it, stands beside it."""

FORMATS = frozenset(("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP"))
"""Kinds of pictures that are read; Pillow's others include EPS, which starts another program."""

Overlaps = Literal["union", "exactly_one"]
"""Whether pixels in several polygons of a target are inside, or background."""

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


def open_image(
    image: str | Path | bytes, *, height_width: tuple[int, int] | None = None, name: str | None = None
) -> Image.Image:
    """Open an image as a person sees it: upright, in RGB, transparent parts over white.

    Args:
        image: Image file of any kind in ``FORMATS``, or its content; of several pictures the first.
        height_width: The size that masks of this image were drawn at, pixels. An EXIF turn that
            contradicts it is not applied: the masks were then drawn on the image as stored.
        name: What messages call the image. None: its path.

    Returns:
        RGB image. 16-bit grey is scaled from 0..65535 to 0..255.

    Raises:
        InputError: The file is missing, damaged, no image, too large, or of another size.
    """
    name = name or ("image" if isinstance(image, bytes) else str(image))
    with _opened(image, name) as file:
        file.load()
        stored = _rgb(file)
        turn = _TURNS.get(_orientation(file))
    upright = stored if turn is None else stored.transpose(turn)
    if height_width is None or (upright.height, upright.width) == tuple(height_width):
        return upright
    if (stored.height, stored.width) == tuple(height_width):
        return stored
    raise InputError(
        f"{name}: has height {upright.height} and width {upright.width}, but its masks were drawn at height "
        f"{height_width[0]} and width {height_width[1]}; use the image that was annotated"
    )


def rgb_image(image: Image.Image | np.ndarray | str | Path) -> Image.Image:
    """Take an image in any form that people have one in, and give it in RGB.

    Args:
        image: A path, opened upright as `open_image` does; a Pillow image, as it is stored; or an array
            (h, w), (h, w, 3) or (h, w, 4) uint8.

    Raises:
        InputError: The file or the array is no such image.
    """
    if isinstance(image, Image.Image):
        if image.mode == "F":
            raise InputError("image", "has float pixels, which have no fixed range", "convert it to uint8")
        return _rgb(image)
    if not isinstance(image, np.ndarray):
        return open_image(image)
    if image.dtype != np.uint8 or image.ndim not in (2, 3) or image.shape[2:] not in ((), (3,), (4,)):
        got = f"is an array of shape {image.shape} and dtype {image.dtype}"
        raise InputError("image", got, "give (h, w), (h, w, 3) or (h, w, 4) uint8, 0 to 255")
    return _rgb(Image.fromarray(image))


def image_size(image: str | Path | bytes, *, name: str | None = None) -> tuple[int, int]:
    """Read (height, width) of an image as a person sees it, pixels, from its header alone.

    Raises:
        InputError: The file is missing, no image, or too large.
    """
    with _opened(image, name or ("image" if isinstance(image, bytes) else str(image))) as file:
        # Pillow has a TIFF's turn in its size already, and would decode a PNG whole to look for one.
        known = file.format != "TIFF" and (file.format != "PNG" or "exif" in file.info)
        turned = known and _orientation(file) in (5, 6, 7, 8)
        return (file.width, file.height) if turned else (file.height, file.width)


def mask_size(path: Path, *, name: str | None = None) -> tuple[int, int]:
    """Read (height, width) of a PNG mask, pixels, from its header alone; raises as `open_mask` does."""
    with _opened(path, name or str(path)) as file:
        _refuse_other_than_png(file, name or str(path))
        return file.height, file.width


def open_mask(path: Path, height: int, width: int, overlaps: Overlaps = "union") -> np.ndarray:
    """Read a mask from a PNG: background where all colours (or the palette's index) are 0.

    CRIS, ETRIS and CGFormer write 255 times the count of polygons, which wraps around: 255 where one polygon
    is, 254 where two are, 253 where three are. A PNG without 255 has no counts to tell overlaps by: it is
    read whole, with a warning.

    Args:
        path: PNG file of any depth; transparency is not looked at.
        height: Image height, pixels.
        width: Image width, pixels.
        overlaps: Whether pixels of several polygons are inside (``union``) or background (``exactly_one``).

    Returns:
        (height, width) bool.

    Raises:
        InputError: The file is missing, damaged, no PNG, or of another size.
    """
    with _opened(path, str(path)) as file:
        _refuse_other_than_png(file, str(path))
        if file.size != (width, height):
            raise InputError(
                f"{path}: has height {file.height} and width {file.width}, but its image has height {height} "
                f"and width {width}; draw the mask at the size of the image"
            )
        values: np.ndarray = np.asarray(file)
        colours = 3 if file.mode in ("RGB", "RGBA") else 1
    if values.ndim == 3:
        values = values[..., :colours].max(axis=2)
    inside: np.ndarray = values != 0
    if overlaps == "exactly_one" and inside.any():
        if (once := values == 255).any():
            return once
        warnings.warn(
            f"{path.parent}: masks without 255 do not tell where polygons overlap, so that all they hold "
            "is inside; score them by a protocol with the union of polygons",
            stacklevel=2,
        )
    return inside


def open_binary(path: Path) -> np.ndarray:
    """Read a predicted mask from a PNG: 0 outside, one other value inside.

    Returns:
        (height, width) bool, at the size of the file.

    Raises:
        InputError: The file is missing, damaged, no PNG, or has more values: they may be probabilities.
    """
    with _opened(path, str(path)) as file:
        _refuse_other_than_png(file, str(path))
        values: np.ndarray = np.asarray(file)
        if file.mode in ("LA", "RGB", "RGBA"):
            values = values[..., : 1 if file.mode == "LA" else 3].max(axis=2)
    inside = values != 0
    if inside.any() and (values[inside] != values[inside][0]).any():
        raise InputError(
            f"{path}: has more values than 0 and one other; cut probabilities at the model's threshold first"
        )
    return inside


@contextmanager
def _opened(image: str | Path | bytes, name: str) -> Iterator[Image.Image]:
    """Open an image file of an allowed kind and size; the block reads from it."""
    if not isinstance(image, bytes) and os.path.exists(image) and not os.path.isfile(image):
        raise InputError(f"{name}: is not a file; give a JPEG or PNG")
    try:
        with Image.open(io.BytesIO(image) if isinstance(image, bytes) else image) as file:
            if file.format not in FORMATS:
                raise UnidentifiedImageError(f"{file.format} is not read")
            if Image.MAX_IMAGE_PIXELS and file.width * file.height > Image.MAX_IMAGE_PIXELS:
                # Pillow itself only warns, up to twice as many.
                raise Image.DecompressionBombError(
                    f"{file.width * file.height} pixels exceed the limit of {Image.MAX_IMAGE_PIXELS}"
                )
            yield file
    except InputError:
        raise
    except FileNotFoundError as error:
        raise InputError(f"{name}: no such image; check the path") from error
    except UnidentifiedImageError as error:
        raise InputError(f"{name}: not an image of a known kind; use JPEG or PNG") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise InputError(f"{name}: too large ({one_line(error)}); scale it down first") from error
    except _DAMAGED as error:
        raise InputError(f"{name}: cannot be read as an image ({one_line(error)}); save it afresh") from error


def _refuse_other_than_png(file: Image.Image, name: str) -> None:
    if file.format != "PNG":  # JPEG blurs the border of a mask
        raise InputError(f"{name}: is a {file.format}, but a mask must be a PNG; save it as one")


def _orientation(file: Image.Image) -> int:
    try:
        return int(file.getexif().get(_ORIENTATION_TAG, 1))
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
    return image if image.mode == "RGB" else image.convert("RGB")


class Folders:
    """What the folders of a data set hold, each listed once: far quicker than a look at every file."""

    def __init__(self) -> None:
        self._entries: dict[Path, dict[str, str]] = {}

    def defect(self, path: Path) -> str | None:
        """Say why a file of a data set cannot be read, or None.

        A folder may be a link, to where COCO lies on this machine. A single file that is a link out of the
        folder it stands in would show whatever an archive chose, and is refused.
        """
        kind = self.entries(path.parent).get(path.name)
        if kind is None:
            return "is missing"
        if kind != "link":
            return None if kind == "file" else "is not a file"
        try:
            if not path.is_file():
                return "is a link to no file"
            inside = path.resolve().is_relative_to(path.parent.resolve())
        except (OSError, RuntimeError):  # links in a circle
            return "is a link to no file"
        return None if inside else "is a link that leaves its folder"

    def entries(self, folder: Path) -> dict[str, str]:
        """Give the names in a folder, each with file, link or other; empty where there is none."""
        if folder not in self._entries:
            try:
                with os.scandir(folder) as entries:
                    self._entries[folder] = {entry.name: _kind(entry) for entry in entries}
            except (OSError, ValueError):  # ValueError: a name that no file can have
                self._entries[folder] = {}
        return self._entries[folder]


def _kind(entry: "os.DirEntry[str]") -> str:
    if entry.is_symlink():
        return "link"
    return "file" if entry.is_file(follow_symlinks=False) else "other"


class CocoImages:
    """Find COCO's images under a root, wherever the usual repositories keep them.

    Args:
        root: Folder that holds one of ``IMAGE_FOLDERS``, or one of those with val2014 in its name.
        needed: Whether there must be one; else paths lead into the first that there might be.

    Raises:
        InputError: There is none of them.
    """

    def __init__(self, root: Path, *, needed: bool = True) -> None:
        names = [*IMAGE_FOLDERS, *(usual.replace("train2014", "val2014") for usual in IMAGE_FOLDERS)]
        self._folders = [root / name for name in dict.fromkeys(names) if (root / name).is_dir()]
        if not self._folders and needed:
            raise InputError(
                f"{root}: holds no image folder; put COCO train2014 into {' or '.join(IMAGE_FOLDERS)}"
            )
        self._listed = Folders()
        self._last = self._folders[0] if self._folders else root / IMAGE_FOLDERS[0]

    def path(self, name: str) -> Path:
        """Give the path of an image in a folder that has it, or else in the one that had the last image."""
        parent, last = PurePosixPath(name).parent, PurePosixPath(name).name
        for folder in (self._last, *self._folders):
            if last in self._listed.entries(folder / parent):
                self._last = folder
                return folder / name
        return self._last / name
