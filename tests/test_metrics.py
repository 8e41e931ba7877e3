"""Logs survive a kill and a resume; the picture is drawn from them."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from swin_moe.reporting import metric_log
from swin_moe.reporting.metric_log import CELL, Meter, MetricLog, heat_map, read_metrics
from swin_moe.reporting.plots import draw_summary, show_picture
from swin_moe.tasks.classification import Classification

METRICS = Classification.metrics


def test_meter_is_a_mean_since_the_last_read():
    meter = Meter(torch.device("cpu"))
    for value in (1.0, 2.0, 6.0):
        meter.update(torch.tensor(value))
    assert meter.read() == 3.0
    assert meter.read() != meter.read()  # NaN without updates


def records(steps):
    return [
        {"step": s, "epoch": s / 4, "train/loss": 1 / s, "moe/layers.0.blocks.1/load": [0.5, 0.5]}
        for s in steps
    ]


def test_resume_cuts_off_what_it_takes_back(tmp_path):
    log = MetricLog(tmp_path, tensorboard=True, resume_step=None)
    for record in records(range(1, 6)):
        log.write(record)
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "tr')  # a kill within a line
    log = MetricLog(tmp_path, tensorboard=True, resume_step=3)
    for record in records([4]):
        log.write(record)
    log.close()
    assert [r["step"] for r in read_metrics(tmp_path)] == [1, 2, 3, 4]
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4]
    assert "moe/layers.0.blocks.1/load/expert1" in events.Tags()["scalars"]


def test_nan_and_infinity_are_null_in_strict_json(tmp_path):
    def refuse(word):
        raise ValueError(word)

    bad = {"step": 2, "epoch": 0.5, "train/loss": float("nan"), "train/grad_norm": float("inf"),
           "moe/layers.0.blocks.1/load": [float("nan"), 0.5]}  # fmt: skip
    log = MetricLog(tmp_path, tensorboard=True, resume_step=None)
    for record in (*records([1]), bad):
        log.write(record)
    log.close()
    with log.path.open("a") as file:
        file.write('{"step": 3, "epoch": 1.0, "train/loss": NaN}\n')  # from an older version
    MetricLog(tmp_path, tensorboard=False, resume_step=3).close()
    lines = log.path.read_text().splitlines()
    strict = [json.loads(line, parse_constant=refuse) for line in lines]
    assert [record["train/loss"] for record in strict] == [1.0, None, None]
    assert strict[1]["moe/layers.0.blocks.1/load"] == [None, 0.5]
    assert [math.isnan(record["train/loss"]) for record in read_metrics(tmp_path)] == [0, 1, 1]
    assert draw_summary(tmp_path, METRICS).exists()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert math.isnan(events.Scalars("train/loss")[1].value)


def test_a_clock_that_was_set_back_doubles_no_step_in_tensorboard(tmp_path, monkeypatch):
    now = [1_800_000_000 * 10**9]
    monkeypatch.setattr(metric_log.time, "time_ns", lambda: now[0])
    for resume_step, steps in ((None, range(1, 7)), (4, range(5, 9))):
        log = MetricLog(tmp_path, tensorboard=True, resume_step=resume_step)
        for record in records(steps):
            log.write(record)
        log.close()
        now[0] -= 3600 * 10**9
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == list(range(1, 9))


def test_a_full_disk_is_reported_once_and_ends_nothing(tmp_path, caplog):
    log = MetricLog(tmp_path, tensorboard=True, resume_step=None)
    log.path.unlink()
    log.path.symlink_to("/dev/full")
    (events,) = (tmp_path / "tensorboard").iterdir()
    events.rename(tmp_path / "whole")
    events.symlink_to("/dev/full")
    for record in records(range(1, 30)):
        log.write(record)
    assert caplog.text.count("metrics.jsonl cannot be written (No space left on device)") == 1
    assert caplog.text.count(f"{events.name} cannot be written (No space left on device)") == 1
    log.path.unlink()
    events.unlink()
    (tmp_path / "whole").rename(events)
    log.write(records([30])[0])
    log.close()
    assert [record["step"] for record in read_metrics(tmp_path)] == list(range(1, 31))
    accumulator = EventAccumulator(str(tmp_path / "tensorboard"))
    accumulator.Reload()
    assert len(accumulator.Scalars("train/loss")) == 30
    assert caplog.text.count("is written again, and nothing of it is lost") == 2


def test_many_experts_get_a_histogram_and_evaluations_a_heat_map(tmp_path):
    log = MetricLog(tmp_path, tensorboard=True, resume_step=None)
    load = [0.0, 1 / 16] + [15 / 16 / 30] * 30
    log.write({"step": 1, "epoch": 0.1, "moe/a/load": load, "moe/b/load": load})
    log.write({"step": 1, "epoch": 0.1, "val/top1": 50.0})
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    tags = events.Tags()
    assert tags["histograms"] == ["moe/a/load", "moe/b/load"]
    assert tags["scalars"] == ["val/top1"]
    (image,) = events.Images("moe/load")
    assert (image.height, image.width) == (2 * CELL, 32 * CELL)


def test_heat_map_is_white_where_the_load_is_even():
    pixels = heat_map([[0.25, 0.25, 0.0, 0.5], [0.25, 0.25, 0.25, 0.25]])[::CELL, ::CELL]
    white, blue, red = [255, 255, 255], [33, 102, 172], [178, 24, 43]
    assert pixels.tolist() == [[white, white, blue, red], [white] * 4]
    assert np.array_equal(heat_map([[1.0, 0, 0, 0]])[:, :1], heat_map([[0.5, 0.5, 0, 0]])[:, :1])


@pytest.mark.parametrize("layers", [0, 1, 2, 13])
def test_summary_is_a_picture_with_panels_per_figure_and_a_heat_map_per_layer(tmp_path, layers):
    assert draw_summary(tmp_path, METRICS) is None
    log = MetricLog(tmp_path, tensorboard=False, resume_step=None)
    figures = {"load": [0.9, 0.1], "max_violation": 0.8, "drop_rate": 3.0, "dead_experts": 0}
    for step in (1, 2, 3):
        routers = {
            f"moe/layers.2.blocks.{i}/{k}": figures[k] for i in range(layers) for k in figures
        }
        log.write({"step": step, "epoch": step / 4, "train/loss": 1 / step, **routers})
    log.write({"step": 3, "epoch": 1, "val/loss": 1.0, "val/top1": 50.0, "val/top5": 90.0})
    with Image.open(draw_summary(tmp_path, METRICS)) as image:
        rows = -(-layers // 4)
        assert image.size == (1600, 340 + (310 if layers else 0) + 260 * rows)
        assert len(set(image.convert("L").getdata())) > 20


def test_garbage_among_the_records_is_left_out(tmp_path, caplog):
    lines = [b'{"step": 1, "train/loss": 2.0}', b"\xff\xfe", b"[]", b'{"epoch": 1}', b"[" * 100_000]
    (tmp_path / "metrics.jsonl").write_bytes(
        b"\n".join([*lines, b'{"step": 2}', b'{"step": 3, "tr'])
    )
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2]
    (tmp_path / "folder" / "metrics.jsonl").mkdir(parents=True)
    assert read_metrics(tmp_path / "folder") == []
    log = MetricLog(tmp_path / "folder", tensorboard=False, resume_step=None)
    log.write({"step": 1})
    assert "metrics.jsonl cannot be written (Is a directory)" in caplog.text


def test_an_error_of_a_picture_is_one_line(tmp_path, caplog):
    log = MetricLog(tmp_path, tensorboard=True, resume_step=None)

    def draw():
        raise TypeError("\nno such glyph\n")

    show_picture(log, "data", tmp_path / "data.png", draw)
    (tmp_path / "data.png").write_bytes(b"half")
    show_picture(log, "data", tmp_path / "data.png", lambda: None)
    first, second = (one.getMessage() for one in caplog.records if one.levelname == "WARNING")
    assert first == f"{tmp_path / 'data.png'} cannot be drawn: no such glyph"
    assert "cannot identify image file" in second
