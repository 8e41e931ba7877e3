"""Generates JPEGs that are as costly to decode as photographs; none can be bundled."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image


def photo(seed: int, width: int = 500, height: int = 375) -> Image.Image:
    """Return colours with a photograph's spectrum: noise of each scale, less of finer ones."""
    rng = np.random.default_rng(seed)
    pixels = np.zeros((height, width, 3), np.float32)
    for octave in range(2, 9):
        cells = 2**octave
        shape = max(2, cells * height // width), cells
        grey = _enlarged(rng.normal(size=shape), width, height)[..., None]
        colour = [_enlarged(rng.normal(size=shape), width, height) for _ in range(3)]
        pixels += (grey + 0.35 * np.stack(colour, -1)) / cells**0.75
    pixels = (pixels - pixels.mean()) / pixels.std() * 55 + 120
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def jpeg(seed: int, width: int = 500, height: int = 375, quality: int = 94) -> bytes:
    """Return a :func:`photo` as a JPEG with half the chroma resolution; ~50 kB by default."""
    buffer = io.BytesIO()
    photo(seed, width, height).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def _enlarged(noise: np.ndarray, width: int, height: int) -> np.ndarray:
    image = Image.fromarray(noise.astype(np.float32))
    return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))
