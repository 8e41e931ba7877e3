"""Logs survive a kill and a resume; the picture is drawn from them."""

import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from swin_moe.metrics import ExpertLoad, Meter, MetricLog, draw_summary, read_metrics


def test_meter_is_a_mean_since_the_last_read():
    meter = Meter(torch.device("cpu"))
    for value in (1.0, 2.0, 6.0):
        meter.update(torch.tensor(value))
    assert meter.read() == 3.0
    assert meter.read() != meter.read()  # NaN without updates


def test_expert_load_adds_up_and_resets():
    load = ExpertLoad(["layers.0.blocks.1"], 2, torch.device("cpu"))
    load.update(torch.tensor([[3, 1]]), torch.tensor([1]))
    load.update(torch.tensor([[3, 1]]), torch.tensor([1]))
    record = load.record(load.buffer())
    assert record == {"moe/layers.0.blocks.1/load": [0.75, 0.25],
                      "moe/layers.0.blocks.1/drop_rate": 25.0}  # fmt: skip
    assert load.buffer().sum() == 0


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
        file.write('{"step": 6, "tr')  # a kill in mid-line
    log = MetricLog(tmp_path, tensorboard=True, resume_step=3)
    for record in records([4]):
        log.write(record)
    log.close()
    assert [r["step"] for r in read_metrics(tmp_path)] == [1, 2, 3, 4]
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4]
    assert "moe/layers.0.blocks.1/load/expert1" in events.Tags()["scalars"]


def test_summary_is_a_picture_with_a_heat_map_per_layer(tmp_path):
    assert draw_summary(tmp_path) is None
    log = MetricLog(tmp_path, tensorboard=False, resume_step=None)
    for record in records([1, 2, 3]):
        log.write(record)
    log.write({"step": 3, "epoch": 1, "val/loss": 1.0, "val/top1": 50.0, "val/top5": 90.0})
    path = draw_summary(tmp_path)
    with Image.open(path) as image:
        assert image.width > 500
        assert len(set(image.convert("L").getdata())) > 20
