"""A config that says that it is a mixture of experts is one, and one that learns."""

import pytest

from swin_moe import build_model
from swin_moe.config import ConfigError, dump_config, load_config
from swin_moe.variants import FAMILIES, VARIANTS
from tests.parallel import MICRO

WRITE = (
    "moe.blocks is empty and the model would be dense: write moe.blocks: [[], [], [1, 3, 5], [1]]"
)


def loaded(tmp_path, text, *overrides, name="c.yaml"):
    path = tmp_path / name
    path.write_text(text)
    return load_config(path, overrides)


@pytest.mark.parametrize(
    ("text", "override", "place", "said"),
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
def test_a_mixture_without_blocks_is_refused(tmp_path, text, override, place, said):
    with pytest.raises(ConfigError) as error:
        loaded(tmp_path, text, *([override] if override else []))
    message = str(error.value)
    assert f"{place}: {said}, but {WRITE}, or " in message
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


def test_what_a_dense_run_wrote_loads(tmp_path):
    """All keys stand in it; a run that a former program made dense by mistake loads, too."""
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


def test_what_is_set_is_what_the_user_stated(tmp_path):
    """Not what a variant fills in: a resume asks for that, see ``run_directory``."""
    name = "swinv2_moe_small_8expert_window12_192_22k"
    config = loaded(tmp_path, f"model: {{name: {name}, window_size: 12}}")
    assert config.model.model_fields_set == {"name", "window_size"}
    assert not config.moe.model_fields_set
    assert FAMILIES.keys().isdisjoint(VARIANTS)
