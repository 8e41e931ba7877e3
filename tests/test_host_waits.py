"""The host waits for the device once in an update, and never for the optimizer's step."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from swin_moe.config import load_config
from swin_moe.data.normalise import Normalise
from swin_moe.tasks import build_task
from swin_moe.training.guard import Guard
from tests.parallel import ROOT, run_worker
from tests.saving import ALONE
from tests.streams import OnDevice, Streams


def test_an_update_waits_once_and_a_position_ignores_what_is_read_ahead(tmp_path):
    run_worker("host_waits", tmp_path, 1)
    assert (tmp_path / "passed").exists()


def test_the_status_of_an_update_is_read_without_a_wait_for_its_step(monkeypatch):
    streams = Streams(monkeypatch)
    guard = Guard([], ALONE, lambda: 0)
    guard._signs = guard._signs.as_subclass(OnDevice)
    guard.see(torch.tensor(2.0), None)
    streams.run("forward")
    guard.agree()
    arrived = guard._agreed._arrived
    streams.run("backward and step")
    assert guard.read() == ("", 0, 2.0)
    assert arrived.waited == 1
    assert arrived.done == ["forward"]


class Copies(TorchDispatchMode):
    """Counts the copies from the host to the device."""

    def __init__(self):
        super().__init__()
        self.sent = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default:
            self.sent += args[0].device != out.device
        return out


def test_mean_and_deviation_are_sent_to_a_device_once():
    normalise = Normalise([0.4, 0.5, 0.6], [0.21, 0.22, 0.23])
    images = torch.zeros(2, 3, 5, 7, dtype=torch.uint8, device="meta")
    sent = []
    for _ in range(3):
        with Copies() as copies:
            normalise(images)
        sent.append(copies.sent)
    assert sent == [2, 0, 0]


def test_masks_are_sent_from_pinned_memory(monkeypatch):
    task = build_task(load_config(ROOT / "configs/fashion_mnist/simmim_micro.yaml"))
    batch = task.example_batch(3, torch.device("cpu"))
    images = batch.inputs["images"].to(torch.uint8)
    wanted = task.prepare(batch._replace(inputs={"images": images}), 5, training=True)
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: pinned.append(x.shape) or x)
    found = task.prepare(
        batch._replace(inputs={"images": images.as_subclass(OnDevice)}), 5, training=True
    )
    assert pinned == [wanted.inputs["mask"].shape]
    assert torch.equal(found.inputs["mask"], wanted.inputs["mask"])
