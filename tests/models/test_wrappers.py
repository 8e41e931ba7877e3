"""Selecting one network's weights from a training program's file; the rest is named."""

import itertools
from pathlib import Path

import pytest
import torch

from swin_moe.models import SwinTransformer
from swin_moe.weights.files import WeightsError
from swin_moe.weights.pretrained import load_pretrained, read_pretrained
from swin_moe.weights.wrappers import take_network
from tests.models.test_dialects import config

torch.manual_seed(0)
MODEL = SwinTransformer(config("swinv2", depths=[1, 1], num_heads=[2, 4]))
STATE = MODEL.state_dict()
ZEROS = {name: torch.zeros_like(tensor) for name, tensor in STATE.items()}
BODY = {name: tensor for name, tensor in STATE.items() if not name.startswith("head.")}
HEAD = {name: tensor for name, tensor in STATE.items() if name.startswith("head.")}
PATH = Path("x.pth")
ONE = torch.ones(1)


def named(prefix, state=STATE):
    return {prefix + name: tensor for name, tensor in state.items()}


def check(content, *notes, wanted=""):
    """Check that ``STATE`` is taken from the content, and that the notes are these lines."""
    state, found = take_network(content, PATH, wanted)
    assert state.keys() == STATE.keys()
    assert all(torch.equal(state[name], STATE[name]) for name in state)
    assert len(found) == len(notes)
    assert all(note in line for note, line in zip(notes, found, strict=True))


WRAPPERS = ["module.", "_orig_mod.", "model.", "net.", "_forward_module.", "encoder.", "trunk."]


def test_any_stack_of_prefixes():
    for count in (1, 2, 3):
        for stack in itertools.product(WRAPPERS, repeat=count):
            check(named("".join(stack)))


def test_prefixes_on_some_names_only():
    cycle = itertools.cycle(["", "module.", "_orig_mod.module.", "model.", "backbone."])
    check({next(cycle) + name: tensor for name, tensor in STATE.items()})
    inner = itertools.cycle(["", "_orig_mod.", "module.", "_checkpoint_wrapped_module."])
    check({n.replace("blocks.", next(inner) + "blocks."): t for n, t in STATE.items()})
    check(named("img.backbone.", BODY) | named("img.", HEAD))
    for name in ("fc", "classifier"):
        head = {n.replace("head", name): t for n, t in HEAD.items()}
        check(named("backbone.", BODY) | head)
        check(BODY | head)


def test_of_two_networks_the_one_in_training_is_taken():
    note = "x.pth holds 2 networks: 'model' is taken, not 'model_ema.module'"
    check(named("model_ema.module.", ZEROS) | named("model."), note)
    check(named("model.", ZEROS) | named("model_ema.module."), "is taken", wanted="model_ema")
    check(named("student.") | named("teacher.backbone.", ZEROS), "not 'teacher.backbone'")
    check(named("model.", ZEROS) | STATE, "one without a prefix is taken, not 'model'")
    check(named("net.") | named("model.", ZEROS), "'net' is taken", wanted="net")
    with pytest.raises(WeightsError, match="no network 'ema'; it holds 'model', 'model_ema'"):
        take_network(named("model.") | named("model_ema."), PATH, "ema")


def test_other_tensors_are_named():
    average = torch.optim.swa_utils.AveragedModel(MODEL).state_dict()
    check(average, "not read from x.pth: n_averaged")
    check(named("ema_model.") | {"initted": ONE, "step": ONE}, "not read from x.pth: initted, step")
    moments = {f"optimizer.state.{number}.exp_avg": ONE for number in range(1200)}
    check(named("model.module.") | moments, "optimizer (1,200 tensors)")
    check(STATE | {"teacher.conv1.weight": ONE, "loss_fn.center": ONE}, "teacher, loss_fn")
    vit = {"teacher.patch_embed.proj.weight": ONE, "teacher.blocks.0.norm1.weight": ONE}
    check(STATE | vit, "not read from x.pth: teacher (2 tensors)")
    lightning = named("state_dict.model.") | {"state_dict.train_acc.total": ONE}
    check(lightning, "not read from x.pth: state_dict.train_acc")


def save_and_load(tmp_path, content):
    torch.save(content, tmp_path / "x.pth")
    return load_pretrained(MODEL, read_pretrained(tmp_path / "x.pth"))


def test_tensors_that_may_matter_are_refused(tmp_path):
    for name in ("adapter.weight", "layers.0.blocks.0.lora.weight"):
        with pytest.raises(WeightsError, match=rf"x.pth does not fit swinv2: .*{name}"):
            save_and_load(tmp_path, STATE | {name: ONE})


def test_a_training_reports_tensors_that_it_has_not_read(tmp_path):
    odd = torch.eye(2).to_sparse()  # not the network's
    content = {"model": STATE, "optimizer": [{"exp_avg": ONE}], "extra": odd, "epoch": 3}
    content["itself"] = content
    note = save_and_load(tmp_path, content)
    assert "tensors of official names; not read from" in note
    assert note.endswith("x.pth: optimizer, extra")
    note = save_and_load(tmp_path, STATE | {"neck.fc.weight": ONE})
    assert note.endswith("not read from " + str(tmp_path / "x.pth") + ": neck")
