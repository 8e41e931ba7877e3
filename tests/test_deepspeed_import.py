"""Checkpoints in DeepSpeed's format, written by it, become weights without running code in them."""

import os
import shutil

import pytest
import torch

from swin_moe.checkpoint import Reader
from swin_moe.weights.files import WeightsError, read
from swin_moe.weights.pretrained import read_pretrained
from tests.parallel import run_worker, swin_moe
from tests.workers.equivalence import STEPS


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("deepspeed")
    run_worker("deepspeed_save", folder, 2)
    return folder


@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_fp32_weights_come_back(saved, stage, dtype):
    state = read(saved / f"{stage}-{dtype}").state
    reader = Reader(saved / f"{stage}-{dtype}-ours/step-{STEPS:08d}")
    assert set(state) == set(reader.names())
    for name, tensor in state.items():
        assert tensor.equal(reader.tensor(name)), name
    assert read(saved / f"{stage}-{dtype}/global_step1").state.keys() == state.keys()


def test_experts_are_stacked(saved):
    state = read(saved / "experts").state
    prefix = "layers.1.blocks.1.mlp._moe_layer."
    assert state[prefix + "gates.0.wg.weight"].shape == (4, 16)
    fc1, fc2 = (state[f"{prefix}experts.batched_fc{n}_w"] for n in (1, 2))
    assert fc1.shape == fc2.shape == (4, 64, 16)
    first = torch.load(saved / "experts/first.pth", weights_only=True)
    assert fc1[0].equal(first["fc1.weight"])
    assert fc2[0].equal(first["fc2.weight"].t())
    for expert in range(4):  # they differ between ranks
        torch.testing.assert_close(fc1[expert], fc1[0] + expert)
    source = read_pretrained(saved / "experts")
    assert source.dialect == "official"
    assert source.config.moe.num_experts == 4
    assert source.config.moe.blocks == [[], [1]]


def test_convert_writes_them(saved, tmp_path):
    done = swin_moe("convert", str(saved / "3-bfloat16"), str(tmp_path / "out.safetensors"))
    assert done.returncode == 0, done.stderr
    assert read(tmp_path / "out.safetensors").state["head.weight"].dtype == torch.float32


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("rank", "optimizer's file of rank 0 is missing"),
        ("last", "2 ranks wrote it, 1 files are there"),
        ("all", r"optim_states.pt are missing, which hold ZeRO-3's weights"),
        ("latest", "no folder there"),
        ("cut", "truncated or not a PyTorch file"),
        ("model", r"no \*mp_rank_00_model_states.pt"),
    ],
)
def test_damage_is_one_line(saved, tmp_path, case, message):
    folder = tmp_path / "copy"
    shutil.copytree(saved / "3-float32", folder)
    step = folder / "global_step1"
    zero, one = (step / f"zero_pp_rank_{n}_mp_rank_00_optim_states.pt" for n in (0, 1))
    if case in ("rank", "all"):
        zero.unlink()
    if case in ("last", "all"):
        one.unlink()
    if case == "latest":
        (folder / "latest").write_text("../3-float32")
    if case == "cut":
        os.truncate(one, 1000)
    if case == "model":
        for file in step.glob("*model_states.pt"):
            file.unlink()
    with pytest.raises(WeightsError, match=message) as error:
        read(folder)
    assert "\n" not in str(error.value)


class Evil:
    def __reduce__(self):
        return os.system, ("touch evil",)


@pytest.mark.parametrize("part", ["model", "optim"])
def test_nothing_is_run(saved, tmp_path, part, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "copy"
    shutil.copytree(saved / "2-float32", folder)
    file = next((folder / "global_step1").glob(f"*rank_0*{part}*_states.pt"))
    torch.save(torch.load(file, weights_only=False) | {"more": Evil()}, file)
    with pytest.raises(WeightsError, match="could run code"):
        read(folder)
    assert not (tmp_path / "evil").exists()
