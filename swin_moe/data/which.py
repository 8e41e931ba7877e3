"""Which files are samples: one rule for folders, archives, shards and whatever packs them."""

from __future__ import annotations

from collections import Counter

# What decode.py reads. A file's content decides how it is decoded, not its suffix.
SUFFIXES = frozenset(
    ("jpg", "jpeg", "jpe", "jfif", "png", "webp", "avif", "gif", "bmp", "tif", "tiff", "ppm", "pgm",
     "pbm", "pnm")
)  # fmt: skip
# Folders and files that systems and programs put among other people's files.
COMPANIONS = frozenset(
    {
        "__macosx",
        "thumbs.db",
        "ehthumbs.db",
        "desktop.ini",
        "@eadir",
        "#recycle",
        "#snapshot",
        "lost+found",
        "$recycle.bin",
        "system volume information",
        "__pycache__",
    }
)
SHOWN = 4  # kinds in one line


def suffix(name: str) -> str:
    """The part after the last dot, in lower case; empty if there is none."""
    return name.rpartition("/")[2].rpartition(".")[2].lower() if "." in name else ""


def is_image(name: str) -> bool:
    """Whether a file's name is that of an image."""
    return suffix(name) in SUFFIXES


def is_companion(name: str) -> bool:
    """Whether one part of a path is hidden or belongs to a system: no sample and no class."""
    return (name.startswith(".") and name not in (".", "..")) or name.lower() in COMPANIONS


def among_companions(path: str) -> bool:
    """Whether any part of a path is, see :func:`is_companion`."""
    return any(is_companion(part) for part in path.split("/"))


class PassedOver:
    """Files that are no samples, by kind, for one line to the person whose they are."""

    def __init__(self) -> None:
        self.kinds: Counter[str] = Counter()

    def add(self, name: str) -> None:
        """Count a file; what a system put there is not worth a word."""
        base = name.rpartition("/")[2]
        if base.startswith("."):
            if is_image(base) and not base.startswith("._"):
                self.kinds["hidden"] += 1
        elif not is_companion(base):
            end = suffix(base)
            self.kinds[f".{end}" if end.isalnum() and len(end) < 12 else "without a suffix"] += 1

    def line(self) -> str:
        """``12 files passed over: 8 .txt, 4 hidden``; empty if there are none."""
        if not self.kinds:
            return ""
        most = self.kinds.most_common(SHOWN)
        said = [f"{count:,} {kind}" for kind, count in most]
        if rest := self.kinds.total() - sum(count for _, count in most):
            said.append(f"{rest:,} of other kinds")
        total = self.kinds.total()
        return f"{total:,} {'file' if total == 1 else 'files'} passed over: {', '.join(said)}"
