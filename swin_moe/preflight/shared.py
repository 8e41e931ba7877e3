"""Checks that all processes see the data and one run directory, and can write there."""

from __future__ import annotations

import contextlib
import secrets
import time
from pathlib import Path

from ..config import Config
from ..distributed import World, broadcast_object, gather_objects
from .agreement import named
from .facts import Facts

_PATIENCE = 5.0  # seconds; a network file system shows new files a little later


def check_folder(config: Config, world: World, facts: list[Facts]) -> list[str]:
    """Return lines about ranks that do not see a file that rank 0 writes next to the run directory.

    The file is removed again, and so are folders that were made for it.
    """
    folder = Path(config.train.output).absolute().parent
    token = made = None
    problem = ""
    if world.is_main:
        try:
            made = _make(folder)
            token = folder / f".swin_moe-{secrets.token_hex(8)}"
            token.write_text(token.name)
        except OSError as error:
            problem = f"{facts[0].host}: {folder} cannot be written: {error.strerror}"
    name, problem = broadcast_object(("" if token is None else token.name, problem))
    seen = gather_objects(problem or _see(folder / name, world.rank))
    if world.is_main:
        for path in folder.glob(f"{name}*") if name else ():
            path.unlink(missing_ok=True)
        for path in made or ():
            with contextlib.suppress(OSError):  # somebody uses it meanwhile
                path.rmdir()
    if problem:
        return [problem]
    lines = []
    for text in dict.fromkeys(seen):
        if text:
            ranks = [rank for rank, other in enumerate(seen) if other == text]
            lines.append(f"{named(facts, ranks)}: {text}")
    return lines


def _make(folder: Path) -> list[Path]:
    """Make the folder; return the folders that were missing, the innermost first."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    return missing


def _see(token: Path, rank: int) -> str:
    """Return this rank's problem with the folder of ``token``; empty if there is none."""
    deadline = time.monotonic() + _PATIENCE
    try:
        while not token.exists():
            if time.monotonic() >= deadline:
                return (
                    f"{token.parent} is not the folder in which rank 0 writes: train.output must "
                    "be on a file system that all hosts share"
                )
            time.sleep(0.1)
        if token.read_text() != token.name:
            return f"{token.parent} holds another file than rank 0 wrote"
        token.with_name(f"{token.name}-{rank}").write_text("")
    except OSError as error:
        return f"{token.parent} cannot be used: {error.strerror}"
    return ""


def check_data(config: Config, facts: list[Facts]) -> list[str]:
    """Return a line about ranks without ``data.path``, if others have it."""
    there = gather_objects(Path(config.data.path).exists())
    missing = [rank for rank, exists in enumerate(there) if not exists]
    if not missing or not any(there):  # none has it: it may be the name of a bundled sample
        return []
    who, has = named(facts, missing), named(facts, [there.index(True)])
    return [f"{who}: data.path={config.data.path} is not there, but {has} has it"]
