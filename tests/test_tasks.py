"""The interface of tasks, SimMIM as the second task, and the files that may name a task."""

import json
import re
import shutil

import pytest
import torch

from swin_moe.config import TASKS as SECTIONS
from swin_moe.config import Config, load_config
from swin_moe.models import Outputs
from swin_moe.moe import moe_layers
from swin_moe.tasks import TASKS, build_task
from tests.parallel import ROOT, swin_moe, train
from tests.test_imports import FILES, PACKAGE

SIMMIM = ROOT / "configs/fashion_mnist/simmim_micro.yaml"
MICRO = ROOT / "configs/fashion_mnist/swin_moe_micro.yaml"
CPU = torch.device("cpu")
SMALL = ["model.embed_dim=16", "model.depths=[1,1,1]", "model.num_heads=[1,2,4]",
         "moe.blocks=[[],[0],[0]]", "data.batch_size=20", "precision.dtype=fp32",
         "log.tensorboard=false", "data.num_workers=0"]  # fmt: skip


def task_of(path, *overrides, rank=0):
    return build_task(load_config(path, [*SMALL, *overrides]), rank)


def batch_of(task, count=4):
    """Return a batch like a loader's."""
    example = task.example_batch(count, CPU)
    images = (torch.rand(count, 1, 32, 32) * 255).to(torch.uint8)
    labels = torch.arange(count) % 10
    indices = torch.arange(count) + 7
    return example._replace(inputs={"images": images}, targets=labels, indices=indices)


def test_sections_and_tasks_have_the_same_names():
    assert SECTIONS.keys() == TASKS.keys()


@pytest.mark.parametrize("path", [MICRO, SIMMIM], ids=["classification", "simmim"])
def test_a_task_trains_and_evaluates_by_its_contract(path):
    task = task_of(path)
    task.check()
    model = task.build_model()
    assert len(moe_layers(model)) == 2
    prepared = task.prepare(batch_of(task), 3, training=True)
    for batch in (prepared, task.example_batch(4, CPU)):
        outputs, result, total = task.step(lambda inputs: model(**inputs), batch)
        assert isinstance(outputs, Outputs)
        assert torch.equal(total, result.loss + outputs.aux_loss)
        total.backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None]
    assert missing == []
    evaluator = task.evaluator(CPU)
    held_out = task.prepare(batch_of(task), 0, training=False)
    with torch.no_grad():
        evaluator.update(model.eval()(**held_out.inputs), held_out)
    found = evaluator.compute()
    assert found.samples == 4
    assert {metric.key for metric in task.metrics} == found.metrics.keys()
    pixels, captions = task.preview(prepared)
    assert pixels.shape == (4, 32, 32, 1)
    assert len(captions) == 4


def test_invalid_samples_count_nowhere():
    for path in (MICRO, SIMMIM):
        task = task_of(path)
        model = task.build_model().eval()
        whole = task.prepare(batch_of(task), 0, training=False)
        evaluator, part = task.evaluator(CPU), task.evaluator(CPU)
        with torch.no_grad():
            outputs = model(**whole.inputs)
        evaluator.update(outputs, whole._replace(valid=torch.tensor([True, True, False, False])))
        first = {name: x[:2] for name, x in whole.inputs.items()}
        cut = whole._replace(inputs=first, targets=whole.targets[:2], valid=whole.valid[:2])
        part.update(Outputs(outputs.predictions[:2]), cut)
        assert evaluator.compute() == part.compute()


def test_masks_of_training_follow_step_and_rank_and_those_of_evaluation_the_sample():
    first, second = task_of(SIMMIM), task_of(SIMMIM, rank=1)
    batch = batch_of(first)

    def masks(task, step, training):
        return task.prepare(batch, step, training).inputs["mask"]

    assert torch.equal(masks(first, 1, True), masks(first, 1, True))
    assert not torch.equal(masks(first, 1, True), masks(first, 2, True))
    assert not torch.equal(masks(first, 1, True), masks(second, 1, True))
    assert torch.equal(masks(first, 1, False), masks(second, 2, False))
    other = batch._replace(indices=batch.indices.flip(0))
    flipped = first.prepare(other, 0, False).inputs["mask"]
    assert torch.equal(flipped, masks(first, 0, False).flip(0))
    assert masks(first, 1, True).flatten(1).sum(1).tolist() == [10 * 4] * 4  # ⌈0.6·16⌉ units


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.num_classes=3"], "model.num_classes=3, but task.name=simmim learns no classes"),
        (["augment.mixup=0.5"], "augment.mixup=0.5 has no meaning with task.name=simmim"),
        (["augment.random_erase=0.1"], "augment.random_erase=0.1 has no meaning"),
        (["task.mask_unit=6"], "task.mask_unit=6 must divide"),
        (["task.mask_unit=2"], "multiple of model.patch_size=4"),
    ],
)
def test_settings_that_simmim_cannot_use_are_one_line(overrides, message):
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        task_of(SIMMIM, *overrides).check()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("task.name=moby", "task.name='moby': expected 'classification' or 'simmim'"),
        ("task.mask_rate=0.5", "unknown key 'task.mask_rate': did you mean 'task.mask_ratio'?"),
        ("task=simmim", "'task' is a section and needs keys below it"),
        ("task.mask_ratio=0", "task.mask_ratio=0: expected greater than 0"),
        ("task.norm_target_size=46", "override 'task.norm_target_size=46': task.norm_target_size:"),
        ("task.norm_target_size=1", "1 must be odd and at least 3, or 0"),
    ],
)
def test_a_wrong_task_is_one_line(override, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        load_config(SIMMIM, [override])
    with pytest.raises(ValueError, match=r"only task\.name='simmim' has it"):
        load_config(MICRO, ["task.mask_ratio=0.5"])


def test_a_task_brings_its_defaults_and_what_is_stated_wins():
    plain, masked = Config(), load_config(SIMMIM, ["augment.scale=[0.5,1.0]"])
    assert plain.task.name == "classification"
    assert masked.augment.scale == [0.5, 1.0]
    assert (masked.augment.mixup, masked.model.num_classes) == (0.0, 0)
    assert not masked.mixes_pairs


@pytest.fixture(scope="module")
def masked(tmp_path_factory):
    """SimMIM over a Swin-MoE on 2 processes that share the experts: 4 updates, then 4 more."""
    root = tmp_path_factory.mktemp("simmim")
    recipe = [*SMALL, "log.every_steps=1", "parallel.expert_parallel_size=2",
              "moe.expert_bias_update_rate=0.001", "checkpoint.every_steps=4"]  # fmt: skip
    whole = train(root / "whole", *recipe, "train.max_steps=8", config=SIMMIM, processes=2)
    assert whole.returncode == 0, whole.stderr
    half = train(root / "half", *recipe, "train.max_steps=4", config=SIMMIM, processes=2)
    assert half.returncode == 0, half.stderr
    shutil.copytree(root / "half", root / "other", symlinks=True)
    again = train(root / "half", *recipe, "train.max_steps=8", config=SIMMIM, processes=2)
    assert again.returncode == 0, again.stderr
    return root, whole, recipe


def records(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def losses(folder):
    return [r["train/loss"] for r in records(folder) if "train/loss" in r]


def test_simmim_trains_a_mixture_with_expert_parallelism(masked):
    """Starts the program five times, each on 2 processes."""
    root, done, _ = masked
    found = losses(root / "whole")
    assert found[-1] < found[0]
    assert losses(root / "half") == found  # a resume repeats the masks
    last = records(root / "whole")[-2]
    assert {"moe/encoder.layers.1.blocks.0/load", "train/aux_loss"} <= last.keys()
    value = records(root / "whole")[-1]["val/loss"]
    assert f"val loss {value:.4f}" in done.stdout
    listed = swin_moe("checkpoint", "list", str(root / "whole")).stdout
    assert f"val loss {value:.4f}" in listed
    evaluated = swin_moe("evaluate", str(root / "whole"))
    assert evaluated.returncode == 0, evaluated.stderr
    loss = float(re.search(r"loss ([0-9.]+)", evaluated.stdout)[1])
    for override, message in (
        ("task={name: classification}", "was trained with simmim: leave it out"),
        ("model.img_size=44", "task.mask_unit=8 must divide the image's 44 × 44 pixels"),
    ):
        refused = swin_moe("evaluate", str(root / "whole"), override)
        assert refused.returncode == 2
        assert message in refused.stderr
    assert loss == pytest.approx(value, abs=1.1e-4)


def test_weights_of_simmim_start_a_classification(masked):
    root, _, recipe = masked
    start = [*recipe, "parallel.expert_parallel_size=1", "train.max_steps=1"]
    done = train(root / "tuned", *start, f"model.pretrained={root / 'whole'}", config=MICRO)
    assert done.returncode == 0, done.stderr
    text = " ".join(done.stdout.split())
    assert "head re-initialised (the file has none)" in text
    assert "not read from" in text
    converted = swin_moe("convert", str(root / "whole"), str(root / "encoder.safetensors"))
    assert converted.returncode == 0, converted.stderr
    assert "mask_token" in converted.stdout


def test_another_task_does_not_resume(masked):
    root, _, recipe = masked
    done = train(root / "other", *recipe, "train.max_steps=9", config=MICRO, processes=2)
    assert done.returncode == 2
    assert "task.name=classification" in done.stderr


NAMES = re.compile(r"simmim|SoftTarget|cross_entropy|top5", re.IGNORECASE)
MAY_NAME = ("tasks/", "config/", "models/simmim.py", "models/__init__.py", "weights/adapters/")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_only_a_tasks_own_files_name_it(path):
    name = str(path.relative_to(PACKAGE))
    if not name.startswith(MAY_NAME):
        code = re.sub(r"#.*|\"\"\".*?\"\"\"", "", path.read_text(), flags=re.DOTALL)
        assert not NAMES.search(code), name
