"""A config of a mixture of experts has MoE blocks, and its router learns."""

import io

import pytest
import torch
from rich.console import Console

from swin_moe import build_model
from swin_moe.config import (
    Architecture,
    Config,
    ConfigError,
    MoEConfig,
    dump_config,
    idle_keys,
    load_config,
)
from swin_moe.distributed import Group, World
from swin_moe.moe import lost_gate
from swin_moe.training.run_directory import Run, keep_former_defaults
from swin_moe.weights.files import WeightsError, write
from tests.parallel import MICRO

WRITE = (
    "moe.blocks is empty and the model would be dense: write moe.blocks: [[], [], [1, 3, 5], [1]]"
)


def loaded(tmp_path, text, *overrides, name="c.yaml"):
    path = tmp_path / name
    path.write_text(text)
    return load_config(path, overrides)


@pytest.mark.parametrize(
    ("text", "override", "place", "claim"),
    [
        ("model: {name: swinv2_moe}", None, "c.yaml:1", "model.name=swinv2_moe"),
        ("model: {name: swin_moe}", None, "c.yaml:1", "model.name=swin_moe"),
        ("model: {family: swin_moe}", None, "c.yaml:1", "model.family=swin_moe"),
        ("model: {name: swinv2_moe}\nmoe: {blocks: []}", None, "c.yaml:1", "model.name=swinv2_moe"),
        ("moe: {num_experts: 8}", None, "c.yaml:1", "moe.num_experts=8"),
        ("\nmoe: {blocks: [[], []], top_k: 2}", None, "c.yaml:2", "moe.top_k=2"),
        ("", "moe.num_experts=8", "override 'moe.num_experts=8'", "moe.num_experts=8"),
        ("", "moe={router: cosine}", "override 'moe={router: cosine}'", "moe.router=cosine"),
    ],
)
def test_a_mixture_without_blocks_is_refused(tmp_path, text, override, place, claim):
    with pytest.raises(ConfigError) as error:
        loaded(tmp_path, text, *([override] if override else []))
    message = str(error.value)
    assert f"{place}: {claim}, but {WRITE}, or " in message
    assert "\n" not in message


def test_the_blocks_to_write_fit_the_depths(tmp_path):
    shape = "model: {name: swinv2_moe, depths: [1, 3], num_heads: [3, 6]}"
    with pytest.raises(ConfigError, match=r"write moe.blocks: \[\[\], \[2\]\], or"):
        loaded(tmp_path, shape)
    assert loaded(tmp_path, shape, "moe.blocks=[[], [2]]").moe.enabled


def test_a_variant_that_names_its_experts_keeps_them(tmp_path):
    name = "swinv2_moe_small_8expert_window12_192_22k"
    with pytest.raises(ConfigError, match=f"model.name={name}, .* leave moe.blocks out"):
        loaded(tmp_path, f"model: {{name: {name}}}\nmoe: {{blocks: []}}")
    assert loaded(tmp_path, "model: {name: swin_moe_base_dense_window12_192_22k}")


def test_dense_on_purpose(tmp_path):
    assert not load_config(MICRO, ["moe.blocks=[]"]).moe.enabled
    assert not load_config(MICRO, ["model.name=swinv2", "moe={}"]).moe.enabled


def test_the_config_of_a_dense_run_loads(tmp_path):
    """A run's config states all keys. A run that was dense by mistake still loads."""
    plain = dump_config(loaded(tmp_path, ""))
    assert not loaded(tmp_path, plain).moe.enabled
    with pytest.raises(ConfigError, match=r"override 'moe\.top_k=1': moe\.top_k=1, but"):
        loaded(tmp_path, plain, "moe.top_k=1")
    mistaken = dump_config(load_config(MICRO, ["moe.blocks=[]"]))
    with pytest.raises(ConfigError, match=r"moe\.blocks is empty"):
        loaded(tmp_path, mistaken, name="config.yaml")
    (tmp_path / "manifest.json").touch()
    assert not loaded(tmp_path, mistaken, name="config.yaml").moe.enabled
    with pytest.raises(ConfigError, match=r"override 'moe\.num_experts=4'"):
        loaded(tmp_path, mistaken, "moe.num_experts=4", name="config.yaml")


@pytest.mark.parametrize(
    ("name", "moe"), [("swinv2_moe", {}), ("swin_moe", {}), ("swinv2", {"num_experts": 8})]
)
def test_build_model_refuses_it_as_well(name, moe):
    with pytest.raises(ConfigError, match=r"moe\.blocks is empty"):
        build_model(name, moe=moe)


# --------------------------------------------------------------------------------------------
# The gate of Swin V2

NAME = "swinv2_moe_base_8expert_window12_192_22k"


def test_only_stated_keys_are_set(tmp_path):
    """Defaults of a variant do not count as stated, which a resume needs."""
    config = loaded(tmp_path, f"model: {{name: {NAME}, window_size: 12}}")
    assert config.model.model_fields_set == {"name", "window_size"}
    assert not config.moe.model_fields_set


@pytest.mark.parametrize(
    ("changes", "post_norm", "warned"),
    [
        ({}, True, True),
        ({"score": "sigmoid", "balance": "gshard"}, True, True),
        ({"normalize_gate": True}, True, True),
        ({}, False, False),
        ({"gate_after_norm": True}, True, False),
        ({"top_k": 2}, True, False),
        ({"num_shared_experts": 1}, True, False),
        ({"routing": "soft"}, True, False),
        ({"blocks": []}, True, False),
    ],
)
def test_who_trains_a_router_without_a_gradient_is_warned(changes, post_norm, warned):
    message = lost_gate(MoEConfig(**{"blocks": [[1]], **changes}), post_norm)
    assert message.endswith("start new runs with moe.gate_after_norm=true") == warned
    assert bool(message) == warned


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({}, ""),
        ({"top_k": 2, "eval_top_k": 1, "capacity_factor": 0.0}, ""),
        ({"routing": "expert_choice", "top_k": 2, "gate_noise": 0.5}, ""),
        ({"routing": "expert_choice", "eval_top_k": 1}, "moe.eval_top_k with moe.routing=exp"),
        ({"routing": "soft", "slots_per_expert": 2}, ""),
        ({"routing": "soft", "top_k": 2}, "moe.top_k with moe.routing=soft"),
        ({"slots_per_expert": 2}, "moe.slots_per_expert with moe.routing=token_choice"),
        ({"cosine_router_dim": 8}, "moe.cosine_router_dim with moe.router=linear"),
        ({"router": "cosine", "cosine_router_dim": 8}, ""),
        ({"balance": "none", "aux_loss_weight": 0.1}, "moe.aux_loss_weight with moe.balance=none"),
    ],
)
def test_keys_that_the_routing_does_not_read_are_named(changes, named):
    message = idle_keys(Config(moe=MoEConfig(**{"blocks": [[1]], **changes})))
    assert named in message
    assert bool(message) == bool(named)


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("zero.nvme_path=/tmp", "zero.nvme_path with zero.offload_optimizer=none"),
        ("augment.mixup_switch_prob=0.3", ""),
        ("augment.cutmix=0 augment.mixup_prob=0.3", ""),
        ("augment.cutmix=0 augment.mixup_switch_prob=0.3",
         "augment.mixup_switch_prob with augment.cutmix=0.0"),
        ("augment.cutmix=0 augment.mixup=0 augment.mixup_prob=0.3",
         "augment.mixup_prob with augment.mixup=0.0"),
        ("augment.color_jitter=0.8", "augment.color_jitter with augment.auto_augment=rand"),
        ("augment.color_jitter=0", ""),
        ("augment.color_jitter=0.8 augment.auto_augment=3a", ""),
        ("schedule.warmup_epochs=0 schedule.warmup_lr=0", "schedule.warmup_lr with schedule.warm"),
        ("precision.dtype=bf16 precision.tf32=true", "precision.tf32 with precision.dtype=bf16"),
        ("precision.dtype=fp32 precision.tf32=true", ""),
        ("faults.nonfinite=stop faults.max_nonfinite=3", "faults.max_nonfinite with faults.nonf"),
    ],
)  # fmt: skip
def test_keys_that_nothing_reads_are_named(tmp_path, override, named):
    (tmp_path / "c.yaml").write_text("model: {name: swinv2}\n")
    message = idle_keys(load_config(tmp_path / "c.yaml", override.split()))
    assert named in message
    assert bool(message) == bool(named)


def kept(tmp_path, began, now, fresh=False):
    """Return the config of a resume, and its message, if the checkpoint has another config."""
    text = io.StringIO()
    run = Run(tmp_path, World(0, 0, 1, torch.device("cpu"), Group(), Group()),
              Console(file=text, width=300))  # fmt: skip
    folder = tmp_path / "checkpoints" / "step-00000005"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(dump_config(began))
    (folder / "manifest.json").touch()
    keep_former_defaults(run, now, fresh)
    return now, text.getvalue()


OLD = ("moe.gate_after_norm=false", "model.drop_path_rate=0.2")


def test_a_run_keeps_the_defaults_that_it_began_with(tmp_path):
    recipe = f"model: {{name: {NAME}}}"
    config, message = kept(tmp_path, loaded(tmp_path, recipe, *OLD), loaded(tmp_path, recipe))
    assert not config.moe.gate_after_norm
    assert config.model.drop_path_rate == 0.2
    assert message.startswith(
        "as when the run began: model.drop_path_rate=0.2 moe.gate_after_norm=f"
    )


def test_stated_keys_win_over_former_defaults(tmp_path):
    recipe = f"model: {{name: {NAME}}}"
    stated = loaded(tmp_path, recipe, "moe.gate_after_norm=true", "model.drop_path_rate=0.3")
    config, message = kept(tmp_path, loaded(tmp_path, recipe, *OLD), stated)
    assert config.moe.gate_after_norm
    assert config.model.drop_path_rate == 0.3
    assert not message


@pytest.mark.parametrize(
    ("before", "now", "fresh"),
    [
        ((NAME, *OLD), NAME, True),  # it starts from the beginning
        ((NAME,), NAME, False),  # it began with the present defaults
        ((NAME, "model.drop_path_rate=0.25"), NAME, False),  # never a default
        (("swinv2_moe_base_16expert_window12_192_22k", *OLD), NAME, False),
    ],
)
def test_nothing_else_is_kept(tmp_path, before, now, fresh):
    began = loaded(tmp_path, f"model: {{name: {before[0]}}}", *before[1:])
    asked = loaded(tmp_path, f"model: {{name: {now}}}")
    config, message = kept(tmp_path, began, asked.model_copy(deep=True), fresh)
    assert config == asked
    assert not message


def test_weights_of_a_gate_before_the_norm_are_recognised(tmp_path, caplog):
    shape = {"img_size": 32, "window_size": 4, "num_classes": 3, "embed_dim": 8,
             "depths": [2], "num_heads": [1]}  # fmt: skip
    moe = {"blocks": [[1]], "num_experts": 2}
    model = build_model("swinv2_moe", moe=moe, **shape)
    config = Architecture(model=model.config, moe=model.moe)
    write(tmp_path / "old.safetensors", model.state_dict(), config)
    old = {"pretrained": str(tmp_path / "old.safetensors"), **shape}
    for key, value in (("gate_after_norm", True), ("routing", "expert_choice")):
        now = build_model("swinv2_moe", moe={**moe, key: value}, **old).moe
        was = getattr(model.moe, key)
        assert f"moe.{key}={getattr(now, key)}, but the pretrained model has {was}" in caplog.text
    caplog.clear()
    with pytest.raises(WeightsError, match=r"mixture of experts: set moe.blocks and moe.num_exp"):
        build_model("swinv2", **old)
    assert "normalize_gate" not in caplog.text
