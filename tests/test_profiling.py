"""The split of an update's time, and the trace of a real run."""

import pytest
import torch

from swin_moe.reporting.metric_log import read_metrics
from swin_moe.reporting.profiler import KINDS, peak_flops, read, split
from tests.parallel import train


def event(name, start, end, cat="cpu_op", tid=1):
    return {"ph": "X", "name": name, "cat": cat, "tid": tid, "ts": start * 1e3,
            "dur": (end - start) * 1e3}  # fmt: skip


def ranged(name, start, end, tid=1):
    return event(name, start, end, "user_annotation", tid)


def test_on_a_cpu():
    events = [
        ranged("update", 0, 100),
        ranged("data", 0, 10),
        event("aten::div", 5, 8),  # in the wait for data
        event("aten::mm", 10, 30),
        event("aten::add", 12, 20),  # within it
        event("swin_moe::moe_route", 30, 35),
        event("c10d::alltoall_base_", 40, 41),
        ranged("gloo:all_to_all", 43, 60, tid=2),  # submitted at 40
        event("aten::gelu", 50, 55),  # hides a part of it
        event("autograd::engine::evaluate_function: _HomeBackward", 60, 70),
        event("c10d::allreduce_", 70, 71),
        ranged("gloo:all_reduce", 71, 90, tid=2),
        event("aten::copy_", 72, 80, tid=2),  # in gloo's thread
        event("aten::mm", 200, 300),  # an evaluation
    ]
    assert split(events) == pytest.approx(
        {"data": 10, "compute": 30, "all_to_all": 15, "reduce": 20, "host": 25}
    )
    two = [*events, ranged("update", 400, 500)]
    assert split(two)["host"] == pytest.approx((25 + 100) / 2)


def test_on_a_gpu():
    events = [
        ranged("update", 0, 100),
        ranged("data", 0, 20),
        event("aten::mm", 0, 100),  # a launch is not work of the device
        event("gemm", 5, 40, "kernel", 7),
        event("ncclDevKernel_SendRecv(x)", 35, 50, "kernel", 8),
        event("ncclDevKernel_AllReduce_Sum_bf16(x)", 45, 70, "kernel", 9),
        event("Memcpy HtoD", 70, 75, "gpu_memcpy", 7),
    ]
    assert split(events) == pytest.approx(
        {"compute": 40, "all_to_all": 10, "reduce": 20, "data": 5, "host": 25}
    )


def test_without_an_update_there_is_nothing_to_split():
    assert split([event("aten::mm", 0, 1)]) == dict.fromkeys(KINDS, 0.0)


def test_a_run_writes_a_trace_of_each_rank(tmp_path):
    folder = tmp_path / "run"
    done = train(folder, "train.profile=true", "train.max_steps=16", "log.every_steps=8",
                 processes=2)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "an update's time, mean of 5, in ms" in done.stdout
    assert "profiler" not in done.stderr
    for rank in (0, 1):
        path = folder / f"profile/rank-0000{rank}.json.gz"
        events = read(path)
        names = [event["name"] for event in events]
        assert names.count("update") == 5
        for name in ("data", "forward", "backward", "optimizer", "all-to-all", "reduce"):
            assert name in names
        assert "gloo:all_to_all" in names
        assert all(milliseconds > 0 for milliseconds in split(events).values())
    records = [r for r in read_metrics(folder) if "profile/compute_ms" in r]
    assert [record["step"] for record in records] == [16]
    together = sum(records[0][f"profile/{kind}_ms"] for kind in KINDS)
    assert together == pytest.approx(records[0]["profile/update_ms"], rel=1e-3)


def test_too_short_a_run_is_reported(tmp_path):
    done = train(tmp_path / "run", "train.profile=true", "train.max_steps=2")
    assert done.returncode == 0, done.stderr
    assert "no trace, it takes 16 updates" in done.stdout


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("NVIDIA Something New", 0.0),
    ],
)
def test_the_peak_of_a_gpu_is_known_by_its_name(monkeypatch, name, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda", 0), torch.bfloat16) == peak
    assert peak_flops(torch.device("cpu"), torch.bfloat16) == 0.0
