"""The command: what it prints, writes and refuses; and that the large recipes pass it."""

import json
from dataclasses import replace

import pytest
from rich.console import Console

from swin_moe.config import load_config
from swin_moe.planner import Cluster, DoesNotFit, command, plan
from swin_moe.planner.choices import Planner, fits
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


def test_plan_ranks_layouts_of_the_same_global_batch(tmp_path):
    cluster = Cluster("a100-40", 2, 2)
    figures, text, error = planned(
        tmp_path, MICRO, [*SMALL, "data.batch_size=8", "model.img_size=32"], cluster, simulate=False
    )
    assert error is None
    assert (tmp_path / "plan.png").stat().st_size > 10_000
    assert figures["config"]["fits"]
    fitting = [layout for layout in figures["layouts"] if layout["fits"]]
    times = [layout["seconds"] for layout in fitting]
    assert times == sorted(times)
    for layout in figures["layouts"]:
        keys = dict(part.split("=") for part in layout["overrides"])
        assert int(keys["data.batch_size"]) * int(keys["train.accumulation_steps"]) == 8
        # Ready to paste: the config takes them.
        load_config(MICRO, [*SMALL, *layout["overrides"]])
    assert "GPU-hours" in text
    assert "all_reduce" in text


def test_no_more_is_recomputed_than_must_be(tmp_path):
    """Where keeping all does not fit, one layout recomputes so many blocks as make it fit."""
    batch = 2 * 29009  # a prime: no middling micro-batch is a way out
    overrides = [*SMALL, "model.depths=[2, 4]", "model.img_size=64", f"data.batch_size={batch}"]
    cluster = Cluster("rtx4090", 1, 1)
    figures, text, _ = planned(tmp_path, MICRO, overrides, cluster)
    best = load_config(MICRO, [*overrides, *figures["layouts"][0]["overrides"]])
    counts = best.model.use_checkpoint
    assert isinstance(counts, list)
    assert f"{sum(counts)} blocks" in text
    planner = Planner(best, cluster, fused=False)
    assert fits(planner.lay_out(planner.asked()), cluster)
    stage = 1 if counts[1] else 0
    fewer = [count - (place == stage) for place, count in enumerate(counts)]
    one_less = replace(planner.asked(), checkpoint=fewer)
    assert not fits(planner.lay_out(one_less), cluster)


def test_what_cannot_fit_says_by_how_much_and_what_would(tmp_path):
    large = ["data.batch_size=4096", "model.img_size=224", "model.embed_dim=64"]
    figures, _, error = planned(tmp_path, MICRO, [*SMALL, *large], Cluster("v100", 1, 2))
    assert error is not None
    over = figures["config"]["memory"]
    total = sum(size for kind, size in over.items() if kind != "host") / 2**30
    assert f"needs {total:.1f} GiB of 31.7 on each v100" in error
    assert "what fits: zero.stage=" in error


def test_scaling_keeps_its_promises(tmp_path, monkeypatch):
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
    config = load_config(ROOT / "configs" / run.config, list(run.overrides))
    choice = Planner(config, run.cluster, fused=True).asked()
    assert run.cluster.size == 32
    assert run.cluster.size % choice.expert_parallel_size == 0


@pytest.mark.parametrize("recipe", sorted((ROOT / "configs/scale").glob("*.yaml"), key=str))
def test_large_recipes_pass(recipe, tmp_path):
    """Each is laid out; the roads to what fits are the planner's business."""
    config = load_config(recipe)
    size = config.parallel.expert_parallel_size
    nodes = 1 if size == "auto" else max(1, size // 8)
    planner = Planner(config, Cluster("h100", nodes * 4, 8), fused=True)
    layout = planner.lay_out(planner.asked())
    assert layout.memory.total < 3 * planner.cluster.memory
    assert layout.seconds > 0


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--gpu", "h1000"], "--gpu h1000: unknown; there are v100"),
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
