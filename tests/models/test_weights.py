"""Files of weights: every form is read, none is executed, damage is reported in one line."""

import argparse
import collections
import datetime
import json
import os
import pathlib
import subprocess
import sys
import types

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from swin_moe.weights.files import WeightsError, read, write
from tests.golden import Golden

FIRST, BLOCK = "patch_embed.proj.weight", "layers.0.blocks.0.norm1.weight"
STATE = {FIRST: torch.arange(6.0).view(2, 3), BLOCK: torch.ones(4)}


def same(found, expected):
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.system, (f"touch {self.path}",))


class Reduced:
    """An object that is pickled as the call of a function."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call[0], self.call[1:]


def touched(path):
    path.touch()


@pytest.mark.parametrize(
    "name",
    ["mmengine.logging.history_buffer.HistoryBuffer",
     "pytorch_lightning.utilities.parsing.AttributeDict"],
)  # fmt: skip
def test_records_of_other_programs_become_plain(tmp_path, monkeypatch, name):
    *folders, kind = name.split(".")
    cls = type(kind, (), {"__module__": ".".join(folders)})
    held = cls()
    held.history = np.arange(3.0)
    with monkeypatch.context() as patch:
        for count in range(1, len(folders) + 1):
            patch.setitem(sys.modules, ".".join(folders[:count]), types.ModuleType("x"))
        setattr(sys.modules[cls.__module__], kind, cls)
        torch.save({"state_dict": STATE, "message_hub": {"loss": held}}, tmp_path / "x.pth")
    same(read(tmp_path / "x.pth").state, STATE)


@pytest.fixture
def config_class(monkeypatch):
    """Make a class like yacs', importable only while the file is written."""

    class CfgNode(dict):
        def __init__(self, items=()):
            super().__init__(items)
            self.__dict__["__immutable__"] = True

    CfgNode.__module__, CfgNode.__qualname__ = "yacs.config", "CfgNode"
    package, module = types.ModuleType("yacs"), types.ModuleType("yacs.config")
    module.CfgNode = CfgNode
    package.config = module
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "yacs", package)
        patch.setitem(sys.modules, "yacs.config", module)
        yield CfgNode


@pytest.mark.parametrize("wrapper", ["model", "state_dict", ""])
@pytest.mark.parametrize("zipped", [True, False])
def test_pth(tmp_path, wrapper, zipped):
    path = tmp_path / "x.pth"
    content = {wrapper: STATE, "epoch": 3} if wrapper else STATE
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    same(read(path).state, STATE)


@pytest.mark.parametrize("wrapper", ["model_ema", "state_dict_ema"])
@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model."])
def test_wrapped_weights(tmp_path, wrapper, prefix):
    held = {prefix + name: tensor for name, tensor in STATE.items()}
    torch.save({wrapper: held, "model": {}}, tmp_path / "x.pth")
    same(read(tmp_path / "x.pth").state, STATE)
    torch.save({"model": {"state_dict": held}}, tmp_path / "y.pth")
    same(read(tmp_path / "y.pth").state, STATE)


def test_an_official_file_with_its_config_object(tmp_path, config_class):
    path = tmp_path / "official.pth"
    extra = {
        "config": config_class({"MODEL": config_class({"DEPTHS": [2, 2]})}),
        "args": argparse.Namespace(lr=1.0),
        "max_accuracy": np.float64(81.2),
        "history": {"loss": np.arange(3.0), "count": np.arange(3)},
        "optimizer": {"state": {0: {"step": 1}}, "param_groups": []},
    }
    torch.save({"model": STATE, **extra}, path)
    del sys.modules["yacs"], sys.modules["yacs.config"]
    same(read(path).state, STATE)


def test_code_in_a_pickle_never_runs(tmp_path):
    mark = tmp_path / "it-ran"
    torch.save({"model": STATE, "extra": Evil(mark)}, tmp_path / "evil.pth")
    with pytest.raises(WeightsError, match=r"holds a Python object \(posix.system\).*refused"):
        read(tmp_path / "evil.pth")
    for harmful in (
        Reduced(subprocess.getoutput, f"touch {mark}"),
        Reduced(eval, f"open('{mark}', 'w')"),
    ):
        torch.save({"model": STATE, "extra": harmful}, tmp_path / "odd.pth")
        with pytest.raises(WeightsError, match="could run code"):
            read(tmp_path / "odd.pth")
    assert not mark.exists()


def test_objects_of_other_programs_are_left_out(tmp_path):
    """Lightning stores any hyper-parameters; their code is not called."""
    mark = tmp_path / "it-ran"
    parameters = {
        "path": pathlib.PurePosixPath("/data"),
        "since": datetime.datetime(2026, 1, 1),
        "counts": collections.defaultdict(list, a=[1]),
        "own": Evil(mark).__class__,
        "called": Reduced(touched, mark),
        "name": np.str_("swin"),
    }
    torch.save({"state_dict": STATE, "hyper_parameters": parameters}, tmp_path / "x.ckpt")
    same(read(tmp_path / "x.ckpt").state, STATE)
    assert not mark.exists()


@pytest.mark.parametrize("share", [0.0, 0.5, 0.95])
@pytest.mark.parametrize("name", ["x.pth", "legacy.pth", "x.safetensors"])
def test_truncated_files(tmp_path, name, share):
    path = tmp_path / name
    if name == "legacy.pth":
        torch.save(STATE, path, _use_new_zipfile_serialization=False)
    else:
        write(path, STATE)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(WeightsError, match=r"truncated or not a|empty") as error:
        read(path)
    assert "\n" not in str(error.value)


def test_other_mistakes(tmp_path):
    with pytest.raises(WeightsError, match="no such file"):
        read(tmp_path / "absent.pth")
    (tmp_path / "x.txt").write_text("weights")
    with pytest.raises(WeightsError, match="is text that begins 'weights'"):
        read(tmp_path / "x.txt")
    torch.save({"epoch": 3}, tmp_path / "none.pth")
    with pytest.raises(WeightsError, match="no weights found"):
        read(tmp_path / "none.pth")
    torch.save({"a": torch.ones(2, device="meta")}, tmp_path / "meta.pth")
    with pytest.raises(WeightsError, match="without content"):
        read(tmp_path / "meta.pth")
    (tmp_path / "folder").mkdir()
    with pytest.raises(WeightsError, match="no checkpoint in this folder"):
        read(tmp_path / "folder")
    torch.save({FIRST: torch.ones(0), BLOCK: torch.ones(0)}, tmp_path / "part.pt")
    with pytest.raises(WeightsError, match=f"'{FIRST}' is empty.*name the checkpoint's folder"):
        read(tmp_path / "part.pt")
    with pytest.raises(WeightsError, match="no such file or folder: download the file"):
        read(pathlib.Path("https://example.com/swin.pth"))
    with pytest.raises(WeightsError, match="must end in"):
        write(tmp_path / "x.onnx", STATE)


def test_sharded_folder(tmp_path):
    for index, name in enumerate(STATE):
        save_file({name: STATE[name]}, tmp_path / f"model-0000{index + 1}-of-00002.safetensors")
    same(read(tmp_path).state, STATE)
    index = tmp_path / "model.safetensors.index.json"
    first = "model-00001-of-00002.safetensors"
    index.write_text(json.dumps({"weight_map": {FIRST: first, "c": "gone"}}))
    with pytest.raises(WeightsError, match="the shard gone is missing"):
        read(tmp_path)
    save_file({FIRST: torch.zeros(1)}, tmp_path / "zz_old.safetensors")
    index.write_text(json.dumps({"weight_map": {FIRST: first}}))
    same(read(tmp_path).state, {FIRST: STATE[FIRST]})
    index.write_text('{"weight_map": {"a": "../outside.safetensors"}}')
    with pytest.raises(WeightsError, match="is missing"):
        read(tmp_path)
    index.write_text("[]")
    with pytest.raises(WeightsError, match="not an index"):
        read(tmp_path)


def test_companions_in_a_folder_are_passed_over(tmp_path):
    save_file(STATE, tmp_path / "model.safetensors")
    (tmp_path / "._model.safetensors").write_bytes(b"\0\5\x16\7")
    (tmp_path / "model.fp16.safetensors").write_bytes(b"")
    same(read(tmp_path).state, STATE)
    (tmp_path / "model.safetensors").rename(tmp_path / "x.safetensors")
    (tmp_path / "model.fp16.safetensors").unlink()
    same(read(tmp_path).state, STATE)


def test_shards_of_pickles(tmp_path):
    names = {name: f"pytorch_model-0000{i + 1}-of-00002.bin" for i, name in enumerate(STATE)}
    for name, file in names.items():
        torch.save({name: STATE[name]}, tmp_path / file)
    same(read(tmp_path).state, STATE)
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": names}))
    same(read(tmp_path).state, STATE)
    torch.save(STATE, tmp_path / names[BLOCK])
    with pytest.raises(WeightsError, match=f"'{FIRST}' is in another shard, too"):
        read(tmp_path)


@pytest.mark.parametrize("name", ["x.safetensors", "x.pth"])
def test_files_follow_the_umask(tmp_path, name):
    for mask in (0o027, 0o077):
        before = os.umask(mask)
        try:
            write(tmp_path / name, STATE)
        finally:
            os.umask(before)
        assert (tmp_path / name).stat().st_mode & 0o777 == 0o666 & ~mask


def test_views_are_written_without_their_storage(tmp_path):
    write(tmp_path / "x.safetensors", {"a": torch.zeros(1000, 1000)[:1]})
    assert (tmp_path / "x.safetensors").stat().st_size < 10_000


# --------------------------------------------------------------------------------------------
# Official Swin-MoE: one file per rank


def split(state, ranks):
    """Split experts over ``ranks`` ranks as Tutel does; with more ranks, several share one."""
    experts = {n: t for n, t in state.items() if ".experts." in n}
    counts = {n: t for n, t in state.items() if n.endswith("_num_global_experts")}
    num_experts = 4
    files = []
    for rank in range(ranks):
        held = {}
        for name, tensor in experts.items():
            if ranks <= num_experts:
                held[name] = tensor.chunk(ranks)[rank].clone()
            else:
                slices = ranks // num_experts
                expert, part = divmod(rank, slices)
                width = -(-tensor.shape[1] // slices)
                padded = torch.nn.functional.pad(
                    tensor.movedim(1, -1), (0, width * slices - tensor.shape[1])
                ).movedim(-1, 1)
                held[name] = padded[expert : expert + 1, part * width : (part + 1) * width].clone()
        files.append(held | counts)
    return {n: t for n, t in state.items() if n not in experts}, files


@pytest.mark.parametrize("ranks", [1, 2, 4, 8, 12])
@pytest.mark.parametrize("suffix", ["", ".master", ".rank0"])
def test_official_rank_files(tmp_path, ranks, suffix):
    state = Golden("swin_moe_official").weights
    dense, files = split(state, ranks)
    torch.save({"model": dense}, tmp_path / "c.pth.master")
    for rank, held in enumerate(files):
        torch.save({"model": held}, tmp_path / f"c.pth.rank{rank}")
    same(read(tmp_path / f"c.pth{suffix}").state, state)
    if ranks > 1:
        (tmp_path / "c.pth.rank1").unlink()
        with pytest.raises(WeightsError, match=r"rank1 is missing|ranks hold|not in every"):
            read(tmp_path / "c.pth")


def test_official_global_file(tmp_path):
    state = Golden("swin_moe_official").weights
    torch.save({"model": state}, tmp_path / "c.pth.global")
    same(read(tmp_path / "c.pth").state, state)
