"""Every shipped recipe loads; parameters and GMACs are those of the published tables."""

import io
import re
from pathlib import Path

import pytest
from rich.console import Console

from swin_moe import build_model, list_models
from swin_moe.catalog import models_table
from swin_moe.config import ConfigError, load_config, validate
from swin_moe.models.cost import count
from swin_moe.variants import PUBLISHED

ROOT = Path(__file__).parent.parent
RECIPES = sorted(p for p in (ROOT / "configs").rglob("*.yaml") if not p.name.startswith("_"))


def cost(name):
    config = validate({"model": {"name": name}})
    return count(config.model, config.moe)


def printed_like(value, printed):
    """``value`` with as many decimals, or as many significant digits, as a table prints."""
    if "e" in printed:
        digits = len(printed.split("e")[0].replace(".", "")) - 1
        return f"{value:.{digits}e}".replace("e+0", "e")
    return f"{value:.{len(printed.partition('.')[2])}f}"


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_tables(name):
    published, found = PUBLISHED[name], cost(name)
    assert printed_like(found.parameters / 1e6, published.parameters) == published.parameters
    if published.gmacs:
        assert printed_like(found.macs / 1e9, published.gmacs) == published.gmacs
    if "expert" not in name:
        assert found.activated == found.parameters


@pytest.mark.parametrize("family", ["swin_moe", "swinv2_moe"])
@pytest.mark.parametrize(("size", "experts"), [("small", 8), ("small", 64), ("base", 32)])
def test_top1_activates_what_the_dense_model_has(family, size, experts):
    found = cost(f"{family}_{size}_{experts}expert_window12_192_22k")
    dense = cost(f"swinv2_{size}_window12_192_22k")
    assert found.activated == pytest.approx(dense.parameters, rel=0.005)
    assert found.macs == pytest.approx(dense.macs, rel=0.006)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_loads_and_is_counted(path):
    config = load_config(path)
    found = count(config.model, config.moe)
    assert found.parameters >= found.activated > 0
    if path.parent.name == "imagenet22k":
        assert (config.schedule.epochs, config.optimizer.base_lr) == (90, 1.25e-4)
        assert config.model.num_classes == 21841


def test_recipes_asked_for_are_there():
    names = {path.stem for path in RECIPES}
    assert {f"swinv2_{size}" for size in ("tiny", "small", "base", "large")} <= names
    for family in ("swin_moe", "swinv2_moe"):
        rows = {f"{family}_{s}_{n}expert" for s in ("small", "base") for n in (8, 16, 32, 64)}
        assert rows <= names


# Millions of parameters, and of those that one token meets, as the files' comments have them.
SCALE = {
    "swin_moe_1b": (1033, 66),
    "swin_moe_1b_laptop": (1016, 49),
    "swinv2_g_3b": (3087, 3087),
    "swin_moe_13b": (13712, 718),
    "swin_moe_100b": (126707, 3094),
}


@pytest.mark.parametrize("name", SCALE)
def test_the_billions_build_on_the_meta_device(name):
    config = load_config(ROOT / f"configs/scale/{name}.yaml")
    found = count(config.model, config.moe)
    assert (round(found.parameters / 1e6), round(found.activated / 1e6)) == SCALE[name]


def test_every_recipe_of_scale_is_counted():
    assert {path.stem for path in RECIPES if path.parent.name == "scale"} == SCALE.keys()


def test_the_table_of_models():
    text = Console(width=120, record=True, file=io.StringIO())
    text.print(models_table("swinv2_tiny*"))
    printed = text.export_text()
    assert all(name in printed for name in list_models("swinv2_tiny*"))
    row = r"swinv2_tiny_window16_256 +256/16 +28\.347 +28\.347 +6\.605 +6\.61 +82\.8"
    assert re.search(row, printed)
    with pytest.raises(ValueError, match="did you mean swinv2_tiny"):
        models_table("swinv2_tinny_window8_256")


def test_build_model_and_list_models():
    assert "swinv2_tiny_window8_256" in list_models("swinv2_tiny*")
    assert all(name.startswith("swin_moe") for name in list_models("swin_moe*"))
    model = build_model("swinv2_tiny_window8_256", num_classes=3, depths=[1, 1, 1, 1])
    assert model.head.out_features == 3
    with pytest.raises(ConfigError, match="swin-moe models"):
        build_model("resnet50")
    with pytest.raises(ConfigError, match="did you mean swinv2_base_window16_256"):
        build_model("swinv2_base_window16_265")
    with pytest.raises(ConfigError, match="window_size"):
        build_model("swinv2_tiny_window8_256", windows_size=3)
