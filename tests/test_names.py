"""Names of every kind in tables, pictures, logs and messages: unchanged or escaped."""

import ast
import errno
import logging
import os
import subprocess
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import OutOfMemoryError

from swin_moe.cli import main, models
from swin_moe.common import drawing
from swin_moe.common.drawing import font_file, write_png
from swin_moe.common.terminal import Terminal, cell
from swin_moe.common.writing import LogFile, PlainFormatter
from swin_moe.config import load_config
from swin_moe.data.tools.progress import sample_progress
from swin_moe.inspection.draw import draw_maps
from swin_moe.reporting import contact_sheet, tables
from swin_moe.reporting.plots import draw_summary
from swin_moe.tasks import Evaluation
from swin_moe.tasks.classification import Classification, class_name
from tests.parallel import MICRO
from tests.test_imports import FILES

# Name -> its printed form.
NAMES = {
    "[/cat]": "[/cat]",
    "[red]": "[red]",
    ":cat:": ":cat:",
    "price $5_ and $6^^": "price $5_ and $6^^",
    "{task} %s": "{task} %s",
    "two\nlines": r"two\nlines",
    "\x1b[31mred\r": r"\x1b[31mred\r",
    os.fsdecode(b"caf\xe9"): r"caf\xe9",
    "half \ud83d": r"half \ud83d",
    "left\u202eright": r"left\u202eright",
    "猫 🐟": "猫 🐟",
}


@pytest.mark.parametrize("make", [Terminal, lambda: Console(width=200)])
def test_the_table_of_classes_shows_names_as_they_are(make, capsys):
    count = len(NAMES)
    metrics = {"loss": 0.5, "top1": 50.0, "top5": 90.0}
    rows = [{"class": name, "images": "2", "top-1": "50.0 %"} for name in NAMES]
    result = Evaluation(metrics, 2 * count, rows=rows)
    tables.print_evaluation(make(), Path("runs/x [/y]\n"), result, Classification.metrics)
    printed = capsys.readouterr().out
    cells = [line.split("│")[1].strip() for line in printed.splitlines() if "│" in line]
    assert cells == list(NAMES.values())
    assert r"runs/x [/y]\n: top-1 50.00 %" in printed


def test_the_console_of_all_commands_reads_no_markup(capsys):
    names = list(NAMES)
    console = Terminal()
    table = Table("[/head]", title="[/title]", caption="[/caption]")
    for name in names:
        table.add_row(cell(name))
        console.print(name)
    console.print(table)
    with console.status(f"looking at {names[0]}"), sample_progress(console, names[0], 1):
        pass
    printed = capsys.readouterr().out
    for text in ("[/head]", "[/title]", "[/caption]", *NAMES.values()):
        assert text in printed or text == r"two\nlines"
    assert "\x1b" not in printed
    assert not console.live


def test_there_is_no_other_console():
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            called = isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
            assert not called or node.func.id != "Console", path.name


def test_a_log_takes_every_name(tmp_path):
    log_file = LogFile(tmp_path / "rank-0.log")
    log_file.setFormatter(PlainFormatter("%(levelname)s: %(message)s"))
    for name in NAMES:
        log_file.handle(logging.LogRecord("x", logging.INFO, "", 0, "see %s", (name,), None))
    written = (tmp_path / "rank-0.log").read_bytes().decode("utf-8")
    assert written.count("INFO: see ") == len(NAMES)
    assert r"caf\xe9" in written
    assert "\x1b" not in written


@pytest.mark.parametrize("name", [name for name in NAMES if "/" not in name and "half" not in name])
def test_pictures_take_every_name_and_do_not_warn(tmp_path, name, recwarn):
    folder = tmp_path / name
    folder.mkdir()
    (folder / "metrics.jsonl").write_text('{"step": 1, "epoch": 1, "train/loss": 1.0}\n')
    assert draw_summary(folder, Classification.metrics).stat().st_size > 1000
    pixels = Image.new("RGB", (8, 8)), np.zeros((8, 8, 3))
    contact_sheet.draw_sheet([(pixels[1], class_name(0, [name]))], [], tmp_path / "data.png")
    with drawing.drawing(name):
        draw_maps(tmp_path / "maps.png", "$", {0: pixels[1]}, {0: class_name(0, [name])}, {})
    assert not [warning for warning in recwarn if "lyph" in str(warning.message)]


def test_a_font_of_the_system_helps_out(monkeypatch, caplog):
    drawing.system_font.cache_clear()
    own = font_file("plain")
    assert own.endswith("DejaVuSans.ttf")
    stix = Path(own).with_name("STIXGeneral.ttf")
    only_there = "\u2a59"  # a mathematical symbol
    found = [str(stix)]

    def match(command, **_):
        assert command[-1].endswith(f"charset={ord(only_there):x}")
        return subprocess.CompletedProcess(command, 0, found[0], "")

    monkeypatch.setattr(subprocess, "run", match)
    assert font_file(f"x{only_there}\u200d") == str(stix)
    with drawing.drawing(only_there):
        import matplotlib

        assert matplotlib.rcParams["font.family"] == ["DejaVu Sans", "STIXGeneral"]
    assert not caplog.text
    drawing.system_font.cache_clear()
    for found[0] in (own, "/dev/null", ""):  # one that lacks it too, and none at all
        assert font_file(only_there) == own
        drawing.system_font.cache_clear()
    assert caplog.text.count(f"no font of this machine has {only_there}: pictures show boxes") == 3


def test_a_picture_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    def full(_descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    picture = tmp_path / "data.png"
    picture.write_bytes(b"old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ValueError, match=r"data\.png cannot be written: No space left on device$"):
        write_png(picture, lambda file: file.write(b"new"))
    assert picture.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [picture]


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("\n  $5_\n  ^\nParseException"), r"$5_\n  ^\nParseException"),
        (ValueError(f"\n first \n{'x' * 200}"), "first"),
        (ValueError(""), "ValueError"),
        (FileNotFoundError(2, "No such file or directory", os.fsdecode(b"caf\xe9")),
         r"caf\xe9: No such file or directory: check the path"),
        (RuntimeError("boom"), "RuntimeError: boom (--debug shows the traceback)"),
        (KeyError(), "KeyError (--debug shows the traceback)"),
        (RuntimeError("Caught OSError in DataLoader worker process 0.\nOriginal Traceback (most "
                      "recent call last):\n  File x\nOSError: gone\n"),
         "RuntimeError: OSError: gone (--debug shows the traceback)"),
        (RuntimeError("cumsum_cuda_kernel does not have a deterministic implementation, but you "
                      "set 'torch.use_deterministic_algorithms(True)'. You can turn it off."),
         "train.deterministic=true: cumsum_cuda_kernel has no deterministic form here; set it to "
         "false"),
        (OutOfMemoryError("CUDA out of memory."),
         "CUDA out of memory: lower data.batch_size, or see what fits by `swin-moe plan CONFIG`"),
    ],
)  # fmt: skip
def test_an_error_is_one_line_that_is_never_empty(monkeypatch, capsys, error, line):
    def fail(*_):
        raise error

    monkeypatch.setattr(models, "models_command", fail)
    monkeypatch.setattr(main, "quiet_libraries", lambda: None)
    assert main.main(["models"]) in (1, 2)
    assert capsys.readouterr().err == f"swin-moe: error: {line}\n"
    main.main(["models", "--debug"])
    shown = capsys.readouterr().err
    assert "Traceback" in shown
    assert "--debug" not in shown.splitlines()[-1]


def test_a_run_s_log_is_named_instead_of_debug(monkeypatch, capsys, tmp_path):
    def fail(*_):
        raise RuntimeError("boom")

    log = tmp_path / "rank-0.log"
    monkeypatch.setattr(LogFile, "current", staticmethod(lambda: log))
    monkeypatch.setattr(models, "models_command", fail)
    monkeypatch.setattr(main, "quiet_libraries", lambda: None)
    assert main.main(["models"]) == 1
    error = capsys.readouterr().err
    assert error == f"swin-moe: error: RuntimeError: boom (the traceback is in {log})\n"


def test_the_console_shows_warnings_as_lines_and_leaves_timm_to_the_logs(monkeypatch, capsys):
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    logging.captureWarnings(False)  # a command that ran in this process has left it on
    try:
        main.quiet_libraries()
        logging.getLogger("timm.scheduler").warning("a cosine of one update has no effect")
        logging.getLogger("swin_moe").warning("skipped caf\udce9")
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.warn("odd", UserWarning, stacklevel=1)
    finally:
        logging.captureWarnings(False)
    line = capsys.readouterr().err
    assert line == "WARNING: skipped caf\\xe9\nWARNING: UserWarning: odd\n"


def test_the_header_s_rate_is_as_people_write_it():
    config = load_config(MICRO, ["optimizer.base_lr=5e-4"])
    assert tables._rate(config, 32) == "5e-4 × 32/512 = 3.1e-5 at its peak"
    config.optimizer.base_lr, config.optimizer.layer_decay = 0.0125, 0.87
    line = "0.0125 × 1024/512 = 0.025 at its peak, × 0.87 for each layer below the head"
    assert tables._rate(config, 1024) == line
