"""From a scene to pixels: the picture, the exact visible masks, and their outlines as COCO polygons."""

from collections.abc import Iterator, Sequence
from random import Random

import numpy as np
from PIL import Image, ImageDraw

from reference_model.synthetic.scene import SceneObject, markings, outline


def painted_ids(scene: Sequence[SceneObject], size: int) -> np.ndarray:
    """Paint the objects in order, later ones over earlier ones, at twice the size.

    Returns:
        (2 size, 2 size) uint8: 1 + the index of the object seen there, 0 for the background.
    """
    canvas = Image.new("L", (2 * size, 2 * size))
    draw = ImageDraw.Draw(canvas)
    for number, item in enumerate(scene, start=1):
        # Pillow's pixel k spans [k - 1/2, k + 1/2] in its own coordinates.
        corners = outline(item) * (2 * size) - 0.5
        draw.polygon(corners.ravel().tolist(), fill=number)
    return np.asarray(canvas)


def visible_ids(painted: np.ndarray) -> np.ndarray:
    """Give each pixel to the id that most of its four subpixels have; the lower id wins a tie.

    Returns:
        (size, size) uint8. `visible_ids(painted) == 1 + index` is the exact visible mask of an object.
    """
    a, b = painted[::2, ::2], painted[::2, 1::2]
    c, d = painted[1::2, ::2], painted[1::2, 1::2]
    a, b, c, d = np.minimum(a, b), np.maximum(a, b), np.minimum(c, d), np.maximum(c, d)
    first, second, third, fourth = (
        np.minimum(a, c),
        np.minimum(np.maximum(a, c), np.minimum(b, d)),
        np.maximum(np.maximum(a, c), np.minimum(b, d)),
        np.maximum(b, d),
    )
    pair_below = np.where(first == second, first, np.where(third == fourth, third, first))
    return np.where(second == third, second, pair_below)


def marked_ids(scene: Sequence[SceneObject], painted: np.ndarray) -> np.ndarray:
    """Tell the stripes, spots and cores in painted ids from the bodies that they lie on.

    Returns:
        As `painted`, but with 1 + len(scene) + the index of the object where its second colour is seen.
    """
    if not any(item.second for item in scene):
        return painted
    canvas = Image.new("L", painted.shape[::-1])
    draw = ImageDraw.Draw(canvas)
    found = painted
    for number, item in enumerate(scene, start=1):
        if item.second:
            canvas.paste(0, (0, 0, *canvas.size))
            for points in markings(item):
                draw.polygon((points * len(painted) - 0.5).ravel().tolist(), fill=1)
            found = np.where((painted == number) & (np.asarray(canvas) == 1), len(scene) + number, found)
    return found.astype(np.uint8)


def picture(scene: Sequence[SceneObject], painted: np.ndarray, rng: Random) -> Image.Image:
    """Colour the painted or marked ids over a grey gradient, average the subpixels, add noise."""
    size = len(painted) // 2
    random = np.random.default_rng(rng.getrandbits(64))
    colours = np.zeros((2 * len(scene) + 1, 3), dtype=np.uint16)
    colours[1:] = [item.rgb for item in scene] + [item.second_rgb or item.rgb for item in scene]
    parts = [painted[y::2, x::2] for y in range(2) for x in range(2)]
    objects = sum(np.take(colours, part, axis=0) for part in parts)
    bare = sum((part == 0).astype(np.float32) for part in parts) / 4
    ends = random.uniform(105, 155) + random.uniform(-14, 14, (2, 3)) + [[-12], [12]]
    slope = random.uniform(-1, 1, 2)
    across = np.linspace(-0.5, 0.5, size, dtype=np.float32)
    ramp = np.clip(0.5 + slope[0] * across[:, None] + slope[1] * across, 0, 1)[..., None]
    background = ends[0].astype(np.float32) + ramp * (ends[1] - ends[0]).astype(np.float32)
    noise = random.standard_normal((size, size, 1), dtype=np.float32) * 5
    pixels = objects / np.float32(4) + bare[..., None] * background + noise
    return Image.fromarray(np.clip(pixels + 0.5, 0, 255).astype(np.uint8))


def polygons(mask: np.ndarray) -> list[list[int]]:
    """Trace the outer borders of a mask along the pixels' edges.

    pycocotools decodes the polygons to the mask again, pixel for pixel, holes aside: those are filled, and
    objects that keep their distance have none.

    Args:
        mask: (h, w) bool, any number of pieces.

    Returns:
        One flat x, y list for each piece; none for an empty mask.
    """
    padded = np.pad(mask, 1).astype(np.int8)
    ul, ur, dl, dr = padded[:-1, :-1], padded[:-1, 1:], padded[1:, :-1], padded[1:, 1:]
    # A border turns where its 2 x 2 pixels hold one or three; where two touch by a corner, two borders meet.
    turns = (ul ^ ur ^ dl ^ dr) + 2 * ((ul == dr) & (ur == dl) & (ul != ur))
    y, x = np.nonzero(turns)
    copies = turns[y, x]
    y, x = np.repeat(y, copies), np.repeat(x, copies)
    # Along a line of the grid a border runs from the first turn to the second, from the third to the fourth.
    along_y = np.lexsort((y, x)).reshape(-1, 2)
    across, down = np.arange(len(x)) ^ 1, np.empty(len(x), dtype=int)
    down[along_y[:, 0]], down[along_y[:, 1]] = along_y[:, 1], along_y[:, 0]
    return list(_rings(x.tolist(), y.tolist(), across.tolist(), down.tolist(), mask))


def _rings(
    x: list[int], y: list[int], across: list[int], down: list[int], mask: np.ndarray
) -> Iterator[list[int]]:
    """Walk from turn to turn, across and down in alternation, and yield the closed outer borders."""
    unseen = [True] * len(x)
    for start in range(len(x)):
        if not unseen[start]:
            continue
        ring, here = [], start
        while unseen[here]:
            there = across[here]
            unseen[here] = unseen[there] = False
            ring += (x[here], y[here], x[there], y[there])
            here = down[there]
        # Turns come row by row, so the start is the uppermost turn of its ring, and the pixel to its lower
        # right lies inside the ring: a pixel of the mask, unless the ring goes round a hole.
        if mask[y[start], x[start]]:
            yield ring
