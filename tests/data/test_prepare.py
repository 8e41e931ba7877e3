"""From any data set to shards: after kills too, and with a correct index."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from swin_moe.data.readers import index
from swin_moe.data.source import open_splits
from swin_moe.data.tools import commands, prepare
from tests.parallel import PATIENCE

from .helpers import encode, make_folder, make_shards, open_loader, samples, write_shard


def _prepare(path, output, **options):
    options = {"workers": 2} | options
    commands.prepare_data(path, output, Console(quiet=True), **options)
    return open_splits(output)


def _contents(source):
    return {source.read(i): int(source.labels[i]) for i in range(len(source))}


def _refused(pattern, path, output, **options):
    with pytest.raises(ValueError, match=pattern) as error:
        _prepare(path, output, **options)
    assert "\n" not in str(error.value)


def _small_shards(monkeypatch, size=3000):
    """Make a megabyte smaller."""
    settings = prepare.Settings

    def make(**values):
        return settings(**{**values, "shard_bytes": size})

    monkeypatch.setattr(commands, "Settings", make)


def test_a_folder_becomes_shards(tmp_path, monkeypatch):
    _small_shards(monkeypatch, 9000)
    folder = make_folder(tmp_path / "train", ["ant", "bee", "cow"], per_class=7)
    expected = {path.read_bytes(): path.parent.name for path in folder.rglob("*.png")}
    source = _prepare(folder, tmp_path / "out")["train"]
    assert source.class_names == ["ant", "bee", "cow"]
    assert {c: source.class_names[label] for c, label in _contents(source).items()} == expected
    assert len(source.paths) > 3
    assert source.class_counts.tolist() == [7, 7, 7]
    assert (np.diff(source.labels) != 0).sum() > 5  # shuffled
    assert not (tmp_path / "out" / prepare.WORK).exists()
    assert source.key(0).rsplit("-", 1)[-1] in "0123456"  # the file's own name ends it
    loader = open_loader(tmp_path / "out", num_classes=3, num_workers=2)
    assert len({i for batch in loader.epoch(0) for i in batch.indices.tolist()}) == 20
    _refused("holds shards already", folder, tmp_path / "out")
    (tmp_path / "out" / "train.json").unlink()  # as if another program had written them
    _refused("holds shards already", folder, tmp_path / "out")


def test_the_same_seed_gives_the_same_bytes(tmp_path, monkeypatch):
    _small_shards(monkeypatch)
    folder = make_folder(tmp_path / "train", ["ant", "bee"], per_class=7)
    digests = []
    for output, seed, workers in (("a", 0, 1), ("b", 0, 2), ("c", 1, 1)):
        _prepare(folder, tmp_path / output, seed=seed, workers=workers)
        manifest = index.read_index(tmp_path / output / "train.json")[0]
        digests.append([shard.sha256 for shard in manifest.shards])
        for shard in manifest.shards:
            assert prepare.sha256(tmp_path / output / shard.name) == shard.sha256
    assert digests[0] == digests[1] != digests[2]


def test_a_share_of_each_class_is_held_out(tmp_path):
    folder = make_folder(tmp_path / "train", ["ant", "bee", "cow"], per_class=10)
    (folder / "cow" / "0.png").unlink()
    splits = _prepare(folder, tmp_path / "out", val_share=0.25)
    assert splits["val"].class_counts.tolist() == [2, 2, 2]
    assert splits["train"].class_counts.tolist() == [8, 8, 7]
    both = [_contents(split) for split in splits.values()]
    assert not both[0].keys() & both[1].keys()
    assert splits["val"].class_names == ["ant", "bee", "cow"]


def test_classes_are_chosen_and_numbered_by_a_file(tmp_path):
    folder = make_folder(tmp_path / "train", ["ant", "bee", "cow"], per_class=2)
    (tmp_path / "classes.txt").write_text("cow\nyak\nant\n\n")
    source = _prepare(folder, tmp_path / "out", classes=tmp_path / "classes.txt")["train"]
    assert source.class_names == ["cow", "yak", "ant"]
    assert source.class_counts.tolist() == [2, 0, 2]
    assert _contents(source)[(folder / "ant" / "1.png").read_bytes()] == 2
    (tmp_path / "numbers.txt").write_text("5\n3\n")
    shards = make_shards(tmp_path / "shards", 8)
    source = _prepare(shards, tmp_path / "out2", classes=tmp_path / "numbers.txt")["train"]
    assert _contents(source) == {encode(5): 0, encode(3): 1}
    (tmp_path / "twice.txt").write_text("ant\nant\n")
    _refused("'ant' is listed twice", folder, tmp_path / "o", classes=tmp_path / "twice.txt")
    (tmp_path / "none.txt").write_text("yak\n")
    _refused("none of the 1 listed classes is in the data, first listed 'yak', first in the data",
             folder, tmp_path / "o", classes=tmp_path / "none.txt")  # fmt: skip


def test_listed_classes_are_found_with_either_accents_and_named_if_absent(tmp_path, capsys):
    folder = make_folder(tmp_path / "train", ["ant", "cafe\u0301"])
    (tmp_path / "classes.txt").write_text("caf\u00e9\nyak\n", encoding="utf-8")
    options = {"classes": tmp_path / "classes.txt", "workers": 1}
    commands.prepare_data(folder, tmp_path / "out", Console(), **options)
    assert open_splits(tmp_path / "out")["train"].class_counts.tolist() == [2]
    assert "not in the data, 1 of 2 of --classes: 'yak'" in capsys.readouterr().out


def test_larger_images_are_resized(tmp_path):
    folder = make_folder(tmp_path / "train", ["ant"], per_class=1)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    large = Image.fromarray(np.full((40, 60, 3), (200, 10, 60), np.uint8))
    large.save(folder / "ant" / "large.jpg", exif=exif)
    source = _prepare(folder, tmp_path / "out", resize=20)["train"]
    small, resized = sorted(_contents(source), key=lambda c: c[:1] == b"\xff")
    assert small == (folder / "ant" / "0.png").read_bytes()
    image = Image.open(io.BytesIO(resized))
    assert (image.size, image.format) == ((20, 30), "JPEG")
    np.testing.assert_allclose(np.asarray(image)[15, 10].astype(int), (200, 10, 60), atol=4)


def test_unreadable_samples_are_left_out_and_listed(tmp_path):
    folder = make_folder(tmp_path / "train", ["ant", "bee"], per_class=4)
    (folder / "ant" / "2.png").write_bytes(b"<html>")
    (folder / "bee" / "3.png").write_bytes(encode(3, size=64)[:500])
    source = _prepare(folder, tmp_path / "out", resize=8)["train"]
    assert len(source) == 6
    listed = (tmp_path / "out" / "bad-samples-train.jsonl").read_text().splitlines()
    bad = sorted((json.loads(line) for line in listed), key=lambda sample: sample["key"])
    assert [sample["kind"] for sample in bad] == ["not an image", "truncated"]
    assert bad[0]["key"] == str(folder / "ant" / "2.png")


def test_a_source_that_goes_away_ends_the_run(tmp_path, monkeypatch):
    folder = make_folder(tmp_path / "train", ["ant", "bee"], per_class=4)
    _small_shards(monkeypatch)
    usage = prepare.shutil.disk_usage(tmp_path)

    def unplugged(_path):  # called at the end of the plan
        folder.rename(tmp_path / "away")
        return usage

    monkeypatch.setattr(prepare.shutil, "disk_usage", unplugged)
    with pytest.raises(FileNotFoundError, match=r"\.png"):
        _prepare(folder, tmp_path / "out")
    assert not (tmp_path / "out" / "train.json").exists()
    (tmp_path / "away").rename(folder)
    assert len(_prepare(folder, tmp_path / "out")["train"]) == 8
    for path in folder.rglob("*.png"):
        path.write_bytes(b"<html>")
    _refused("none of 200 samples can be read, first .*png", folder, tmp_path / "none")


def test_both_splits_of_a_root(tmp_path):
    make_folder(tmp_path / "in" / "train", ["ant", "bee"])
    make_folder(tmp_path / "in" / "val", ["ant", "bee"], per_class=1)
    splits = _prepare(tmp_path / "in", tmp_path / "out")
    assert {name: len(source) for name, source in splits.items()} == {"train": 4, "val": 2}
    _refused("has a validation split of its own", tmp_path / "in", tmp_path / "o", val_share=0.1)
    shutil.rmtree(tmp_path / "in" / "val" / "ant")
    val = _prepare(tmp_path / "in", tmp_path / "less")["val"]
    assert val.labels.tolist() == [1]  # by name: none of the first class
    shutil.rmtree(tmp_path / "in" / "val")
    make_folder(tmp_path / "in" / "train", ["cafe\u0301"])
    make_folder(tmp_path / "in" / "val", ["caf\u00e9"])
    assert _prepare(tmp_path / "in", tmp_path / "accents")["val"].labels.tolist() == [2, 2]
    make_folder(tmp_path / "in" / "val", ["cow"])
    _refused("the validation split has other classes than", tmp_path / "in", tmp_path / "o")


def test_splits_are_no_classes_and_are_named_if_left_out(tmp_path, caplog):
    make_folder(tmp_path / "in" / "training", ["ant", "bee"])
    make_folder(tmp_path / "in" / "validation", ["ant", "bee"])
    _refused("its classes are 'training' and 'validation', which", tmp_path / "in", tmp_path / "o")
    (tmp_path / "in" / "training").rename(tmp_path / "in" / "train")
    make_folder(tmp_path / "in", ["test"])  # flat: it has no labels
    open_splits(tmp_path / "in")
    assert not caplog.messages
    (tmp_path / "in" / "validation").rename(tmp_path / "in" / "valid")
    assert list(open_splits(tmp_path / "in")) == ["train"]
    assert "train and val are read, but not valid: rename it to val" in caplog.text


def test_a_missing_file_of_a_list_is_left_out(tmp_path):
    make_folder(tmp_path, ["ant"])
    (tmp_path / "x_map.txt").write_text("ant/0.png\t0\nant/gone.png\t0\nant/1.png\t0\n")
    assert len(_prepare(tmp_path / "x_map.txt", tmp_path / "out")["train"]) == 2
    assert "gone.png" in (tmp_path / "out" / "bad-samples-train.jsonl").read_text()


def test_a_big_tiff_is_kept(tmp_path):
    folder = make_folder(tmp_path / "train", ["ant"])
    Image.new("RGB", (4, 4)).save(folder / "ant" / "big.tif", big_tiff=True)
    assert len(_prepare(folder, tmp_path / "out")["train"]) == 3


def test_wrong_use(tmp_path, monkeypatch):
    folder = make_folder(tmp_path / "train", ["ant"])
    _refused(r"--max-pixels=0: give", folder, tmp_path / "o", max_pixels=0)
    _refused(r"--resize=-3: give pixels", folder, tmp_path / "o", resize=-3)
    _refused(r"--val=0\.01: it would hold out none of 2", folder, tmp_path / "o", val_share=0.01)
    _refused(r"--val=0\.99: it would hold out all of 2", folder, tmp_path / "o", val_share=0.99)
    make_folder(tmp_path / "empty", ["ant"], per_class=0)
    with pytest.raises(ValueError, match="empty holds no images"):
        commands.verify_data(tmp_path / "empty", Console(quiet=True), tmp_path / "bad.jsonl")
    _refused(r"--val=1\.5", folder, tmp_path / "o", val_share=1.5)
    _refused(r"--shard-size=0", folder, tmp_path / "o", shard_megabytes=0)
    _refused(r"nowhere: nothing that can be read", tmp_path / "nowhere", tmp_path / "o")
    usage = prepare.shutil.disk_usage(tmp_path)._replace(free=100)
    monkeypatch.setattr(prepare.shutil, "disk_usage", lambda path: usage)
    _refused(r"o: the shards need about .* kB, and the disk has 100 bytes", folder, tmp_path / "o")


SLOW = """
import sys, time
from swin_moe.cli import main as cli
from swin_moe.data.tools import commands, prepare
digest, settings = prepare.sha256, prepare.Settings
def slowly(path):
    time.sleep(0.5)  # in each shard
    return digest(path)
prepare.sha256 = slowly
commands.Settings = lambda **values: settings(**{**values, "shard_bytes": 3000})
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_killed_and_gone_on_with(tmp_path, how, monkeypatch):
    folder = make_folder(tmp_path / "train", ["ant", "bee"], per_class=20)
    _small_shards(monkeypatch)
    _prepare(folder, tmp_path / "whole")
    expected = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    output = tmp_path / "out"
    command = [
        sys.executable,
        "-c",
        SLOW,
        "prepare-data",
        str(folder),
        str(output),
        "--workers",
        "2",
    ]
    program = subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
        # A shell that runs the tests in the background makes them ignore it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    records = output / prepare.WORK
    while len(list(records.glob("*.tar.json"))) < 4:
        assert program.poll() is None, program.stderr.read()
        time.sleep(0.02)
    program.send_signal(how)
    printed = program.communicate(timeout=PATIENCE)[1]
    if how == signal.SIGINT:
        assert "interrupted; the same command goes on" in printed
    assert not (output / "train.json").exists()
    deadline = time.monotonic() + PATIENCE  # its processes end with it
    while any(str(output).encode() in _command(p) for p in os.listdir("/proc") if p.isdigit()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    recorded = [output / path.stem for path in records.glob("*.tar.json")]
    done = {path: path.stat().st_mtime_ns for path in recorded}
    assert 4 <= len(done) < len(list(expected)) - 3
    _refused("unfinished preparation with another 'seed' \\(0, now 1\\)", folder, output, seed=1)
    _prepare(folder, output)
    assert {path.name: path.read_bytes() for path in output.iterdir()} == expected
    assert all(path.stat().st_mtime_ns == time_ns for path, time_ns in done.items())


def _command(process: str) -> bytes:
    try:
        with open(f"/proc/{process}/cmdline", "rb") as file:
            return file.read()
    except OSError:
        return b""


# ---------------------------------------------------------------------------------------------
# The index


@pytest.fixture
def prepared(tmp_path, monkeypatch):
    _small_shards(monkeypatch)
    make_shards(tmp_path / "in", 8)
    _prepare(tmp_path / "in", tmp_path / "out")
    return tmp_path / "out"


def test_an_index_that_does_not_match_its_shards(prepared):
    def refused(pattern):
        with pytest.raises(ValueError, match=pattern) as error:
            open_loader(prepared)
        assert "\n" not in str(error.value)

    shard = prepared / "train-000001.tar"
    content = shard.read_bytes()
    shard.write_bytes(content + bytes(512))
    refused(r"train-000001\.tar: the shard has [\d,]+ bytes, but .*train\.json says .*copy it")
    shard.unlink()
    refused(r"train-000001\.tar: No such file.*, but .*train\.json lists the shard: copy it")
    shard.write_bytes(content)
    table = prepared / "train.index.npy"
    kept = table.read_bytes()
    np.save(table, np.zeros(3, index.RECORD))
    refused(r"train\.json: train\.index\.npy is not its table: remove train\.json")
    table.write_bytes(kept[:50])
    refused(r"train\.json: the index is damaged or incomplete")
    table.write_bytes(b"")
    refused(r"train\.json: the index is damaged or incomplete")
    table.unlink()
    refused(r"train\.json: the index is damaged or inc.* \(.*No such file.*remove train\.json")
    table.write_bytes(kept)
    manifest = json.loads((prepared / "train.json").read_text())
    manifest["shards"][0]["name"] = "../train-000000.tar"
    (prepared / "train.json").write_text(json.dumps(manifest))
    refused(r"train\.json: the index is damaged or incomplete \(shards\.0\.name: ")
    (prepared / "train.json").write_text('{"shards": 1}')
    refused(r"train\.json: the index is damaged or incomplete \(shards: Input should be")
    (prepared / "train.json").unlink()
    assert open_loader(prepared).num_samples == 8  # by the shards themselves


def test_verify_reads_every_sample_and_digest(tmp_path, prepared, capsys):
    console = Console(width=200)
    listed = tmp_path / "bad.jsonl"
    assert commands.verify_data(prepared, console, listed, workers=2)
    assert "8 samples: all can be read" in capsys.readouterr().out
    assert not list(tmp_path.glob("bad*.jsonl"))
    shard = prepared / "train-000001.tar"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1  # of the padding: every image is well
    shard.write_bytes(content)
    assert not commands.verify_data(prepared, console, listed, workers=2)
    assert "train-000001.tar: its content is not what was written" in capsys.readouterr().out
    record = index.read_index(prepared / "train.json")[1][3]
    place = int(record["offset"]) + int(record["size"]) // 2
    shard = prepared / f"train-{record['shard']:06d}.tar"
    content = bytearray(shard.read_bytes())
    content[place : place + 20] = bytes(20)
    shard.write_bytes(content)
    assert not commands.verify_data(prepared, console, listed, workers=2)
    out = capsys.readouterr().out
    assert "8 samples: 1 bad ones are listed in" in out
    (bad,) = (tmp_path / "bad-train.jsonl").read_text().splitlines()
    assert json.loads(bad)["key"].startswith(str(shard))


@pytest.mark.parametrize("readonly", [False, True])
def test_the_index_of_anyones_shards_is_kept(tmp_path, monkeypatch, readonly):
    monkeypatch.setattr("swin_moe.data.readers.shards.INDEXED_BYTES", 0)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    make_shards(tmp_path / "in", 8)
    if readonly:  # root may write anywhere, so the name is taken instead
        (tmp_path / "in" / ".swin_moe_index").write_text("")
    scans = []
    from swin_moe.data.readers import shards

    scan = shards.scan_shard
    monkeypatch.setattr(shards, "scan_shard", lambda *a: scans.append(a) or scan(*a))
    first = open_splits(tmp_path / "in")["train"]
    assert len(scans) == 2
    again = open_splits(tmp_path / "in")["train"]
    assert len(scans) == 2
    assert isinstance(again.table, np.memmap)
    assert (tmp_path / "home").exists() == readonly
    assert _contents(again) == _contents(first) == {encode(i): i for i in range(8)}
    write_shard(tmp_path / "in" / "train-1.tar", samples(4, 20))
    changed = open_splits(tmp_path / "in")["train"]
    assert len(scans) == 4
    assert sorted(changed.labels.tolist()) == [0, 1, 2, 3, 20, 21, 22, 23]
