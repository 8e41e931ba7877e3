"""Checkpoints: atomic, verified, readable by any number of ranks, and free of pickle."""

import json
import pickle
import shutil
import threading

import pytest
import torch
from safetensors.torch import load_file, save_file

from swin_moe import checkpoint
from swin_moe.checkpoint import CheckpointError, Fragment, Reader, Writer, stream, writer
from swin_moe.checkpoint.folder import read_manifest, write_manifest
from swin_moe.checkpoint.fragments import describe, merge, to_json
from swin_moe.checkpoint.stream import write_file
from swin_moe.common.errors import RunRemoved
from swin_moe.config import dump_config, load_config
from swin_moe.distributed.expert_placement import (
    ExpertLayout,
    ExpertShare,
    expert_share,
    whole_layout,
)
from swin_moe.distributed.watchdog import Writing
from swin_moe.models import build
from tests.parallel import MICRO
from tests.saving import ALONE, save, save_model

EXPERTS = "a.experts.fc1.weight"
LAYOUT = whole_layout({EXPERTS}, 4)


def share(first, stop, shard=0, shards=1):
    return ExpertShare(range(first, stop), shard, shards)


def states():
    stacked = torch.arange(4.0)[:, None].repeat(1, 3)
    yield "a.weight", {"weight": torch.ones(2), "exp_avg": torch.zeros(2)}
    yield EXPERTS, {"weight": stacked, "exp_avg": stacked + 10}


def write(folder, step=1, **options):
    return save(folder, step, states(), LAYOUT, state={"position": {"step": step}}, **options)


def test_round_trip(tmp_path):
    path = write(tmp_path)
    checkpoint.verify(path)
    reader = Reader(path)
    assert reader.state["position"] == {"step": 1}
    assert torch.equal(reader.tensor("a.weight", "exp_avg"), torch.zeros(2))
    half = reader.tensor(EXPERTS, "exp_avg", share(2, 4))
    assert half[:, 0].tolist() == [12, 13]
    assert reader.values(EXPERTS, "weight", share(1, 3), 2, 5).tolist() == [1, 2, 2]
    before = torch.get_rng_state()
    torch.rand(3)
    assert reader.restore_rng(0)
    assert torch.equal(torch.get_rng_state(), before)
    assert not reader.restore_rng(1)
    assert {file.suffix for file in path.iterdir()} == {".safetensors", ".json", ".yaml"}


def test_the_micro_recipe_takes_its_tensors_and_at_most_two_percent_more(tmp_path):
    config = load_config(MICRO)
    model = build(config.model, config.moe)
    path = save_model(tmp_path, 1, model, dump_config(config))
    size = sum(file.stat().st_size for file in path.iterdir())
    tensors = 12 * sum(parameter.numel() for parameter in model.parameters())
    assert tensors < size < 1.02 * tensors


# --------------------------------------------------------------------------------------------
# Any ranks write, any other ranks read

WHOLE = {  # of all experts, by the logical name
    "a.experts.fc1.weight": (4, 6, 5), "a.experts.fc1.bias": (4, 6),
    "a.experts.fc2.weight": (4, 5, 6), "a.experts.fc2.bias": (4, 8), "a.norm.weight": (7,),
}  # fmt: skip
KINDS = {"weight": 1.0, "exp_avg": -1.0}


def write_as_ranks(folder, whole, experts, size, replicas):
    """Write as ``size`` × ``replicas`` ranks do, with experts' tensors cut over their replicas."""
    names = {name for name in whole if ".experts." in name}
    parts, files = [], {}
    for rank in range(size * replicas):
        layout = ExpertLayout(names, experts, expert_share(experts, rank % size, size))
        tensors, entries = {}, {}
        for name, tensor in whole.items():
            mine, cuts, place = tensor, size * replicas, rank
            if name in names:
                mine, cuts, place = layout.share.of(name, tensor), replicas, rank // size
            run = -(-mine.numel() // cuts)
            values = mine.flatten()[place * run : (place + 1) * run]
            if values.numel():
                kinds = {kind: values * sign for kind, sign in KINDS.items()}
                fragment = Fragment(name, tuple(mine.shape), place * run, kinds)
                entries[name] = describe(fragment, rank, layout)
                tensors |= {checkpoint.fragments.key(name, k): t for k, t in kinds.items()}
        file = folder / checkpoint.folder.rank_file(rank)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)
        parts.append(entries)
        files[file.name] = checkpoint.folder.file_digest(file)
    for name in ("state.json", "config.yaml"):
        (folder / name).write_text("{}")
        files[name] = checkpoint.folder.file_digest(folder / name)
    write_manifest(folder, files, to_json(merge(parts)))


@pytest.mark.parametrize("replicas", [1, 3])
@pytest.mark.parametrize("experts", [1, 2, 4])
@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_any_expert_group_reads_what_any_other_wrote(tmp_path, experts, size, replicas):
    if size // experts > 2:
        return  # a width of 6 has no such parts
    whole = {
        name: torch.randn(experts, *shape[1:]) if ".experts." in name else torch.randn(shape)
        for name, shape in WHOLE.items()
    }
    write_as_ranks(tmp_path, whole, experts, size, replicas)
    checkpoint.verify(tmp_path)
    reader = Reader(tmp_path)
    for name, tensor in whole.items():
        assert torch.equal(reader.tensor(name), tensor)
    for readers in (1, 2, 4, 8):
        if readers // experts > 2:
            continue
        for rank in range(readers):
            wanted = expert_share(experts, rank, readers)
            for name, tensor in whole.items():
                if ".experts." not in name:
                    continue
                mine = wanted.of(name, tensor)
                assert torch.equal(reader.tensor(name, share=wanted), mine)
                some = reader.values(name, "exp_avg", wanted, 1, mine.numel() - 1)
                assert torch.equal(some, -mine.flatten()[1:-1])


def test_missing_experts_are_reported(tmp_path):
    reader = Reader(write(tmp_path))
    with pytest.raises(CheckpointError, match="has 4 experts, not 6"):
        reader.tensor(EXPERTS, share=share(2, 6))
    with pytest.raises(CheckpointError, match=r"no tensor 'b\.weight'"):
        reader.tensor("b.weight")
    with pytest.raises(CheckpointError, match=r"no tensor 'a\.weight\.exp_avg_sq'"):
        reader.tensor("a.weight", "exp_avg_sq")


@pytest.mark.parametrize(
    ("spans", "message"),
    [
        ([(0, 3), (3, 6)], ""),
        ([(0, 3), (4, 6)], "gap or an overlap at element 3"),
        ([(0, 4), (3, 6)], "gap or an overlap at element 4"),
        ([(0, 3), (0, 6)], "gap or an overlap"),
        ([(0, 3)], "has 3 of 6 elements"),
    ],
)
def test_ranks_that_do_not_make_up_the_whole_are_refused(spans, message):
    parts = []
    for rank, (start, stop) in enumerate(spans):
        fragment = Fragment("a", (2, 3), start, {"weight": torch.zeros(stop - start)})
        parts.append({"a": describe(fragment, rank, whole_layout(set(), 1))})
    if not message:
        assert merge(parts)["a"].shape == [2, 3]
        return
    with pytest.raises(CheckpointError, match=message):
        merge(parts)


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.a = torch.nn.Linear(2, 1, bias=False)
        self.register_buffer("rises", torch.tensor([2**53 + 1, -3]))
        self.register_buffer("other", torch.tensor([1.0]), persistent=False)


def test_persistent_buffers_come_back_exactly(tmp_path):
    model = Model()
    buffers = checkpoint.persistent_buffers(model)
    assert set(buffers) == {"rises"}
    kinds = {"weight": torch.ones(1, 2), "exp_avg": torch.ones(1, 2)}
    known = [("a.weight", kinds), ("rises", {"weight": buffers["rises"].clone()})]
    reader = Reader(save(tmp_path, 1, known))
    assert reader.names() == ["a.weight", "rises"]
    model.rises.zero_()
    checkpoint.load_weights(model, reader, LAYOUT)
    assert model.rises.tolist() == [2**53 + 1, -3]
    model.rises.fill_(7)
    checkpoint.load_weights(model, Reader(save(tmp_path, 2, known[:1])), LAYOUT)
    assert model.rises.tolist() == [7, 7]  # a checkpoint without the buffer leaves it alone


# --------------------------------------------------------------------------------------------
# Damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: (p / "manifest.json").unlink(), "no manifest.json"),
        (lambda p: (p / "manifest.json").write_text("{"), "manifest.json is damaged"),
        (lambda p: forge(p, {"rank-00000.safetensors": 7}), "manifest.json is damaged"),
        (lambda p: forge(p, {}), "manifest.json names no config.yaml"),
        (lambda p: swap(p / "manifest.json", "exp_avg", "exp_axg"), "manifest.json is damaged"),
        (lambda p: (p / "rank-00000.safetensors").unlink(), "rank-00000.safetensors is missing"),
        (lambda p: (p / "state.json").write_text("{}"), "state.json has 2 of"),
        (lambda p: flip(p / "rank-00000.safetensors"), "rank-00000.safetensors has changed"),
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
    write_manifest(path, files, {})


def swap(path, old, new):
    path.write_text(path.read_text().replace(old, new))


def flip(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_a_newer_format_is_named(tmp_path):
    path = write(tmp_path)
    swap(path / "manifest.json", '"format": 2', '"format": 3')
    with pytest.raises(CheckpointError, match=r"format 3, this version reads 2 \(a newer version"):
        checkpoint.latest(tmp_path)  # not damaged: not passed over


def test_damaged_ones_are_set_aside_and_do_not_count(tmp_path):
    first, second = write(tmp_path, 1), write(tmp_path, 2)
    (second / "state.json").unlink()
    checkpoint.set_aside_newer(tmp_path, first)
    assert checkpoint.list_checkpoints(tmp_path) == [first]
    assert (tmp_path / "damaged-step-00000002").is_dir()


def test_an_unfinished_write_is_not_seen_and_goes_at_the_next_start(tmp_path):
    write(tmp_path, 1)
    (tmp_path / "partial-step-00000002-abc").mkdir()
    assert [path.name for path in checkpoint.list_checkpoints(tmp_path)] == ["step-00000001"]
    checkpoint.clear_partial(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"step-00000001", "last"}


def test_prune_keeps_the_last_and_the_best(tmp_path):
    for step in (1, 2, 3):
        write(tmp_path, step, keep_last=2, best_step=1)
    write(tmp_path, 4, keep_last=2, best_step=1)
    assert [p.name[-1] for p in checkpoint.list_checkpoints(tmp_path)] == ["4", "3", "1"]
    assert (tmp_path / "last").resolve().name == "step-00000004"
    assert (tmp_path / "best").resolve().name == "step-00000001"


# --------------------------------------------------------------------------------------------
# Writing during the training


@pytest.fixture
def slow(monkeypatch):
    """Make writing wait for the yielded event, at most 20 s."""
    go = threading.Event()

    def waiting(*args, **kwargs):
        go.wait(20)
        return write_file(*args, **kwargs)

    monkeypatch.setattr(writer, "write_file", waiting)
    yield go
    go.set()


def begin(saver, step, values):
    fragments = checkpoint.whole_fragments([("a", {"weight": values})])
    saver.save(step, fragments, LAYOUT, state={}, config_text="", keep_last=9)


def test_training_goes_on_and_its_changes_are_not_saved(tmp_path, slow):
    saves = []
    saver = Writer(tmp_path, ALONE, saves.append)
    values = torch.ones(4)
    begin(saver, 1, values)
    values.fill_(2.0)
    saver.poll()
    assert not saves
    assert checkpoint.list_checkpoints(tmp_path) == []
    slow.set()
    assert saver.wait()
    assert [(saved.step, saved.error) for saved in saves] == [(1, "")]
    assert saves[0].stall < saves[0].seconds
    assert saves[0].bytes > 0
    assert Reader(saves[0].path).tensor("a").tolist() == [1.0] * 4
    assert saver.wait()
    assert len(saves) == 1  # once


def test_saves_do_not_overlap(tmp_path, slow):
    saves = []
    saver = Writer(tmp_path, ALONE, saves.append)
    values = torch.ones(4)
    begin(saver, 1, values)
    threading.Timer(0.3, slow.set).start()
    begin(saver, 2, values)
    assert slow.is_set()
    assert [saved.step for saved in saves] == [1]
    saver.wait()
    assert len(checkpoint.list_checkpoints(tmp_path)) == 2


def test_a_write_shows_its_progress_and_its_file(tmp_path, slow, monkeypatch):
    monkeypatch.setattr(stream, "_PIECE", 8)
    monkeypatch.setattr(stream, "_FLUSH", 16)
    seen = []
    writing = Writing()
    writing.on = lambda file: seen.append(str(file))
    saver = Writer(tmp_path, ALONE, lambda saved: None, writing)
    begin(saver, 1, torch.arange(20.0))
    assert saver.writing.what == "the save of step 1"
    assert saver.writing.good == ""
    slow.set()
    assert saver.wait()
    assert len([file for file in seen if file.endswith("rank-00000.safetensors")]) > 10
    assert saver.writing.what == ""
    assert saver.writing.good == str(tmp_path / "step-00000001")
    assert Reader(tmp_path / "step-00000001").tensor("a").tolist() == list(range(20))


def test_files_written_in_pieces_are_what_the_library_reads(tmp_path, monkeypatch):
    monkeypatch.setattr(stream, "_PIECE", 5)
    tensors = {
        "bytes": torch.arange(7, dtype=torch.uint8), "none": torch.empty(0, 3),
        "one": torch.tensor(3.5, dtype=torch.float64), "flags": torch.tensor([True, False]),
        "bf16": torch.randn(3, 4).bfloat16(), "turned": torch.randn(3, 4).T,
    }  # fmt: skip
    write_file(tensors, tmp_path / "file", lambda: None)
    found = load_file(tmp_path / "file")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_a_removed_run_directory_is_reported_and_not_made_again(tmp_path):
    saves = []
    run = tmp_path / "run"
    run.mkdir()
    saver = Writer(run / "checkpoints", ALONE, saves.append)
    begin(saver, 1, torch.ones(4))
    assert saver.wait()
    shutil.rmtree(run)
    begin(saver, 2, torch.ones(4))
    assert not saver.wait()
    assert "was removed while the training ran" in saves[-1].error
    assert not run.exists()
    with pytest.raises(RunRemoved, match=f"the run directory {run} was removed"):
        saver.poll()


def raising(error):
    def fail(*_args, **_kwargs):
        raise error

    return fail


def test_a_disk_that_cannot_be_read_is_damage(tmp_path, monkeypatch, caplog):
    first, second = write(tmp_path, 1), write(tmp_path, 2)
    original = checkpoint.folder.sha256

    def digest(path):
        if path.parent == second:
            raise OSError(5, "Input/output error", str(path))
        return original(path)

    monkeypatch.setattr(checkpoint.folder, "sha256", digest)
    assert checkpoint.latest(tmp_path) == first
    assert "Input/output error" in caplog.text


def test_a_failing_write_is_reported_and_leaves_the_old_ones_alone(tmp_path, monkeypatch):
    first = write(tmp_path, 1)
    saves = []
    saver = Writer(tmp_path, ALONE, saves.append)

    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device", "rank-00000.safetensors")

    with monkeypatch.context() as patched:
        patched.setattr(writer, "write_file", full)
        begin(saver, 2, torch.ones(1))
        assert not saver.wait()
    assert saves[0].error == "No space left on device (rank-00000.safetensors)"
    assert checkpoint.latest(tmp_path) == first
    assert not list(tmp_path.glob("partial-*"))
    for error in (MemoryError("no room"), RuntimeError("whatever it is")):
        with monkeypatch.context() as patched:
            patched.setattr(writer, "sync", raising(error))
            begin(saver, 2, torch.ones(1))
            assert not saver.wait()
        assert saves[-1].error == str(error)
    with monkeypatch.context() as patched:  # for example on a disk without room for a folder
        patched.setattr(type(tmp_path), "mkdir", raising(OSError(28, "No space left on device")))
        begin(saver, 2, torch.ones(1))
        assert not saver.wait()
        assert saves[-1].error.startswith("No space left on device (")
    begin(saver, 3, torch.ones(1))  # there is room again
    assert saver.wait()
    assert checkpoint.latest(tmp_path).name == "step-00000003"


# --------------------------------------------------------------------------------------------
# Security


def rewrite(path, change):
    """Write a valid manifest with the given changes."""
    manifest = read_manifest(path)
    files = {n: {"bytes": b, "sha256": s} for n, (b, s) in manifest.files.items()}
    tensors = manifest.tensors
    change(files, tensors)
    write_manifest(path, files, tensors)


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd"])
def test_names_in_a_manifest_cannot_leave_the_folder(tmp_path, name):
    path = write(tmp_path)
    rewrite(path, lambda files, _: files.update({name: {"bytes": 1, "sha256": ""}}))
    with pytest.raises(CheckpointError, match="passwd is missing"):
        checkpoint.verify(path)


def test_runs_in_files_that_the_manifest_does_not_name_are_refused(tmp_path):
    path = write(tmp_path)
    shutil.copy(path / "rank-00000.safetensors", path / "rank-00007.safetensors")

    def point_elsewhere(_, tensors):
        tensors["a.weight"]["spans"][0][0] = 7

    rewrite(path, point_elsewhere)
    with pytest.raises(CheckpointError, match=r"names no rank-00007\.safetensors"):
        Reader(path).tensor("a.weight")


def test_a_pickle_in_disguise_is_not_executed(tmp_path):
    class Malice:
        def __reduce__(self):
            return (open, (str(tmp_path / "pwned"), "w"))

    path = write(tmp_path)
    (path / "rank-00000.safetensors").write_bytes(pickle.dumps(Malice()))
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        Reader(path).tensor("a.weight")
    (path / "state.json").write_bytes(pickle.dumps(Malice()))
    with pytest.raises(CheckpointError, match="damaged"):
        Reader(path)
    assert not (tmp_path / "pwned").exists()


def test_another_model_does_not_load(tmp_path):
    reader = Reader(write(tmp_path))
    with pytest.raises(CheckpointError, match=r"'weight'.*another model"):
        checkpoint.load_weights(torch.nn.Linear(2, 2), reader, LAYOUT)
    model = torch.nn.Module()
    model.a = torch.nn.LayerNorm(3, bias=False)
    with pytest.raises(CheckpointError, match=r"shape \[2\], the model's is \[3\]"):
        checkpoint.load_weights(model, reader, LAYOUT)
    assert json.loads((reader.path / "state.json").read_text())["position"] == {"step": 1}


def test_without_room_for_a_copy_the_file_is_written_at_once(tmp_path, monkeypatch):
    """Tensors are the same, nothing stays in memory, and a full disk is reported as usual."""
    staged, direct = write(tmp_path / "a"), write(tmp_path / "b", size=1 << 60)
    assert direct.joinpath("rank-00000.safetensors").stat().st_size > 1 << 20  # room for a header
    checkpoint.verify(direct)
    one, other = Reader(staged), Reader(direct)
    assert one.entries == other.entries
    for name, entry in one.entries.items():
        for kind in entry.kinds:
            assert one.tensor(name, kind).equal(other.tensor(name, kind))
    assert other.restore_rng(0)
    monkeypatch.setattr(writer, "stream_file", raising(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path / "b", step=2, size=1 << 60)
    assert checkpoint.latest(tmp_path / "b") == direct
