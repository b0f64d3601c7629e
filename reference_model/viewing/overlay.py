"""Pictures of masks: the masked part of an image stands out, with the sentence below."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

# Colour-blind-safe (Okabe-Ito): truth and prediction differ in lightness too.
TRUTH, PREDICTION = (230, 159, 0), (0, 114, 178)
_DIMMED = 0.45
_SMALLEST_SIDE = 320
_LARGEST_SIDE = 2048


def overlay(
    image: Image.Image,
    mask: np.ndarray,
    *,
    colour: tuple[int, int, int] = PREDICTION,
    dim: bool = True,
) -> Image.Image:
    """Show the mask of an RGB image: its inside as it is, outlined, the rest grey and dim.

    So the mark cannot be taken for an object's colour. Image and (h, w) bool mask have one size. Without
    ``dim`` the rest stays as it is too, for whoever compares a sentence with all there is.
    """
    pixels = np.asarray(image)
    grey = np.asarray(image.convert("L"), dtype=np.float32)[..., None] * _DIMMED
    shown = np.where(mask[..., None], pixels, grey.round().astype(np.uint8)) if dim else pixels.copy()
    shown[_outline(mask, width=max(1, min(mask.shape) // 160))] = colour
    return Image.fromarray(shown)


def _outline(mask: np.ndarray, *, width: int) -> np.ndarray:
    """Mark the pixels of the mask within ``width`` of its border; the picture's own border is none."""
    inside = mask
    for _ in range(width):
        padded = np.pad(inside, 1, mode="edge")
        inside = inside & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return mask & ~inside


def captioned(panels: Sequence[tuple[Image.Image, str]], caption: str) -> Image.Image:
    """Set pictures of one size side by side, each with its title above, over a caption.

    Small pictures are enlarged and huge ones reduced, so that the letters can be read.
    """
    w, h = panels[0][0].size
    scale = max(1.0, _SMALLEST_SIDE / min(w, h))
    scale = min(scale, _LARGEST_SIDE / max(w, h))
    w, h = max(1, round(w * scale)), max(1, round(h * scale))
    size = max(14, w // 24)
    font, gap = ImageFont.load_default(size), size // 2
    width = len(panels) * w + (len(panels) + 1) * gap
    lines = _wrapped(caption, font, width - 2 * gap)
    line_height = round(1.4 * size)
    sheet = Image.new("RGB", (width, h + line_height * (1 + len(lines)) + 3 * gap), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (picture, title) in enumerate(panels):
        left = gap + i * (w + gap)
        draw.text((left, gap), title, fill="black", font=font)
        sheet.paste(
            picture.resize((w, h), Image.Resampling.NEAREST if scale > 1 else None), (left, gap + line_height)
        )
    for i, line in enumerate(lines):
        draw.text((gap, h + 2 * gap + line_height * (1 + i)), line, fill="black", font=font)
    return sheet


def _wrapped(text: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, width: int) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines
