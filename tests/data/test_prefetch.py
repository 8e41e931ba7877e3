"""Batches on the device: on CUDA, with stand-ins, the next one is copied ahead; nothing else is."""

import weakref

import pytest
import torch

from swin_moe.data import Batch, DeviceBatches
from tests.data.helpers import open_loader
from tests.data.test_loader import _with_faults
from tests.streams import OnDevice, Streams

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


class Moved(OnDevice):
    """A tensor on the device that notes which streams use it."""

    def record_stream(self, stream):
        self.used_on = stream


@pytest.fixture
def streams(monkeypatch):
    """Stand-ins for streams, and for the copies, which are numbered."""
    streams = Streams(monkeypatch)
    streams.sources = []

    def to(batch, device):
        assert device == GPU
        streams.run(f"copy {len(streams.sources)}")
        streams.sources.append(weakref.ref(batch.inputs["images"]))
        return batch._replace(
            inputs={
                name: tensor.clone().as_subclass(Moved) for name, tensor in batch.inputs.items()
            },
            targets=batch.targets.clone().as_subclass(Moved),
            valid=batch.valid.clone().as_subclass(Moved),
        )

    monkeypatch.setattr(Batch, "to", to)
    return streams


def trained(batches):
    """Return the contents of all batches, each used before the next one is looked for."""
    found = []
    for batch in batches:
        found.append((batch.indices.tolist(), batch.targets.tolist(), batch.skipped))
        found.append(batch.inputs["images"].as_subclass(torch.Tensor).clone())
        batches.look_ahead()
    return found


def equal(one, other):
    pairs = zip(one, other, strict=True)
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs)


@pytest.mark.parametrize("start", [0, 2])
def test_batches_are_those_of_the_loader(tmp_path, start, streams):
    _with_faults(tmp_path, {2, 5})
    plain = []
    for batch in open_loader(tmp_path).epoch(3, start):
        plain.append((batch.indices.tolist(), batch.targets.tolist(), batch.skipped))
        plain.append(batch.inputs["images"])
    assert len(plain) == 2 * (3 - start)
    ahead = DeviceBatches(open_loader(tmp_path), GPU, 3, start)
    assert equal(plain, trained(ahead))
    assert next(ahead, None) is None
    assert len(streams.sources) == 3 - start


def test_on_a_cpu_no_batch_is_taken_early(tmp_path):
    _with_faults(tmp_path, ())
    loader = open_loader(tmp_path)
    taken = []
    read = loader.read
    loader.read = lambda *place: (taken.append(batch) or batch for batch in read(*place))
    batches = DeviceBatches(loader, CPU, 0)
    first = next(batches)
    batches.look_ahead()
    assert len(taken) == 1
    assert first.inputs["images"] is taken[0].inputs["images"]


def test_the_copy_runs_beside_the_update_and_is_awaited(tmp_path, streams):
    _with_faults(tmp_path, ())
    batches = DeviceBatches(open_loader(tmp_path), GPU, 0)
    batch = next(batches)
    assert streams.main.done == ["copy 0"]
    streams.run("update 0")
    batches.look_ahead()
    batches.look_ahead()  # once is enough
    streams.run("update 0, end")
    assert streams.main.done == ["copy 0", "update 0", "update 0, end"]
    assert streams.sources[1]() is not None  # the pinned batch lives until the copy is awaited
    following = next(batches)
    assert streams.main.done[-1] == "copy 1"
    assert batches._stream.done == ["copy 0", "copy 1"]  # it waits for no update
    assert streams.sources[0]() is None
    for one in (batch, following):
        for tensor in (one.inputs["images"], one.targets, one.valid):
            assert tensor.used_on is streams.main


def test_an_unreadable_sample_is_listed_when_its_batch_is_used(tmp_path, streams):
    _with_faults(tmp_path, set(range(12)) - {0})  # one sample of one batch can be read
    loader = open_loader(tmp_path, max_bad_share=1.0)
    batches = DeviceBatches(loader, GPU, 0)
    assert loader.bad.total == 0
    listed = 0
    for batch in batches:
        listed += len(batch.skipped)
        assert loader.bad.total == listed
        assert (batch.targets == 0).all()  # others stand in for a batch that cannot be read
        batches.look_ahead()
        assert loader.bad.total == listed
    assert listed == 11


def test_an_error_is_raised_when_its_batch_is_asked_for(tmp_path, streams):
    _with_faults(tmp_path, ())
    loader = open_loader(tmp_path)
    read = loader.read

    def failing(*place):
        yield next(read(*place))
        raise RuntimeError("a worker died")

    loader.read = failing
    batches = DeviceBatches(loader, GPU, 0)
    assert next(batches).targets.shape == (4,)
    batches.look_ahead()
    with pytest.raises(RuntimeError, match="a worker died"):
        next(batches)


def test_ctrl_c_is_not_put_off(tmp_path, streams):
    _with_faults(tmp_path, ())
    loader = open_loader(tmp_path)

    def interrupted(*place):
        raise KeyboardInterrupt
        yield

    loader.read = interrupted
    with pytest.raises(KeyboardInterrupt):
        DeviceBatches(loader, GPU, 0).look_ahead()


def test_a_task_that_changes_the_number_of_samples_is_refused(tmp_path):
    _with_faults(tmp_path, ())
    loader = open_loader(tmp_path)
    loader._loader.collate_fn = lambda samples: loader._collate(samples[1:])
    with pytest.raises(ValueError, match="a batch of 3 samples from 4: its collate must keep"):
        next(loader.epoch(0))
