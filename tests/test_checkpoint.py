"""Checkpoints: atomic, verified, readable at any expert-parallel size, and free of pickle."""

import json
import pickle

import pytest
import torch

from swin_moe import checkpoint
from swin_moe.checkpoint import CheckpointError, Reader
from swin_moe.distributed import Group, World

NAMES = {"a.experts.fc1.weight"}


def world(rank=0, size=1):
    """One rank of an expert group, without processes: files do not need them."""
    return World(0, 0, 1, torch.device("cpu"), Group(None, rank, size), Group())


def tensors(low=0, high=4):
    stacked = torch.arange(4.0)[:, None].repeat(1, 3)[low:high]
    return [
        ("a.weight", {"weight": torch.ones(2), "exp_avg": torch.zeros(2)}),
        ("a.experts.fc1.weight", {"weight": stacked, "exp_avg": stacked + 10}),
    ]


def write(folder, step=1):
    def export(keep):
        return ((name, kinds) for name, kinds in tensors() if keep(name))

    return checkpoint.save(
        folder, step, export=export, expert_names=NAMES, num_local_experts=4,
        state={"position": {"step": step}}, config_text="", world=world(),
    )  # fmt: skip


def test_round_trip(tmp_path):
    path = write(tmp_path)
    checkpoint.verify(path)
    reader = Reader(path)
    assert reader.state["position"] == {"step": 1}
    assert torch.equal(reader.tensor("a.weight", "exp_avg"), torch.zeros(2))
    half = reader.tensor("a.experts.fc1.weight", "exp_avg", range(2, 4))
    assert half[:, 0].tolist() == [12, 13]
    assert reader.restore_rng(world())
    assert {file.suffix for file in path.iterdir()} == {".safetensors", ".json", ".yaml"}


def test_experts_are_stitched_from_the_files_of_two_ranks(tmp_path):
    path = write(tmp_path)
    (path / "experts-0.safetensors").unlink()
    (path / "experts-0.optimizer.safetensors").unlink()
    for first in (0, 2):
        kinds = dict(tensors(first, first + 2)[1:])
        checkpoint._write_state(path / f"experts-{first}", kinds, {"first_expert": str(first)})
    reader = Reader(path)
    weight = reader.tensor("a.experts.fc1.weight", experts=range(1, 4))
    assert weight[:, 0].tolist() == [1, 2, 3]
    with pytest.raises(CheckpointError, match="has 2 of 4 experts"):
        reader.tensor("a.experts.fc1.weight", experts=range(2, 6))
    with pytest.raises(CheckpointError, match=r"no tensor 'b\.weight'"):
        reader.tensor("b.weight")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: (p / "manifest.json").unlink(), "no manifest.json"),
        (lambda p: (p / "manifest.json").write_text("{"), "manifest.json is damaged"),
        (lambda p: forge(p, {"dense.safetensors": 7}), "manifest.json is damaged"),
        (lambda p: forge(p, {}), "manifest.json names no config.yaml"),
        (lambda p: (p / "dense.safetensors").unlink(), "dense.safetensors is missing"),
        (lambda p: (p / "state.json").write_text("{}"), "state.json has 2 of"),
        (lambda p: flip(p / "experts-0.safetensors"), "experts-0.safetensors has changed"),
    ],
)
def test_damage_is_found_and_the_previous_one_is_used(tmp_path, caplog, damage, message):
    first, second = write(tmp_path, 1), write(tmp_path, 2)
    damage(second)
    with pytest.raises(CheckpointError, match=message):
        checkpoint.verify(second)
    assert checkpoint.latest(tmp_path) == first
    assert message in caplog.text
    damage(first)
    with pytest.raises(CheckpointError, match="all 2 checkpoints are damaged"):
        checkpoint.latest(tmp_path)


def forge(path, files):
    (path / "manifest.json").write_text(json.dumps({"format": 1, "files": files}))


def flip(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_a_newer_format_says_so(tmp_path):
    path = write(tmp_path)
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**manifest, "format": 2}))
    with pytest.raises(CheckpointError, match="written in format 2, this version reads 1"):
        checkpoint.latest(tmp_path)  # not damaged: not passed over


def test_damaged_ones_are_set_aside_and_do_not_count(tmp_path):
    first, second = write(tmp_path, 1), write(tmp_path, 2)
    (second / "state.json").unlink()
    checkpoint.set_aside_newer(tmp_path, first)
    assert checkpoint.list_checkpoints(tmp_path) == [first]
    assert (tmp_path / "damaged-step-00000002").is_dir()


def test_an_unfinished_write_is_not_seen(tmp_path):
    write(tmp_path, 1)
    (tmp_path / "partial-step-00000002").mkdir()
    assert [path.name for path in checkpoint.list_checkpoints(tmp_path)] == ["step-00000001"]


def test_a_failing_write_leaves_the_old_ones_alone(tmp_path, monkeypatch):
    first = write(tmp_path, 1)

    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match="No space"):
        write(tmp_path, 2)
    assert checkpoint.latest(tmp_path) == first


def test_prune_keeps_the_last_and_the_best(tmp_path):
    paths = [write(tmp_path, step) for step in (1, 2, 3, 4)]
    checkpoint.prune(tmp_path, 2, paths[0])
    assert [p.name[-1] for p in checkpoint.list_checkpoints(tmp_path)] == ["4", "3", "1"]
    assert (tmp_path / "last").resolve().name == "step-00000004"
    assert (tmp_path / "best").resolve().name == "step-00000001"


def test_names_in_a_manifest_cannot_leave_the_folder(tmp_path):
    path = write(tmp_path)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"]["../../etc/passwd"] = {"bytes": 1, "sha256": ""}
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="passwd is missing"):
        checkpoint.verify(path)


def test_a_pickle_in_disguise_is_not_executed(tmp_path):
    class Malice:
        def __reduce__(self):
            return (open, (str(tmp_path / "pwned"), "w"))

    path = write(tmp_path)
    (path / "dense.safetensors").write_bytes(pickle.dumps(Malice()))
    with pytest.raises(CheckpointError):
        Reader(path)
    assert not (tmp_path / "pwned").exists()


def test_another_model_does_not_load(tmp_path):
    reader = Reader(write(tmp_path))
    with pytest.raises(CheckpointError, match=r"'weight'.*another model"):
        checkpoint.load_weights(torch.nn.Linear(2, 2), reader, set(), 0)
    model = torch.nn.Module()
    model.a = torch.nn.LayerNorm(3, bias=False)
    with pytest.raises(CheckpointError, match=r"shape \[2\], the model's is \[3\]"):
        checkpoint.load_weights(model, reader, set(), 0)
