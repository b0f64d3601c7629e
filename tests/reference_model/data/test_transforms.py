"""open_image and the resizing: a picture as a person sees it, and a mask that stays on its object."""

import io
import math
import os
import random
import struct
import warnings
import zlib
from contextlib import suppress
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import EpsImagePlugin, Image, ImageOps

from reference_model.data.images import image_size, mask_size, open_image, open_mask
from reference_model.data.transforms import image_pixels, resize_mask
from reference_model.files import InputError


def gradient(height=6, width=9, channels=3):
    """Pixels that are all different, so that any turn or flip shows."""
    values = np.arange(height * width * channels, dtype=np.uint8).reshape(height, width, channels)
    return np.ascontiguousarray(values)


def pixels_of(path, **options):
    image = open_image(path, **options)
    assert image.mode == "RGB"
    return np.asarray(image)


# ---- kinds of images ----------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["png", "tiff"])
def test_exif_orientation_is_undone(tmp_path, orientation, kind):
    upright = Image.fromarray(gradient())
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,  # to be shown turned right by 90, so stored turned left
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright.transpose(undo[orientation]) if orientation in undo else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"turned.{kind}"
    stored.save(path, exif=exif)
    np.testing.assert_array_equal(pixels_of(path), gradient())
    with Image.open(path) as file:  # Pillow's own reading of the tag agrees
        np.testing.assert_array_equal(np.asarray(ImageOps.exif_transpose(file)), gradient())


def test_exif_turn_is_left_out_where_the_masks_were_drawn_on_the_stored_image(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(gradient(6, 9)).save(tmp_path / "a.png", exif=exif)
    assert pixels_of(tmp_path / "a.png", height_width=(9, 6)).shape == (9, 6, 3)
    np.testing.assert_array_equal(pixels_of(tmp_path / "a.png", height_width=(6, 9)), gradient(6, 9))


def test_image_of_another_size_than_its_masks_is_refused(tmp_path):
    Image.fromarray(gradient(6, 9)).save(tmp_path / "a.png")
    with pytest.raises(InputError, match=r"a.png: has height 6 and width 9, but .* height 6 and width 8"):
        open_image(tmp_path / "a.png", height_width=(6, 8))


def test_broken_exif_does_not_spoil_the_picture(tmp_path):
    Image.fromarray(gradient()).save(tmp_path / "a.png", exif=b"Exif\0\0MM\0*garbage")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        np.testing.assert_array_equal(pixels_of(tmp_path / "a.png"), gradient())


def test_grey_and_bilevel_become_three_equal_channels(tmp_path):
    grey = gradient(channels=1)[..., 0]
    Image.fromarray(grey).save(tmp_path / "grey.png")
    np.testing.assert_array_equal(pixels_of(tmp_path / "grey.png"), np.stack([grey] * 3, -1))
    Image.fromarray(grey > 20).save(tmp_path / "one.png")
    np.testing.assert_array_equal(pixels_of(tmp_path / "one.png"), np.stack([(grey > 20) * 255] * 3, -1))


@pytest.mark.parametrize("kind", ["RGBA.png", "LA.png", "LA.tiff", "P.png", "RGBA.webp"])
def test_transparent_parts_lie_over_white(tmp_path, kind):
    """Left column opaque black, right column fully transparent black."""
    rgba = np.zeros((4, 2, 4), np.uint8)
    rgba[:, 0, 3] = 255
    image = Image.fromarray(rgba)
    path = tmp_path / kind
    if kind == "P.png":
        palette = Image.fromarray(np.tile(np.uint8([0, 1]), (4, 1))).convert("P")
        palette.putpalette([0, 0, 0, 0, 0, 0])
        palette.save(path, transparency=1)
    else:
        image.convert(path.stem).save(path, lossless=True)
    out = pixels_of(path)
    assert (out[:, 0] == 0).all() and (out[:, 1] == 255).all()


def test_half_transparent_is_half_way_to_white(tmp_path):
    Image.new("RGBA", (2, 2), (0, 100, 200, 51)).save(tmp_path / "a.png")  # alpha 0.2
    expected = 255 * 0.8 + 0.2 * np.array([0, 100, 200])
    assert np.abs(pixels_of(tmp_path / "a.png") - expected).max() <= 1


def test_colour_key_of_an_rgb_png_is_transparent(tmp_path):
    image = np.zeros((2, 2, 3), np.uint8)
    image[0, 0] = (10, 20, 30)
    Image.fromarray(image).save(tmp_path / "a.png", transparency=(10, 20, 30))
    out = pixels_of(tmp_path / "a.png")
    assert (out[0, 0] == 255).all() and (out[1, 1] == 0).all()


def test_palette_gives_its_colours(tmp_path):
    Image.fromarray(gradient()).quantize(256).save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as stored:
        assert stored.mode == "P"
    np.testing.assert_array_equal(pixels_of(tmp_path / "a.png"), gradient())


def test_cmyk_gives_ink_on_white(tmp_path):
    for ink, colour in {
        (0, 0, 0, 0): (255, 255, 255),
        (255, 0, 0, 0): (0, 255, 255),
        (0, 0, 0, 255): (0, 0, 0),
    }.items():
        Image.new("CMYK", (8, 8), ink).save(tmp_path / "a.jpg", quality=95)
        assert np.abs(pixels_of(tmp_path / "a.jpg").astype(int) - colour).max() <= 3


@pytest.mark.parametrize("kind", ["png", "tiff"])
def test_sixteen_bit_grey_keeps_its_shades(tmp_path, kind):
    # 257 steps of 16 bits are one of 8; 120 off is still nearest to it.
    values = 257 * np.arange(256) + np.where(np.arange(256) % 2, -120, 120)
    values = values.clip(0, 65535).astype(np.uint16).reshape(16, 16)
    Image.fromarray(values).save(tmp_path / f"a.{kind}")
    out = pixels_of(tmp_path / f"a.{kind}")[..., 0]
    np.testing.assert_array_equal(out.reshape(-1), np.arange(256))


# ---- refusals -----------------------------------------------------------------------------------


def message_of(path):
    with pytest.raises(InputError) as caught:
        open_image(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    return str(caught.value)


def test_missing_file_and_folder_are_refused(tmp_path):
    assert "no such image" in message_of(tmp_path / "nowhere.jpg")
    assert "is not a file" in message_of(tmp_path)


@pytest.mark.parametrize("content", [b"", b"hello", b"<html>not found</html>", b"\x89PNG\r\n\x1a\n"])
def test_what_is_no_image_is_refused(tmp_path, content):
    (tmp_path / "a.jpg").write_bytes(content)
    message_of(tmp_path / "a.jpg")


@pytest.mark.parametrize("kind", ["jpg", "png", "tiff", "gif", "bmp", "webp"])
def test_truncated_image_is_refused(tmp_path, kind):
    path = tmp_path / f"a.{kind}"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    message_of(path)


def test_decompression_bomb_is_refused(tmp_path, monkeypatch):
    Image.new("L", (100, 100)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    assert "too large" in message_of(tmp_path / "a.png")


def png_with(chunk_type, content):
    """A PNG of one pixel with one more chunk before its pixels."""
    stream = io.BytesIO()
    Image.new("L", (1, 1)).save(stream, "PNG")
    data = stream.getvalue()
    body = chunk_type + content
    chunk = struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))
    at = data.index(b"IDAT") - 4
    return data[:at] + chunk + data[at:]


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("pixels", [9_000, 5_001])
def test_image_that_pillow_would_only_warn_of_is_refused(tmp_path, monkeypatch, pixels):
    Image.new("L", (100, 100)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", pixels)
    assert f"10000 pixels exceed the limit of {pixels}" in message_of(tmp_path / "a.png")
    for read in (image_size, mask_size, lambda path: open_mask(path, 100, 100)):
        with pytest.raises(InputError, match="too large"):
            read(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    assert open_image(tmp_path / "a.png").size == (100, 100)


@pytest.mark.parametrize("chunk", [b"zTXt", b"iTXt", b"iCCP"])
def test_text_of_a_png_that_unpacks_to_far_too_much_is_refused_or_left(tmp_path, chunk):
    import tracemalloc

    bomb = zlib.compress(bytes(100_000_000), 9)
    content = {b"zTXt": b"a\0\0", b"iTXt": b"a\0\1\0\0\0", b"iCCP": b"a\0\0"}[chunk] + bomb
    (tmp_path / "a.png").write_bytes(png_with(chunk, content))
    tracemalloc.start()
    with suppress(InputError):
        assert open_image(tmp_path / "a.png").size == (1, 1)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 80_000_000


def test_kinds_that_start_other_programs_or_are_no_pictures_are_refused(tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: started.append(1))
    (tmp_path / "a.jpg").write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"
    )
    with Image.open(tmp_path / "a.jpg") as file:
        assert file.format == "EPS"  # Pillow itself would go on
    assert "not an image of a known kind" in message_of(tmp_path / "a.jpg") and not started


def test_pipe_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "a.jpg")
    assert "is not a file" in message_of(tmp_path / "a.jpg")
    assert "is not a file" in message_of("/dev/zero")


def test_image_may_be_its_bytes_and_is_called_by_its_name(tmp_path):
    Image.fromarray(gradient()).save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    np.testing.assert_array_equal(np.asarray(open_image(data)), gradient())
    assert image_size(data) == (6, 9)
    for broken in (b"", data[:40], b"garbage"):
        with pytest.raises(InputError, match=r"^image 7: "):
            open_image(broken, name="image 7")
    with pytest.raises(InputError, match=r"^image 7: has height 6 and width 9, but"):
        open_image(data, name="image 7", height_width=(9, 9))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["jpg", "png", "tiff", "webp"])
def test_size_is_that_of_the_opened_image(tmp_path, orientation, kind):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(gradient(6, 9)).save(tmp_path / f"a.{kind}", exif=exif)
    width, height = open_image(tmp_path / f"a.{kind}").size
    assert image_size(tmp_path / f"a.{kind}") == (height, width)


def test_float_pixels_are_refused(tmp_path):
    Image.fromarray(np.ones((4, 4), np.float32)).save(tmp_path / "a.tiff")
    assert "float pixels" in message_of(tmp_path / "a.tiff")


@pytest.mark.filterwarnings("ignore")
def test_damaged_images_give_an_image_or_an_input_error(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1_000_000)
    rng = random.Random(3)
    noise = np.random.default_rng(0).integers(0, 255, (24, 24, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    originals = []
    for kind in ("jpg", "png", "tiff", "gif", "bmp", "webp", "ppm"):
        Image.fromarray(noise).save(tmp_path / f"a.{kind}", exif=exif)
        originals.append((tmp_path / f"a.{kind}").read_bytes())
    Image.fromarray(noise).quantize(16).save(tmp_path / "b.png", transparency=3)
    originals.append((tmp_path / "b.png").read_bytes())
    read, refused = 0, []
    for _ in range(600):
        data = bytearray(rng.choice(originals))
        for _ in range(rng.randrange(1, 6)):
            # Headers are where the harm is.
            data[rng.randrange(min(len(data), rng.choice((64, 256, 4096))))] = rng.randrange(256)
        (tmp_path / "c").write_bytes(data)
        try:
            assert open_image(tmp_path / "c").mode == "RGB"
            read += 1
        except InputError as error:
            refused.append(str(error))
    assert not any("\n" in message for message in refused)
    assert min(read, len(refused)) > 50


# ---- resizing -----------------------------------------------------------------------------------


@given(
    st.tuples(st.integers(8, 60), st.integers(8, 60)),
    st.tuples(*(st.floats(0, 1),) * 4),
    st.integers(4, 64),
)
@settings(deadline=None, max_examples=60)
def test_mask_stays_on_its_object(height_width, corners, size):
    """A white square on black: inside the resized mask the resized image is bright, outside it is dark."""
    height, width = height_width
    (top, bottom), (left, right) = (
        sorted((round(corners[0] * height), round(corners[1] * height))),
        sorted((round(corners[2] * width), round(corners[3] * width))),
    )
    mask = np.zeros((height, width), bool)
    mask[top:bottom, left:right] = True
    image = Image.fromarray((mask[..., None] * np.ones(3)).astype(np.uint8) * 255)
    bright = image_pixels(image, size)[0].float() / 255
    resized = torch.from_numpy(resize_mask(mask, size, size)).float()
    assert resized.unique().tolist() in ([0.0], [1.0], [0.0, 1.0])
    # Only pixels near the edge may blend: half a pixel of the coarser grid, and one for rounding. The border
    # of the image counts as an edge, for a strip of background there may be too thin to be sampled.
    reach = 1 + math.ceil(max(1, size / min(height, width)) / 2)
    widest = lambda mask: torch.nn.functional.max_pool2d(mask[None, None], 2 * reach + 1, 1)[0, 0]
    around = torch.nn.functional.pad(resized, (reach,) * 4)
    grown, shrunk = widest(around), 1 - widest(1 - around)
    if resized.any():
        assert (bright[shrunk == 1] > 0.95).all()
        assert (bright[grown == 0] < 0.05).all()


def test_bright_square_and_its_mask_coincide_under_a_large_stretch():
    mask = np.zeros((20, 10), bool)
    mask[4:8, 5:9] = True
    image = Image.fromarray((mask[..., None] * np.ones(3)).astype(np.uint8) * 255)
    bright = image_pixels(image, 200)[0].float()
    truth = torch.from_numpy(resize_mask(mask, 200, 200)).float()
    assert truth[40:80, 100:180].all() and truth.sum() == 40 * 80
    for picture in (bright, truth):  # blended edges leave the centre of mass where it was
        rows, columns = (picture.sum(dim) / picture.sum() for dim in (1, 0))
        centre = [float(side @ torch.arange(200.0)) for side in (rows, columns)]
        assert centre == pytest.approx([59.5, 139.5], abs=0.05)


@given(st.tuples(st.integers(1, 90), st.integers(1, 90)), st.integers(1, 64), st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=60)
def test_resized_pixels_are_pillows_but_for_a_rounding(height_width, size, seed):
    """The peers resize by Pillow or OpenCV; noise is where another filter would show."""
    image = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*height_width, 3), dtype=np.uint8))
    expected = np.asarray(image.resize((size, size), Image.Resampling.BILINEAR)).transpose(2, 0, 1)
    pixels = image_pixels(image, size)
    assert pixels.is_contiguous() and pixels.dtype == torch.uint8
    assert np.abs(pixels.numpy().astype(int) - expected).max() <= 1


def test_image_of_the_right_size_keeps_its_pixels():
    pixels = image_pixels(Image.fromarray(gradient(8, 8)), 8)
    np.testing.assert_array_equal(pixels.numpy().transpose(1, 2, 0), gradient(8, 8))


@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 12), st.integers(1, 12), st.integers(0, 99))
@settings(deadline=None)
def test_resized_mask_takes_the_pixel_under_each_centre(h, w, height, width, seed):
    mask = np.random.default_rng(seed).random((h, w)) < 0.5
    out = resize_mask(mask, height, width)
    for i, j in np.ndindex(height, width):
        y, x = Fraction((2 * i + 1) * h, 2 * height), Fraction((2 * j + 1) * w, 2 * width)
        # A centre on the border of two pixels may take either.
        rows, columns = ({math.ceil(at) - 1, math.floor(at)} for at in (y, x))
        assert out[i, j] in {mask[row, column] for row in rows for column in columns}
