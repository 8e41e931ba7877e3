"""The command's output, files and refusals; the large recipes pass it."""

import json
import re
from dataclasses import replace

import pytest
from rich.console import Console

from swin_moe.config import load_config
from swin_moe.models.cost import count
from swin_moe.planner import Cluster, DoesNotFit, command, plan
from swin_moe.planner.choices import Planner, fits, recommend
from tests.parallel import MICRO, ROOT, SMALL, one_error, swin_moe


def planned(tmp_path, config, overrides, cluster, **more):
    console = Console(record=True, width=140, quiet=False, file=open("/dev/null", "w"))  # noqa: SIM115
    found = None
    try:
        plan(
            load_config(ROOT / config, overrides), cluster, console, name="test",
            output=tmp_path / "plan.png", json_path=tmp_path / "plan.json", **more,
        )  # fmt: skip
    except DoesNotFit as error:
        found = str(error)
    return json.loads((tmp_path / "plan.json").read_text()), console.export_text(), found


def test_plan_reports_too_few_images(tmp_path):
    overrides = [*SMALL, "data.batch_size=8"]
    text = planned(tmp_path, MICRO, overrides, Cluster("h100", 1, 2), images=15)[1]
    assert "15 images of an epoch (--images) do not fill a batch of 16: lower data.batch" in text


def test_plan_ranks_layouts_of_the_same_global_batch(tmp_path):
    cluster = Cluster("a100-40", 2, 2)
    figures, text, error = planned(
        tmp_path, MICRO, [*SMALL, "data.batch_size=8", "model.img_size=32"], cluster, simulate=False
    )
    assert error is None
    assert (tmp_path / "plan.png").stat().st_size > 10_000
    assert figures["config"]["fits"]
    fitting = [layout for layout in figures["layouts"] if layout["fits"]]
    first, *times = [layout["seconds"] for layout in fitting]
    assert times == sorted(times)
    assert first <= 1.05 * times[0]
    for layout in figures["layouts"]:
        keys = dict(part.split("=") for part in layout["overrides"])
        assert int(keys["data.batch_size"]) * int(keys["train.gradient_accumulation_steps"]) == 8
        # The config accepts the overrides.
        load_config(MICRO, [*SMALL, *layout["overrides"]])
    assert "GPU-hours" in text
    assert "all_reduce" in text


@pytest.mark.parametrize(
    ("gpu", "override", "dtype", "peak"),
    [
        ("a100-40", [], "bf16", 312e12),
        ("v100", [], "fp16", 125e12),
        ("a100-40", ["precision.dtype=fp16"], "fp16", 312e12),
        ("a100-40", ["precision.dtype=fp32"], "fp32", 19.5e12),
        ("a100-40", ["precision.dtype=fp32", "precision.tf32=true"], "fp32", 156e12),
        ("v100", ["precision.dtype=fp32", "precision.tf32=true"], "fp32", 15.7e12),
        ("cpu", [], "fp32", None),
    ],
)
def test_the_precision_is_that_of_a_run_on_the_device(gpu, override, dtype, peak):
    config = load_config(MICRO, [*SMALL, *override])
    cluster = Cluster(gpu, 1, 1)
    planner = Planner(config, cluster, fused=False)
    assert (planner.dtype, planner.half) == (dtype, dtype != "fp32")
    assert peak in (None, cluster.device.peak(planner.half, config.precision.tf32))


@pytest.mark.parametrize("price", [None, 2.5])
def test_speed_hours_and_cost(tmp_path, price):
    cluster, overrides = Cluster("a100-40", 2, 2), [*SMALL, "data.batch_size=8", "zero.stage=1"]
    figures, text, _ = planned(tmp_path, MICRO, overrides, cluster, images=3200, price=price)
    config = load_config(MICRO, overrides)
    for found in [figures["config"], *figures["layouts"]]:
        each = found["images_per_second_per_gpu"]
        assert each == pytest.approx(8 / found["seconds"])
        flops = 6 * count(config.model, config.moe).macs * each
        peak = cluster.device.half if "bf16" in text else cluster.device.fp32
        assert found["mfu"] == pytest.approx(flops / peak)
        assert found["hours"] == pytest.approx(100 * found["seconds"] / 3600)
        assert found["gpu_hours"] == pytest.approx(4 * found["hours"])
        expected = None if price is None else pytest.approx(2.5 * found["gpu_hours"])
        assert found["cost"] == expected
    assert figures["price"] == price
    assert re.search(r"speed +[\d,]+ images/s a GPU, [\d,]+ in all; MFU [\d.]+ %", text)
    assert (" at 2.5 a GPU-hour" in text) == (price is not None)


def laid_out(**times):
    """Layouts on one GPU with the given seconds by ZeRO stage: `z1=1.0`."""
    planner = Planner(load_config(MICRO, SMALL), Cluster("h100", 1, 1), fused=True)
    layout = planner.lay_out(planner.configured())
    return [
        replace(layout, choice=replace(layout.choice, stage=int(name[1])), compute=seconds,
                exposed={}, update=0.0)
        for name, seconds in sorted(times.items(), key=lambda item: item[1])
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("times", "configured", "taken"),
    [
        ({"z3": 1.0, "z1": 1.04, "z2": 1.02}, 2, 2),  # the config as it is
        ({"z3": 1.0, "z1": 1.04, "z2": 1.06}, 2, 1),  # the lowest stage
        ({"z3": 1.0, "z1": 1.06, "z2": 1.06}, 1, 3),  # clearly faster
        ({"z3": 1.0, "z2": 1.01}, 0, 2),
    ],
)
def test_a_slight_gain_is_not_worth_a_higher_stage(times, configured, taken):
    ranked = laid_out(**times)
    choice = replace(ranked[0].choice, stage=configured)
    assert recommend(ranked, choice, Cluster("h100", 1, 1)).choice.stage == taken


def test_among_layouts_of_a_stage_the_fewest_changes_win():
    (plain,) = laid_out(z1=1.0)
    moved = replace(plain, choice=replace(plain.choice, checkpoint=True), compute=0.99)
    choice = replace(plain.choice, stage=3)
    assert recommend([moved, plain], choice, Cluster("h100", 1, 1)) == plain


def test_a_small_model_stays_as_it_is(tmp_path):
    figures, text, _ = planned(tmp_path, MICRO, SMALL, Cluster("h100", 1, 8), images=10_000)
    assert figures["layouts"][0]["overrides"] == figures["config"]["overrides"]
    assert "take the config as it is: it is within 5 % of the fastest that fits" in text


def test_no_more_blocks_are_recomputed_than_necessary(tmp_path):
    """If nothing fits without recomputation, a layout recomputes the fewest blocks that suffice."""
    batch = 2 * 29009  # twice a prime: no smaller micro-batch avoids recomputation
    overrides = [*SMALL, "model.depths=[2, 4]", "model.img_size=64", "ops.fused=false"]
    overrides += [f"data.batch_size={batch}"]
    cluster = Cluster("rtx4090", 1, 1)
    figures, text, _ = planned(tmp_path, MICRO, overrides, cluster)
    best = load_config(MICRO, [*overrides, *figures["layouts"][0]["overrides"]])
    counts = best.model.use_checkpoint
    assert isinstance(counts, list)
    assert f"{sum(counts)} blocks" in text
    planner = Planner(best, cluster, fused=False)
    assert fits(planner.lay_out(planner.configured()), cluster)
    stage = 1 if counts[1] else 0
    fewer = [count - (place == stage) for place, count in enumerate(counts)]
    one_less = replace(planner.configured(), checkpoint=fewer)
    assert not fits(planner.lay_out(one_less), cluster)


def test_a_config_that_is_too_large_is_refused_with_its_excess_and_a_layout_that_fits(tmp_path):
    large = ["data.batch_size=4096", "model.img_size=224", "model.embed_dim=64"]
    figures, _, error = planned(tmp_path, MICRO, [*SMALL, *large], Cluster("v100", 1, 2))
    assert error is not None
    over = figures["config"]["memory"]
    total = sum(size for kind, size in over.items() if kind != "host") / 2**30
    assert f"needs {total:.1f} GiB of 31.7 on each v100" in error
    assert "what fits: zero.stage=" in error


def test_scaling_has_plausible_efficiencies(tmp_path, monkeypatch):
    monkeypatch.setattr(command, "PUBLISHED", command.PUBLISHED[:1])  # the others are larger
    figures, text, _ = planned(
        tmp_path, MICRO, [*SMALL, "data.batch_size=8", "model.img_size=32"],
        Cluster("h100", 256, 2), simulate=True,
    )  # fmt: skip
    weak, strong = figures["scaling"].values()
    assert [point["gpus"] for point in weak] == [512, 1024, 2048]
    assert weak[0]["efficiency"] == 1
    assert "288 img/s a GPU" in text
    assert all(0 < point["efficiency"] <= 1.001 for point in [*weak, *strong])


@pytest.mark.parametrize("run", command.PUBLISHED, ids=lambda run: run.title)
def test_published_runs_are_layouts_of_recipes(run):
    config = load_config(run.config, run.overrides)
    choice = Planner(config, run.cluster, fused=True).configured()
    assert run.cluster.size == 32
    assert run.cluster.size % choice.expert_parallel_size == 0


LIKE_THE_100B = {"swin_moe_13b", "swin_moe_1b"}


@pytest.mark.parametrize(
    "recipe",
    [
        pytest.param(path, id=path.stem, marks=[pytest.mark.long] * (path.stem in LIKE_THE_100B))
        for path in sorted((ROOT / "configs/scale").glob("*.yaml"))
    ],
)
def test_large_recipes_pass(recipe, tmp_path):
    """Each is laid out, though not each fits."""
    config = load_config(recipe)
    size = config.parallel.expert_parallel_size
    nodes = 1 if size == "auto" else max(1, size // 8)
    planner = Planner(config, Cluster("h100", nodes * 4, 8), fused=True)
    layout = planner.lay_out(planner.configured())
    assert layout.memory.total < 3 * planner.cluster.memory
    assert layout.seconds > 0


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--gpu", "h1000"], "--gpu h1000: unknown; there are v100"),
        (["--price", "-1"], "--price -1 must be a number from 0 on"),
        (["--price", "nan"], "--price nan must be a number from 0 on"),
        (["--nodes", "0"], "--nodes 0 must be at least 1"),
        (
            ["parallel.expert_parallel_size=4", "--gpus-per-node", "6"],
            "parallel.expert_parallel_size=4 does not divide the 6 processes",
        ),
    ],
)
def test_wrong_use_is_one_line(arguments, expected):
    done = swin_moe("plan", str(MICRO), *arguments)
    assert done.returncode == 2
    assert expected in one_error(done)
