"""From encoded bytes to pixels: JPEG through libjpeg-turbo, everything else through Pillow."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import simplejpeg
from PIL import Image, PngImagePlugin, UnidentifiedImageError, features

# Not all of Pillow's formats: some start other programs.
FORMATS = tuple(
    name
    for name in ("JPEG", "PNG", "WEBP", "BMP", "PPM", "TIFF", "GIF", "AVIF")
    if name != "AVIF" or features.check("avif")
)
MAX_PIXELS = 178_956_970  # of one image, the default of data.max_pixels; Pillow's own limit

# `EncodedImage` checks the size before decoding, with a message that names the key.
Image.MAX_IMAGE_PIXELS = None
# Accept long texts in a PNG, such as an editor's.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 64 << 20

ORIENTATION = 0x0112  # the EXIF tag
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
JPEG_SPACES = {"RGB": "RGB", "L": "GRAY"}
MAX_REDUCTION = 8  # of libjpeg


class UnreadableImage(ValueError):
    """Data that cannot be decoded; ``kind`` is ``not an image``, ``truncated``, ``damaged``,
    ``too large`` or ``unsupported``.
    """

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind


class EncodedImage:
    """An image whose header is read; :meth:`pixels` decodes the rest.

    Args:
        data: a file's content, of one of ``FORMATS``.
        mode: Pillow's mode to decode to, ``RGB`` or ``L``.
        max_pixels: a larger image is refused before it is decoded.

    Attributes:
        height: upright, after the rotation in EXIF.
        width: upright, after the rotation in EXIF.

    Raises:
        UnreadableImage: here and in the methods.
    """

    def __init__(self, data: bytes, mode: str, max_pixels: int = MAX_PIXELS) -> None:
        self._data, self._mode, self._max_pixels = data, mode, max_pixels
        self._image: Image.Image | None = None
        with _telling_kind():
            size = _plain_jpeg_size(data)
            if size is None:
                size = self._open().size[::-1]
            else:
                self._check(*size)
        self.height, self.width = size

    def pixels(self, at_least: tuple[int, int] | None = None) -> np.ndarray:
        """Return the whole image, [H, W, C] uint8.

        Args:
            at_least: a sufficient (height, width): a JPEG may then be decoded at a half, a quarter
                or an eighth of its size, which takes a fraction of the time.
        """
        if self._image is None:
            try:
                return self._decode_jpeg(at_least or (self.height, self.width))
            except ValueError:  # also on harmless stray bytes: let Pillow decide
                pass
        with _telling_kind():
            pixels = np.asarray(_convert(self._open(), self._mode))
        return pixels.reshape(*pixels.shape[:2], -1)

    def image(self) -> Image.Image:
        """Return the whole image as Pillow's."""
        return to_image(self.pixels())

    def _open(self) -> Image.Image:
        if self._image is None:
            image = Image.open(io.BytesIO(self._data), formats=FORMATS)
            self._check(image.height, image.width)
            image.load()  # damaged pixels must raise here, not in the search for metadata
            turn = UPRIGHT.get(_orientation(image))
            self._image = image if turn is None else image.transpose(turn)
        return self._image

    def _check(self, height: int, width: int) -> None:
        if height * width > self._max_pixels:
            raise UnreadableImage(
                "too large",
                f"{width} × {height} pixels; raise data.max_pixels={self._max_pixels} to at least "
                f"{height * width}, or shrink it",
            )

    def _decode_jpeg(self, at_least: tuple[int, int]) -> np.ndarray:
        height, width, factor = self.height, self.width, 1
        while factor < MAX_REDUCTION and (
            -(-height // (2 * factor)) >= at_least[0] and -(-width // (2 * factor)) >= at_least[1]
        ):
            factor *= 2
        return simplejpeg.decode_jpeg(
            self._data,
            JPEG_SPACES[self._mode],
            min_height=-(-height // factor),
            min_width=-(-width // factor),
            min_factor=factor,
        )


@contextmanager
def _telling_kind() -> Iterator[None]:
    """Turn errors of Pillow's decoders, which may raise anything, into ``UnreadableImage``."""
    try:
        yield
    except UnreadableImage:
        raise
    except UnidentifiedImageError:  # its message names an address in memory
        raise UnreadableImage("not an image", f"not a {', '.join(FORMATS)} image") from None
    except MemoryError:
        raise UnreadableImage("too large", "it does not fit into this machine's memory") from None
    except Exception as error:
        kind = "truncated" if "truncated" in str(error) else "damaged"
        raise UnreadableImage(kind, f"{type(error).__name__}: {error}") from error


def to_image(pixels: np.ndarray) -> Image.Image:
    """Make an image of mode RGB or L from pixels [H, W, 3] or [H, W, 1] uint8."""
    return Image.fromarray(pixels if pixels.shape[2] > 1 else pixels[..., 0])


def _plain_jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Return (height, width) of a JPEG that libjpeg-turbo decodes upright, otherwise None."""
    if data[:3] != b"\xff\xd8\xff":
        return None
    try:
        height, width, space, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    if space not in ("YCbCr", "RGB", "Gray"):
        return None
    if data.find(b"Exif\0\0", 0, 1 << 16) >= 0:
        try:
            image = Image.open(io.BytesIO(data), formats=FORMATS)
        except Exception:  # broken metadata: the pixels may still be good
            return height, width
        if _orientation(image) != 1:
            return None
    return height, width


def _orientation(image: Image.Image) -> int:
    """Return EXIF's orientation, 1 to 8; 1 if the metadata cannot be read."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return int(image.getexif().get(ORIENTATION, 1))
    except Exception:  # Pillow's parsers may raise anything
        return 1


def _convert(image: Image.Image, mode: str) -> Image.Image:
    """Convert to ``mode`` as a viewer does: transparency on white, deep pixels scaled."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        deep = np.asarray(image).astype(np.float32)  # Pillow would clip them to a white image
        return Image.fromarray((deep / 257).round().astype(np.uint8)).convert(mode)
    if image.mode[0] in "IF":
        raise UnreadableImage("unsupported", f"pixels of mode {image.mode} have no known range")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert(mode)
