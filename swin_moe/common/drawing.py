"""Text in pictures: never drawn as formulas, and in a font that has its letters."""

from __future__ import annotations

import io
import logging
import subprocess
import unicodedata
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

from .text import plain, reason
from .writing import replacing

log = logging.getLogger("swin_moe")

LATIN = 0x250  # code points below are in every font


@contextmanager
def drawing(*names: str) -> Iterator[None]:
    """Make matplotlib draw off screen, without formulas and without warnings of glyphs.

    Args:
        names: texts in the picture that may be in any alphabet.
    """
    import matplotlib

    matplotlib.use("Agg")
    families = ["DejaVu Sans"]
    other = font_file("".join(names))
    if other != _own_font():
        from matplotlib.font_manager import FontProperties, fontManager

        fontManager.addfont(other)
        families.append(FontProperties(fname=other).get_name())
    settings: Any = {"text.parse_math": False, "text.usetex": False, "font.family": families}
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph ")
        yield


def check_picture(path: Path, *kinds: str) -> Path:
    """Return the path that ``--output`` gives, if a picture can be written there.

    Args:
        kinds: suffixes allowed in addition to .png.

    Raises:
        ValueError: its suffix is another, or its folder does not exist.
    """
    if path.suffix.lower() not in (".png", *kinds):
        raise ValueError(f"--output={plain(path)}: give the name of a .png file")
    if not path.parent.is_dir():
        raise ValueError(f"--output={plain(path)}: there is no folder {plain(path.parent)}")
    return path


def write_png(path: Path, save: Callable[[IO[bytes]], Any]) -> None:
    """Write a picture whole or not at all.

    Raises:
        ValueError: one line that names the file.
    """
    drawn = io.BytesIO()
    save(drawn)
    try:
        with replacing(path) as temporary:
            temporary.write_bytes(drawn.getvalue())
    except OSError as error:
        why = error.strerror or reason(error)
        raise ValueError(f"{plain(path)} cannot be written: {why}") from None


def font_file(text: str) -> str:
    """Return the path of a font for a text: matplotlib's, or one of the system for other letters.

    The path is empty if matplotlib is not installed.
    """
    own = _own_font()
    if not own or all(ord(letter) < LATIN for letter in text):
        return own
    lacking = _lacking(text, own)
    return system_font("".join(sorted(lacking)), own) if lacking else own


@cache
def _own_font() -> str:
    """Return the path of matplotlib's font without importing matplotlib, which is slow."""
    spec = find_spec("matplotlib")
    folders = (spec.submodule_search_locations if spec else None) or ()
    paths = (Path(folder, "mpl-data/fonts/ttf/DejaVuSans.ttf") for folder in folders)
    return next((str(path) for path in paths if path.is_file()), "")


def _lacking(text: str, font: str) -> set[str]:
    """Return the letters of a text that a font lacks; marks and control characters do not count."""
    from matplotlib.ft2font import FT2Font

    known = FT2Font(font).get_charmap()
    letters = {
        letter for letter in text if unicodedata.category(letter) not in ("Zs", "Cc", "Cf", "Mn")
    }
    return {letter for letter in letters if ord(letter) not in known}


@cache
def system_font(letters: str, own: str) -> str:
    """Return a font of the system, found by fontconfig, for letters that ours lacks."""
    codes = " ".join(f"{ord(letter):x}" for letter in letters)
    command = ["fc-match", "--format=%{file}", f":scalable=true:color=false:charset={codes}"]
    lacking, found = set(letters), own
    with suppress(OSError, subprocess.TimeoutExpired, RuntimeError):  # no fontconfig, or no font
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10)
        left = _lacking(letters, done.stdout)
        if left < lacking:
            lacking, found = left, done.stdout
    if lacking:
        shown = plain("".join(sorted(lacking)[:8]))
        log.warning("no font of this machine has %s: pictures show boxes instead", shown)
    return found
