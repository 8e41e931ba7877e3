"""The records and pictures of ``swin-moe inspect`` with every routing, and its one-line errors."""

import re

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from swin_moe.cli.main import main
from swin_moe.config import MoEConfig, dump_config, load_config
from swin_moe.distributed import Group, World
from swin_moe.inspection import inspect_checkpoint
from swin_moe.inspection.command import choose_layers
from swin_moe.inspection.draw import expert_colours, shade
from swin_moe.inspection.routes import DROPPED, LayerFindings, TokenExperts, crop, watched
from swin_moe.models import build
from tests.parallel import MICRO, SMALL, one_error, swin_moe
from tests.saving import save_model
from tests.test_telemetry import MODEL

WORLD = World(0, 0, 1, torch.device("cpu"), Group(), Group())


def model_with(**moe):
    torch.manual_seed(0)
    return build(MODEL, MoEConfig(blocks=[[], [0, 1]], num_experts=4, **moe)).eval()


def test_token_choice_is_recorded_as_the_layer_routed():
    model = model_with(top_k=2, eval_capacity_factor=0.5)
    layer = model.layers[1].blocks[1].mlp
    kept = []
    layer.register_forward_pre_hook(lambda _, inputs: kept.append(inputs[0]))
    images = torch.randn(3, 1, 16, 16)
    with torch.no_grad():
        plain = model(images)
        with watched(model) as seen:
            output = model(images)
        plan = layer.route(kept[-1].reshape(-1, 16)).plan
    assert torch.equal(output.predictions, plain.predictions)
    assert list(seen) == ["layers.1.blocks.0", "layers.1.blocks.1"]
    found = seen["layers.1.blocks.1"]
    assert found.expert.shape == found.weight.shape == (3, 4, 4)
    assert torch.equal(found.counts, output.routing.counts[1])
    first, second = plan.kept.unbind(1)
    assert (~first & second).any()  # the second choice takes over
    taken_by = torch.where(
        first, plan.expert[:, 0], torch.where(second, plan.expert[:, 1], DROPPED)
    )
    assert torch.equal(found.expert.flatten(), taken_by)
    assert (taken_by == DROPPED).any()
    assert "route" not in vars(layer)


@pytest.mark.parametrize("routing", ["expert_choice", "soft"])
def test_other_routings_name_the_expert_that_weighs_most(routing):
    model = model_with(routing=routing, slots_per_expert=2, capacity_factor=1.0)
    plans = []
    layer = model.layers[1].blocks[0].mlp
    with torch.no_grad(), watched(model) as seen:
        inner = layer.route

        def noted(*args, **kwargs):
            plans.append(inner(*args, **kwargs).plan)
            return inner(*args, **kwargs)

        layer.route = noted
        model(torch.randn(2, 1, 16, 16))
    found, plan = seen["layers.1.blocks.0"], plans[0]
    if routing == "soft":
        weight = plan.into_slots.flatten(0, 1).unflatten(1, (4, 2)).amax(2)
    else:
        weight = plan.gate.masked_fill(plan.destination < 0, 0.0)
    best, expert = weight.max(1)
    assert torch.equal(found.weight.flatten(), best)
    assert torch.equal(found.expert.flatten(), torch.where(best > 0, expert, DROPPED))
    assert (found.expert == DROPPED).any() == (routing == "expert_choice")


def test_findings_add_up_and_keep_the_best_patch_of_each_image():
    images = torch.arange(2 * 64.0).view(2, 1, 8, 8)
    expert = torch.tensor([[[0, 0], [1, DROPPED]], [[0, 1], [1, 1]]])
    weight = torch.tensor([[[0.3, 0.9], [0.5, 0.0]], [[0.6, 0.2], [0.7, 0.1]]])
    layer = LayerFindings.empty(4, 3, 2)
    labels = torch.tensor([1, 0])
    layer.add(images, labels, TokenExperts(expert, weight, torch.tensor([3, 5, 0])), 1)
    layer.add(images, labels, TokenExperts(expert, weight / 2, torch.tensor([3, 5, 0])), 1)
    assert layer.load == [0.375, 0.625, 0.0]
    assert layer.classes.tolist() == [[2, 4], [6, 2], [0, 0]]
    assert layer.dropped == 2
    assert [[one.weight for one in best] for best in layer.best] == [
        [pytest.approx(0.9)], [pytest.approx(0.7)], []
    ]  # fmt: skip
    assert torch.equal(layer.best[0][0].pixels, crop(images[0], (0, 1), 4))


def test_a_crop_has_the_patch_in_its_middle_and_repeats_the_edge():
    image = torch.arange(64.0).view(1, 8, 8)
    found = crop(image, (0, 1), 4)
    assert found.shape == (1, 8, 8)
    assert torch.equal(found[:, 2:6, 2:6], image[:, :4, 4:])
    assert torch.equal(found[:, 0], found[:, 2])


def test_shades_are_the_experts_and_grey_where_nobody_took_it():
    colours = expert_colours(64)
    assert len({tuple(colour) for colour in colours.round(3)}) == 64
    pixels = np.zeros((6, 8, 3))  # a side that the patches do not divide
    shown = shade(pixels, np.array([[0, 5], [DROPPED, 1]]), 4, colours)
    assert shown.shape == pixels.shape
    assert np.allclose(shown[:4, :4], colours[0] / 2)
    assert np.allclose(shown[:4, 4:], colours[5] / 2)
    hatched = shown[4:, :4]
    assert np.ptp(hatched, axis=2).max() == 0
    assert len(np.unique(hatched)) == 2


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A checkpoint of the small model in a run directory."""
    folder = tmp_path_factory.mktemp("inspected") / "run"
    config = load_config(MICRO, [*SMALL, "moe.eval_capacity_factor=0.75", "precision.dtype=fp32"])
    model = build(config.model, config.moe)
    save_model(folder / "checkpoints", 1, model, dump_config(config))
    return folder


def test_pictures_and_tables(saved, capsys):
    first, second = inspect_checkpoint(saved, WORLD, Console(width=120), [], images=3)
    assert first == saved / "inspect.png"
    assert second == saved / "inspect-experts.png"
    for path in (first, second):
        with Image.open(path) as image:
            assert image.width > 300
            assert len(set(image.convert("L").getdata())) > 50
    printed = capsys.readouterr().out
    assert "layers.1.blocks.1" in printed
    assert re.search(r"[A-Z]\S+ \d+ %, ", printed)  # names of classes
    assert "patches were dropped" in printed
    step = saved / "checkpoints/step-00000001"
    output = saved.parent / "other.png"
    drawn = inspect_checkpoint(step, WORLD, Console(), [], images=1, output=output)
    assert drawn == (output, saved.parent / "other-experts.png")


def test_refusals_are_one_line(saved, tmp_path):
    def refused(**options):
        overrides = options.pop("overrides", [])
        with pytest.raises(ValueError, match=r"^[^\n]+$") as error:
            inspect_checkpoint(saved, WORLD, Console(), overrides, **options)
        return str(error.value)

    assert refused(layers=["layers.0.blocks.0"]) == (
        "--layer layers.0.blocks.0: the model's MoE layers are layers.1.blocks.1"
    )
    assert "--images=0" in refused(images=0)
    assert "give the name of a .png file" in refused(output=tmp_path / "a.jpg")
    assert "there is no folder" in refused(output=tmp_path / "b/a.png")
    assert "data.path=nowhere" in refused(overrides=["data.path=nowhere"])
    with pytest.raises(ValueError, match="neither a checkpoint nor a run directory"):
        inspect_checkpoint(tmp_path, WORLD, Console(), [])
    assert not list(saved.parent.glob("a*.png"))


def test_a_model_without_moe_layers_has_nothing_to_inspect(tmp_path):
    dense = build(MODEL, MoEConfig())
    with pytest.raises(ValueError, match=r"the model has no MoE layers \(moe.blocks is empty\)"):
        choose_layers(dense, tmp_path, [])


def test_from_the_command_line(saved, capsys):
    """DATA may be omitted before overrides, and mistakes end with exit code 2."""
    done = swin_moe("inspect", str(saved), "data.path=nowhere", "--images", "2")
    assert done.returncode == 2
    assert one_error(done).startswith("data.path=nowhere: no such folder")
    assert main(["inspect", str(saved / "nothing")]) == 2
    assert "no such run directory or checkpoint folder" in capsys.readouterr().err
