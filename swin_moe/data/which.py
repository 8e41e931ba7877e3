"""The rule which files are samples, for folders, archives and shards."""

from __future__ import annotations

from collections import Counter
from functools import lru_cache

# Suffixes of the formats in decode.py, which decodes a file by its content.
SUFFIXES = frozenset(
    ("jpg", "jpeg", "jpe", "jfif", "png", "webp", "avif", "gif", "bmp", "tif", "tiff", "ppm", "pgm",
     "pbm", "pnm")
)  # fmt: skip
# Folders and files that systems and programs leave behind.
COMPANIONS = frozenset(
    {
        "__macosx",
        "thumbs.db",
        "ehthumbs.db",
        "desktop.ini",
        "@eadir",
        "#recycle",
        "#snapshot",
        "~snapshot",
        "@recycle",
        "@recently-snapshot",
        "@__thumb",
        "@tmp",
        "lost+found",
        "$recycle.bin",
        "system volume information",
        "__pycache__",
    }
)
SHOWN = 4  # kinds in one line


def suffix(name: str) -> str:
    """Return the part after the last dot, in lower case; empty if there is none."""
    stem, _, end = name.rpartition("/")[2].rpartition(".")
    return end.lower() if stem else ""


def is_image(name: str) -> bool:
    """Return whether a file's name is that of an image."""
    return suffix(name) in SUFFIXES


def is_companion(name: str) -> bool:
    """Return whether one part of a path is hidden or a system's: no sample and no class."""
    return (name.startswith(".") and name not in (".", "..")) or name.lower() in COMPANIONS


def walk_order(path: str) -> tuple[list[str], str]:
    """Return a sort key of paths as a folder is walked: its files by name, then its folders."""
    folder, _, name = path.rpartition("/")
    return folder.split("/") if folder else [], name


def among_companions(path: str) -> bool:
    """Return whether any part of a path is a companion, see :func:`is_companion`."""
    folder, _, name = path.rpartition("/")
    return is_companion(name) or (folder != "" and _companion_folder(folder))


@lru_cache(maxsize=1024)  # a folder's files follow each other
def _companion_folder(path: str) -> bool:
    return any(is_companion(part) for part in path.split("/"))


class PassedOver:
    """A count of the files that are no samples, by kind."""

    def __init__(self) -> None:
        self.kinds: Counter[str] = Counter()

    def add(self, name: str) -> None:
        """Count a file, unless a system or program left it behind."""
        base = name.rpartition("/")[2]
        if base.startswith("."):
            if is_image(base) and not base.startswith("._"):
                self.kinds["hidden"] += 1
        elif not is_companion(base):
            end = suffix(base)
            kind = f".{end}" if end.isalnum() and len(end) < 12 else "without a suffix"
            self.kinds["images in no class folder" if is_image(base) else kind] += 1

    def line(self) -> str:
        """Return ``12 files passed over: 8 .txt, 4 hidden``; empty without any."""
        if not self.kinds:
            return ""
        most = self.kinds.most_common(SHOWN)
        total = self.kinds.total()
        parts = [f"{count:,} {kind}" for kind, count in most]
        if rest := total - sum(count for _, count in most):
            parts.append(f"{rest:,} of other kinds")
        return f"{total:,} {'file' if total == 1 else 'files'} passed over: {', '.join(parts)}"
