"""A recipe is found by its name, listed and copied."""

import pytest

from swin_moe.cli import recipes
from swin_moe.common import shipped
from swin_moe.config import ConfigError, load_config
from swin_moe.config.recipes import recipe_files
from swin_moe.data.source import open_source
from tests.parallel import MICRO, ROOT, one_error, swin_moe

NAME = "fashion_mnist/swin_moe_micro"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", [NAME, f"{NAME}.yaml"])
def test_a_name_stands_for_the_file(name):
    config = load_config(name, ["zero.stage=1"])
    assert config == load_config(MICRO, ["zero.stage=1"])
    assert config.train.output == "runs/swin_moe_micro"


@pytest.mark.parametrize("name", [NAME, f"{NAME}.yaml"])
def test_a_file_wins_over_a_recipe(name, tmp_path):
    mine = tmp_path / f"{NAME}.yaml"
    mine.parent.mkdir()
    mine.write_text("model:\n  name: swinv2_tiny_window8_256\n")
    assert load_config(name).model.name == "swinv2_tiny_window8_256"


def test_a_folder_of_that_name_is_reported(tmp_path):
    (tmp_path / NAME).mkdir(parents=True)
    with pytest.raises(ConfigError, match="is a folder, not a file"):
        load_config(NAME)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("swin_moe_micro", f"did you mean {NAME}?"),
        (f"configs/{NAME}.yaml", f"did you mean {NAME}?"),
        ("imagenet22k/swinv2_tyni", "did you mean imagenet22k/swinv2_tiny?"),
        ("imagenet22k/_moe", ""),
        (f"../{ROOT.name}/configs/nothing", ""),
        ("no\x1bsuch", ""),
    ],
)
def test_an_unknown_name_gets_near_ones(name, hint):
    with pytest.raises(ConfigError, match=": no such config file or recipe: ") as caught:
        load_config(name)
    message = str(caught.value)
    assert hint in message
    assert message.endswith("`swin-moe recipes` lists them")
    assert message.isprintable()


def test_every_recipe_has_a_line():
    lines = recipes.listing("*")
    assert [line.split()[0] for line in lines] == list(recipe_files())
    for line in lines:
        name, model, about = line.split(maxsplit=2)
        assert load_config(name).model.name == model
        assert len(about) > 20
        assert "." not in name  # the experiments of slurm.sbatch cut a name at its last dot


def test_copies_are_the_recipes_and_never_overwrite(tmp_path):
    copied = recipes.copy("swin_moe_1b*", tmp_path / "mine")
    assert {path.name for path in copied} == {
        "_moe.yaml", "_pretrain.yaml", "swin_moe_1b.yaml", "swin_moe_1b_laptop.yaml",
    }  # fmt: skip
    for path in copied:
        original = shipped.recipes() / path.relative_to(tmp_path / "mine")
        assert path.read_bytes() == original.read_bytes()
    mine = tmp_path / "mine/scale/swin_moe_1b.yaml"
    assert load_config(mine) == load_config("scale/swin_moe_1b")
    recipes.copy("scale/swin_moe_1b_laptop", tmp_path / "mine")  # the same files again
    mine.write_text("edited: true\n")
    with pytest.raises(ValueError, match="is not this recipe"):
        recipes.copy("scale/*", tmp_path / "mine")
    assert mine.read_text() == "edited: true\n"
    assert not (tmp_path / "mine/scale/swin_moe_13b.yaml").exists()


def test_the_command(tmp_path):
    listed = swin_moe("recipes", "scale/*").stdout.splitlines()
    assert [line.split()[0] for line in listed] == [n for n in recipe_files() if "scale/" in n]
    copied = swin_moe("recipes", NAME, "--copy", str(tmp_path))
    assert copied.stdout.splitlines() == [str(tmp_path / f"{NAME}.yaml")]
    near = f"swin_moe_macro: no such recipe: did you mean {NAME}"
    assert one_error(swin_moe("recipes", "swin_moe_macro")).startswith(near)


def test_copied_recipes_do_not_hide_the_bundled_sample(tmp_path):
    """The copy makes a folder with the name of the sample."""
    assert swin_moe("recipes", "fashion*", "--copy", ".", folder=tmp_path).returncode == 0
    data = load_config(NAME).data
    assert len(open_source(data, 10, training=True)) == 10_000
    (tmp_path / "fashion_mnist" / "train").mkdir()
    with pytest.raises(ValueError, match=r"data\.train=train"):
        open_source(data, 10, training=True)
