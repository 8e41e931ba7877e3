"""Keys of earlier versions still load, and one line names the key to write."""

import logging

import pytest

from swin_moe.config import ConfigError, load_config
from swin_moe.config.renamed import RENAMED

MODEL = "model: {name: swinv2_moe, embed_dim: 16, depths: [1, 1], num_heads: [1, 2]}\n"
VALUES = {
    "faults.hang_minutes": (1.5, 90.0),
    "moe.balance_weight": (0.5, 0.5),
    "moe.bias_update_rate": (0.001, 0.001),
    "train.accumulation_steps": (2, 2),
    "zero.offload": ("cpu", "cpu"),
    "zero.offload_weights": ("none", "none"),
}


def write(folder, text, name="c.yaml"):
    (folder / name).write_text(MODEL + text)
    return folder / name


def value_of(config, key):
    section, leaf = key
    return getattr(getattr(config, section), leaf)


@pytest.mark.parametrize(("old", "new"), RENAMED.items(), ids=".".join)
def test_a_former_key_is_read_under_its_new_name(tmp_path, caplog, old, new):
    stated, meant = VALUES[".".join(old)]
    rest = {"moe": "  blocks: [[], [0]]\n", "zero": "  stage: 1\n"}
    text = "".join(
        body for body in (f"{old[0]}:\n", rest.pop(old[0], ""), f"  {old[1]}: {stated}\n")
    )
    text += "".join(f"{section}:\n{body}" for section, body in rest.items())
    path = write(tmp_path, text)
    with caplog.at_level(logging.WARNING, "swin_moe"):
        assert value_of(load_config(path), new) == meant
    (line,) = caplog.messages
    assert line.startswith(f"{path}:")
    assert f"{'.'.join(old)} is called {'.'.join(new)}" in line

    plain = write(tmp_path, "moe: {blocks: [[], [0]]}\nzero: {stage: 1}\n")
    assert value_of(load_config(plain, [f"{'.'.join(old)}={stated}"]), new) == meant


def test_both_names_in_one_file_are_refused_by_place(tmp_path):
    path = write(
        tmp_path, "moe:\n  blocks: [[], [0]]\n  balance_weight: 0.5\n  aux_loss_weight: 0.1\n"
    )
    with pytest.raises(ConfigError, match=r"c\.yaml:4: moe\.balance_weight is the former name of"):
        load_config(path)


@pytest.mark.parametrize("ops", ["", "ops: {fused: true}\n"])
def test_the_former_reference_backend_runs_no_kernel(tmp_path, ops):
    """The config.yaml of a former run states ``ops.fused: true`` as well."""
    path = write(tmp_path, "moe: {blocks: [[], [0]], backend: reference}\n" + ops)
    config = load_config(path)
    assert (config.moe.backend, config.ops.fused) == ("fused", False)


@pytest.mark.parametrize("word", ["moe.balance_weigth=1", "train.balance_weight=1"])
def test_a_mistyped_former_key_leads_to_the_new_one(tmp_path, word):
    path = write(tmp_path, "moe: {blocks: [[], [0]]}\n")
    with pytest.raises(ConfigError, match=r"did you mean 'moe\.aux_loss_weight'"):
        load_config(path, [word])


def test_a_key_that_is_gone_is_passed_over_with_a_line(tmp_path, caplog):
    path = write(tmp_path, "moe: {blocks: [[], [0]]}\nops:\n  allow_unverified: true\n")
    with caplog.at_level(logging.WARNING, "swin_moe"):
        load_config(path, ["ops.allow_unverified=false"])
    in_file, override = caplog.messages
    assert in_file.startswith(f"{path}:")
    for line in (in_file, override):
        assert "ops.allow_unverified is gone and has no effect: each kernel is tried" in line
