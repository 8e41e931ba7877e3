"""Every shipped recipe loads; parameters and GMACs are those of the published tables."""

from pathlib import Path

import pytest

from swin_moe import build_model, list_models
from swin_moe.config import ConfigError, load_config, validate
from swin_moe.models.cost import count

ROOT = Path(__file__).parent.parent
RECIPES = sorted(p for p in (ROOT / "configs").rglob("*.yaml") if not p.name.startswith("_"))

# name: (parameters in millions, GMACs) of the official tables
DENSE = {
    "swinv2_tiny_window8_256": (28.347, 5.93),
    "swinv2_small_window8_256": (49.728, 11.51),
    "swinv2_base_window8_256": (87.919, 20.29),
    "swinv2_tiny_window16_256": (28.347, 6.61),
    "swinv2_small_window16_256": (49.728, 12.65),
    "swinv2_base_window16_256": (87.919, 21.80),
    "swinv2_base_window12_192_22k": (109.28, 11.78),
    "swinv2_large_window12_192_22k": (228.77, 26.00),
    "swinv2_base_window12to16_192to256_22kto1k": (87.92, 21.80),
    "swinv2_base_window12to24_192to384_22kto1k": (87.92, 54.75),
    "swinv2_large_window12to16_192to256_22kto1k": (196.74, 47.49),
    "swinv2_large_window12to24_192to384_22kto1k": (196.74, 115.42),
}
# Published for the pre-norm Swin-MoE. Ours is V2: no k bias, narrower merging norms, biases in the
# dense feed-forwards; together less than 0.1 M parameters.
MOE = {
    ("small", 8): 173.3, ("small", 16): 296.1, ("small", 32): 541.8, ("small", 64): 1033.0,
    ("base", 8): 300.3, ("base", 16): 518.7, ("base", 32): 955.3,
}  # fmt: skip


def cost(name):
    config = validate({"model": {"name": name}})
    return count(config.model, config.moe)


@pytest.mark.parametrize("name", DENSE)
def test_dense_table(name):
    parameters, gmacs = DENSE[name]
    found = cost(name)
    digits = len(str(parameters).split(".")[1])
    assert round(found.parameters / 1e6, digits) == pytest.approx(parameters)
    assert found.macs / 1e9 == pytest.approx(gmacs, abs=0.0051)
    assert found.activated == found.parameters


@pytest.mark.parametrize(("size", "experts"), MOE)
def test_moe_table(size, experts):
    found = cost(f"swin_moe_{size}_{experts}expert_window12_192_22k")
    assert found.parameters / 1e6 == pytest.approx(
        MOE[size, experts], abs=0.3 if experts == 64 else 0.1
    )
    dense = cost(f"swinv2_{size}_window12_192_22k")
    # Top-1 activates what the dense model has, and the router.
    assert found.activated == pytest.approx(dense.parameters, rel=0.005)
    assert found.macs == pytest.approx(dense.macs, rel=0.005)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_loads_and_is_counted(path):
    config = load_config(path)
    found = count(config.model, config.moe)
    assert found.parameters >= found.activated > 0
    if path.parent.name == "imagenet22k":
        name = config.model.name
        kind, size = ("moe", name.split("_")[2]) if "moe" in name else ("v2", name.split("_")[1])
        if kind == "moe" and (size, config.moe.num_experts) in MOE:
            expected = MOE[size, config.moe.num_experts]
            assert found.parameters / 1e6 == pytest.approx(expected, rel=1e-3)
        if kind == "v2" and name in DENSE:
            assert found.macs / 1e9 == pytest.approx(DENSE[name][1], abs=0.0051)
        assert (config.schedule.epochs, config.optimizer.base_lr) == (90, 1.25e-4)
        assert config.model.num_classes == 21841


def test_recipes_asked_for_are_there():
    names = {path.stem for path in RECIPES}
    assert {f"swinv2_{size}" for size in ("tiny", "small", "base", "large")} <= names
    assert {f"swin_moe_{s}_{n}expert" for s in ("small", "base") for n in (8, 16, 32, 64)} <= names


def test_build_model_and_list_models():
    assert "swinv2_tiny_window8_256" in list_models("swinv2_tiny*")
    assert all(name.startswith("swin_moe") for name in list_models("swin_moe*"))
    model = build_model("swinv2_tiny_window8_256", num_classes=3, depths=[1, 1, 1, 1])
    assert model.head.out_features == 3
    with pytest.raises(ConfigError, match="list_models"):
        build_model("resnet50")
    with pytest.raises(ConfigError, match="window_size"):
        build_model("swinv2_tiny_window8_256", windows_size=3)
