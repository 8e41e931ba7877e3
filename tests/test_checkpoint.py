"""Checkpoints: atomic, verified, readable at any expert-parallel size, and free of pickle."""

import json
import pickle

import pytest
import torch

from swin_moe import checkpoint
from swin_moe.checkpoint import CheckpointError, Reader
from swin_moe.distributed import Group, World
from swin_moe.placement import ExpertShare, expert_share

NAMES = {"a.experts.fc1.weight"}


def share(first, stop, shard=0, shards=1):
    return ExpertShare(range(first, stop), shard, shards)


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
        folder, step, export=export, expert_names=NAMES, share=share(0, 4),
        state={"position": {"step": step}}, config_text="", world=world(),
    )  # fmt: skip


def test_round_trip(tmp_path):
    path = write(tmp_path)
    checkpoint.verify(path)
    reader = Reader(path)
    assert reader.state["position"] == {"step": 1}
    assert torch.equal(reader.tensor("a.weight", "exp_avg"), torch.zeros(2))
    half = reader.tensor("a.experts.fc1.weight", "exp_avg", share(2, 4))
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
    weight = reader.tensor("a.experts.fc1.weight", share=share(1, 4))
    assert weight[:, 0].tolist() == [1, 2, 3]
    with pytest.raises(CheckpointError, match="has 2 of 4 experts"):
        reader.tensor("a.experts.fc1.weight", share=share(2, 6))
    with pytest.raises(CheckpointError, match=r"no tensor 'b\.weight'"):
        reader.tensor("b.weight")


EXPERTS = {  # of all experts, by the logical name
    "a.experts.fc1.weight": (4, 6, 5), "a.experts.fc1.bias": (4, 6),
    "a.experts.fc2.weight": (4, 5, 6), "a.experts.fc2.bias": (4, 8),
}  # fmt: skip


@pytest.mark.parametrize("experts", [1, 2, 4])
@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_any_expert_group_reads_what_any_other_wrote(tmp_path, experts, size):
    if size // experts > 2:
        return  # a width of 6 has no such parts
    whole = {name: torch.randn(experts, *shape[1:]) for name, shape in EXPERTS.items()}
    for rank in range(size):
        mine = expert_share(experts, rank, size)
        kinds = {n: {"weight": mine.of(n, t), "exp_avg": mine.of(n, -t)} for n, t in whole.items()}
        checkpoint._write_experts(tmp_path, kinds, mine)
    (tmp_path / "state.json").write_text("{}")
    reader = Reader(tmp_path)
    for readers in (1, 2, 4, 8):
        if readers // experts > 2:
            continue
        for rank in range(readers):
            wanted = expert_share(experts, rank, readers)
            for name, tensor in whole.items():
                assert torch.equal(reader.tensor(name, share=wanted), wanted.of(name, tensor))
                assert torch.equal(reader.tensor(name, "exp_avg", wanted), wanted.of(name, -tensor))


def test_a_missing_shard_is_told(tmp_path):
    mine = share(0, 1, shard=1, shards=2)
    checkpoint._write_experts(tmp_path, {"a.experts.fc1.bias": {"weight": torch.ones(1, 3)}}, mine)
    (tmp_path / "state.json").write_text("{}")
    reader = Reader(tmp_path)
    assert reader.tensor("a.experts.fc1.bias", share=mine).shape == (1, 3)
    with pytest.raises(CheckpointError, match="has 0 of 1 experts"):
        reader.tensor("a.experts.fc1.bias", share=share(0, 1))


def test_persistent_buffers_come_back_exactly(tmp_path):
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a = torch.nn.Linear(2, 1, bias=False)
            self.register_buffer("rises", torch.tensor([2**53 + 1, -3]))
            self.register_buffer("other", torch.tensor([1.0]), persistent=False)

    model = Model()
    buffers = checkpoint.persistent_buffers(model)
    assert set(buffers) == {"rises"}
    kinds = {"weight": torch.ones(1, 2), "exp_avg": torch.ones(1, 2)}
    states = [("a.weight", kinds), ("rises", {"weight": buffers["rises"].clone()})]
    path = checkpoint.save(
        tmp_path, 1, export=lambda keep: iter(states), expert_names=set(), share=share(0, 1),
        state={}, config_text="", world=world(),
    )  # fmt: skip
    reader = Reader(path)
    assert reader.names() == ["a.weight", "rises"]
    model.rises.zero_()
    checkpoint.load_weights(model, reader, set(), share(0, 1))
    assert model.rises.tolist() == [2**53 + 1, -3]
    older = checkpoint.save(
        tmp_path, 2, export=lambda keep: iter(states[:1]), expert_names=set(), share=share(0, 1),
        state={}, config_text="", world=world(),
    )  # fmt: skip
    model.rises.fill_(7)
    checkpoint.load_weights(model, Reader(older), set(), share(0, 1))
    assert model.rises.tolist() == [7, 7]  # a checkpoint without the buffer leaves it alone


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
        checkpoint.load_weights(torch.nn.Linear(2, 2), reader, set(), share(0, 4))
    model = torch.nn.Module()
    model.a = torch.nn.LayerNorm(3, bias=False)
    with pytest.raises(CheckpointError, match=r"shape \[2\], the model's is \[3\]"):
        checkpoint.load_weights(model, reader, set(), share(0, 4))
