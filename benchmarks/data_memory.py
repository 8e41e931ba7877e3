"""Memory by the number of samples: of ``prepare-data``, of an open data set, and of its workers.

Writes tar shards of tiny images, prepares them, opens the result, and lets workers read all over
it. The memory of a main process excludes file mappings, that of a worker excludes shared memory.

    python -m benchmarks.data_memory [--json PATH] [--quick]
"""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import psutil
from PIL import Image

from benchmarks import harness
from swin_moe.config import AugmentConfig, DataConfig
from swin_moe.data import loader_of
from swin_moe.data.tools.parallel import in_processes
from tests.data.helpers import loading

COUNTS = (10_000, 100_000, 1_000_000)
SHARD = 10_000  # samples of an input shard
CLASSES = 1000


def tiny_image() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((4, 4, 3), 90, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def write_shard(job: tuple[Path, int]) -> None:
    """Write a tar of tiny images in blocks; tarfile takes minutes for a million."""
    path, start = job
    image = tiny_image()
    padded = image + bytes(-len(image) % 512)

    def header(name: str, size: int) -> bytes:
        member = tarfile.TarInfo(name)
        member.size = size
        return member.tobuf(tarfile.USTAR_FORMAT)

    with path.open("wb") as file:
        for index in range(start, start + SHARD):
            label = str(index % CLASSES).encode()
            file.write(header(f"{index:09d}.png", len(image)) + padded)
            file.write(header(f"{index:09d}.cls", len(label)) + label + bytes(512 - len(label)))
        file.write(bytes(10240))


def own_memory(process: psutil.Process) -> int:
    """Return the bytes without file mappings, including those that a forked worker still shares."""
    try:
        return sum(region.anonymous for region in process.memory_maps())
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return 0


def unshared_memory(process: psutil.Process) -> int:
    """Return the bytes that a process shares with no other."""
    try:
        return process.memory_full_info().uss
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return 0


def peak_of(command: list[str]) -> tuple[float, float, float]:
    """Run a program; return the peaks in bytes of its memory and its children's, and seconds."""
    begun = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    peaks = [0, 0]

    def watch() -> None:
        parent = psutil.Process(process.pid)
        while process.poll() is None:
            try:
                peaks[0] = max(peaks[0], own_memory(parent))
                peaks[1] = max([peaks[1], *(unshared_memory(p) for p in parent.children())])
            except psutil.NoSuchProcess:
                pass
            time.sleep(0.2)

    thread = threading.Thread(target=watch)
    thread.start()
    thread.join()
    assert process.wait() == 0
    return peaks[0], peaks[1], time.monotonic() - begun


def open_and_read(folder: str) -> None:
    """Open a data set, start two workers, read all over it, and print the bytes."""
    augment = AugmentConfig(auto_augment="", color_jitter=0, random_erase=0)
    data = DataConfig(path=folder, batch_size=500, num_workers=2)
    this = psutil.Process()
    before = own_memory(this)
    begun = time.monotonic()
    config = loading(data, augment, img_size=4, num_classes=CLASSES)
    loader = loader_of(config, training=True)
    opened = time.monotonic() - begun
    held = own_memory(this) - before
    batches = loader.epoch(0)
    next(batches)
    first = [unshared_memory(worker) for worker in this.children()]
    for _ in range(min(len(loader) - 1, 100)):
        next(batches)
    last = [unshared_memory(worker) for worker in this.children()]
    grown = max(b - a for a, b in zip(first, last, strict=True))
    print(len(loader) * 500, held, max(first), grown, opened)
    loader.close()


def main() -> None:
    if sys.argv[1:2] == ["--open"]:
        open_and_read(sys.argv[2])
        return
    options = harness.arguments(__doc__ or "").parse_args()
    rows, cells = [], []
    for count in COUNTS[:1] if options.quick else COUNTS:
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder)
            (root / "in").mkdir()
            jobs = [(root / "in" / f"train-{i:04d}.tar", i * SHARD) for i in range(count // SHARD)]
            for _ in in_processes(write_shard, jobs, os.cpu_count() or 1):
                pass
            command = [sys.executable, "-m", "swin_moe", "prepare-data", str(root / "in")]
            main_peak, child_peak, taken = peak_of(
                [*command, str(root / "out"), "--shard-size", "8"]
            )
            opened = subprocess.run(
                [sys.executable, "-m", "benchmarks.data_memory", "--open", str(root / "out")],
                capture_output=True, text=True, check=True,
            )  # fmt: skip
            _, held, worker, grown, seconds = map(float, opened.stdout.split())
        figures = {
            "prepare-data, main process, MB": round(main_peak / 1e6),
            "prepare-data, largest worker, MB": round(child_peak / 1e6),
            "prepare-data, s": round(taken, 1),
            "open data set, additional MB": round(held / 1e6, 1),
            "loader's worker, MB": round(worker / 1e6, 1),
            "after reading all over it, additional MB": round(grown / 1e6, 1),
            "to open it, s": round(seconds, 3),
        }
        for name, value in figures.items():
            unit = name.rsplit(" ", 1)[1]
            cells.append(harness.figure(name, unit, value, mode=f"{count} samples"))
        rows.append([f"{value:,}" for value in (count, *figures.values())])
        harness.report("own memory by number of samples", ["samples", *figures], rows)
    harness.write_json(options.json, cells)


if __name__ == "__main__":
    main()
