"""Images of many formats, decoded as a viewer shows them."""

import io

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from swin_moe.data.decode import EncodedImage, UnreadableImage

from .helpers import encode

MODES = {1: "L", 3: "RGB"}


def _save(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def _photo(width=50, height=37) -> Image.Image:
    """Make a smooth image, which lossy formats preserve."""
    rows, columns = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([rows * 5, columns * 4, rows + columns], -1).astype(np.uint8))


def _pixels(data: bytes, mode="RGB") -> np.ndarray:
    image = EncodedImage(data, mode)
    pixels = image.pixels()
    assert pixels.shape == (image.height, image.width, len(mode))
    assert pixels.dtype == np.uint8
    return pixels


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "PPM", "TIFF", "GIF"])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_each_format_as_pillow_reads_it(kind, mode):
    data = _save(_photo(), kind)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert(mode)).reshape(37, 50, -1)
    # libjpeg reads a JPEG's own grey channel, and Pillow mixes it from the colours.
    atol = 2 if (kind, mode) == ("JPEG", "L") else 0
    np.testing.assert_allclose(_pixels(data, mode).astype(int), expected, rtol=0, atol=atol)


@pytest.mark.parametrize("options", [
    {"subsampling": 0}, {"subsampling": 1}, {"subsampling": 2}, {"progressive": True},
    {"quality": 30}, {"restart_marker_blocks": 4}, {"icc_profile": b"?" * 100},
])  # fmt: skip
def test_jpegs_are_pillows_to_the_bit(options):
    data = _save(_photo(), "JPEG", **options)
    np.testing.assert_array_equal(_pixels(data), np.asarray(Image.open(io.BytesIO(data))))


def test_a_jpeg_is_decoded_no_smaller_than_needed():
    image = EncodedImage(_save(_photo(101, 67), "JPEG"), "RGB")
    for at_least, shape in [
        ((67, 101), (67, 101)), ((35, 50), (67, 101)), ((34, 51), (34, 51)), ((18, 10), (34, 51)),
        ((17, 26), (17, 26)), ((1, 1), (9, 13)),
    ]:  # fmt: skip
        assert image.pixels(at_least).shape[:2] == shape


def test_sixteen_bits_are_scaled():
    deep = np.linspace(0, 65535, 48).reshape(6, 8).astype(np.uint16)
    expected = np.round(deep / 257)[..., None]
    for kind in ("PNG", "TIFF"):
        pixels = _pixels(_save(Image.fromarray(deep), kind))
        np.testing.assert_array_equal(pixels, np.broadcast_to(expected, (6, 8, 3)))


def test_cmyk():
    data = _save(_photo().convert("CMYK"), "JPEG", quality=95)
    np.testing.assert_allclose(_pixels(data).astype(int), np.asarray(_photo()), rtol=0, atol=12)


def test_palette_and_grey():
    photo = _photo().convert("P", palette=Image.Palette.ADAPTIVE)
    np.testing.assert_array_equal(_pixels(_save(photo, "PNG")), np.asarray(photo.convert("RGB")))
    grey = _photo().convert("L")
    for kind in ("PNG", "JPEG"):
        pixels = _pixels(_save(grey, kind))
        assert (pixels == pixels[..., :1]).all()
        assert np.abs(pixels[..., 0].astype(int) - np.asarray(grey)).max() <= 2
    black_and_white = _photo().convert("1")
    assert set(np.unique(_pixels(_save(black_and_white, "PNG")))) == {0, 255}


def test_transparency_is_white():
    rgba = np.zeros((4, 6, 4), np.uint8)
    rgba[:, :3] = (200, 100, 50, 255)
    for data in (
        _save(Image.fromarray(rgba), "PNG"),
        _save(Image.fromarray(rgba), "WEBP", lossless=True),
        _save(Image.fromarray(rgba).quantize(), "PNG"),
    ):
        pixels = _pixels(data)
        assert (pixels[:, :3] == (200, 100, 50)).all()
        assert (pixels[:, 3:] == 255).all()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_exif_rotation(kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = _save(_photo(), kind, exif=exif)
    plain = np.asarray(Image.open(io.BytesIO(data)))
    turned = {
        1: plain, 2: plain[:, ::-1], 3: plain[::-1, ::-1], 4: plain[::-1],
        5: plain.swapaxes(0, 1), 6: plain[::-1].swapaxes(0, 1),
        7: plain[::-1, ::-1].swapaxes(0, 1), 8: plain[:, ::-1].swapaxes(0, 1),
    }[orientation]  # fmt: skip
    np.testing.assert_array_equal(_pixels(data), turned)


def test_stray_bytes_after_and_within_a_jpeg_do_no_harm():
    data = _save(_photo(), "JPEG")
    scan = data.index(b"\xff\xda")
    for harmless in (data + b"junk" * 9, data[:scan] + b"\0\0\0" + data[scan:]):
        np.testing.assert_array_equal(_pixels(harmless), _pixels(data))


@pytest.mark.parametrize("extension", ["png", "jpg", "webp"])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.95])
def test_truncated_images_are_refused(extension, share):
    data = encode(3, size=64, extension=extension)
    with pytest.raises(UnreadableImage) as error:
        EncodedImage(data[: int(len(data) * share)], "RGB").pixels()
    assert error.value.kind in ("truncated", "damaged", "not an image")
    if extension != "webp":
        assert error.value.kind == "truncated"


@pytest.mark.parametrize(("data", "kind"), [
    (b"", "not an image"), (b"<html>404</html>", "not an image"), (b"\xff\xd8\xff", "not an image"),
    (b"%!PS-Adobe-3.0 EPSF-3.0", "not an image"),
])  # fmt: skip
def test_data_that_is_no_image(data, kind):
    with pytest.raises(UnreadableImage) as error:
        EncodedImage(data, "RGB").pixels()
    assert error.value.kind == kind


def test_pixels_without_a_range_are_refused():
    for pixels in (np.ones((4, 4), np.float32), np.ones((4, 4), np.int32)):
        with pytest.raises(UnreadableImage, match="no known range") as error:
            EncodedImage(_save(Image.fromarray(pixels), "TIFF"), "RGB").pixels()
        assert error.value.kind == "unsupported"


def test_an_image_that_is_too_large_is_refused_by_its_size(monkeypatch):
    for kind in ("JPEG", "PNG"):
        with pytest.raises(
            UnreadableImage, match=r"data\.max_pixels=500 to at least 1850"
        ) as refused:
            EncodedImage(_save(_photo(), kind), "RGB", max_pixels=500).pixels()
        assert refused.value.kind == "too large"


def test_metadata_that_cannot_be_read_turn_nothing():
    photo = _photo()
    long = PngInfo()
    long.add_text("workflow", "x" * (3 << 20), zip=True)
    for data in (
        _save(photo, "PNG", exif=b"Exif\0\0garbage!!"),
        _save(photo, "WEBP", exif=b"Exif\0\0garbage!!", lossless=True),
        _save(photo, "PNG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x09"),
        _save(photo, "PNG", pnginfo=long),
    ):
        np.testing.assert_array_equal(_pixels(data), np.asarray(photo))
    broken = _save(photo, "JPEG", exif=b"Exif\0\0garbage!!")
    np.testing.assert_array_equal(_pixels(broken), _pixels(_save(photo, "JPEG")))
