"""Configs load strictly, and every mistake is one line that helps."""

from pathlib import Path

import pytest
import yaml

from swin_moe.config import Config, ConfigError, dump_config, load_config, validate

ROOT = Path(__file__).parent.parent


def write(folder, text, name="c.yaml"):
    path = folder / name
    path.write_text(text)
    return path


def error(path, *overrides):
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_base_is_merged_key_by_key_and_overrides_win(tmp_path):
    write(tmp_path, "model: {embed_dim: 48, num_classes: 7}\nzero: {stage: 2}\n", "parent.yaml")
    path = write(tmp_path, "base: parent.yaml\nmodel: {num_classes: 8}\n")
    config = load_config(path, ["zero.stage=3", "optimizer.base_lr=1e-3", "model.depths=[1,1,1,1]"])
    assert (config.model.embed_dim, config.model.num_classes) == (48, 8)
    assert config.zero.stage == 3
    assert config.optimizer.base_lr == 1e-3  # YAML 1.1 would have read a string
    assert config.model.depths == [1, 1, 1, 1]
    assert config.train.output == "runs/c"


def test_dump_reads_back_equal(tmp_path):
    config = load_config(ROOT / "configs/imagenet22k/swin_moe_small_8expert.yaml")
    path = write(tmp_path, dump_config(config))
    assert load_config(path) == config


def test_variant_fills_what_the_file_leaves_open(tmp_path):
    path = write(tmp_path, "model: {name: swinv2_base_window8_256, drop_path_rate: 0.1}\n")
    model = load_config(path).model
    assert (model.embed_dim, model.depths, model.drop_path_rate) == (128, [2, 2, 18, 2], 0.1)


@pytest.mark.parametrize(
    ("text", "override", "parts"),
    [
        ("model:\n  windw_size: 4\n", None, ["c.yaml:2", "windw_size", "model.window_size"]),
        ("modle: {}\n", None, ["c.yaml:1", "'modle'", "'model'"]),
        ("", "batch_size=3", ["batch_size=3", "data.batch_size"]),
        ("", "optimizer.lr=1", ["did you mean 'optimizer.base_lr'"]),
        ("", "learning-rate=1", ["did you mean 'optimizer.base_lr'"]),
        ("", "train.epochs=5", ["did you mean 'schedule.epochs'"]),
        ("", "train.batch_size=5", ["did you mean 'data.batch_size'"]),
        ("", "data.workers=5", ["did you mean 'data.num_workers'"]),
        ("", "model.drop_path=0", ["did you mean 'model.drop_path_rate'"]),
        ("", "OPTIMIZER.eps=1", ["override 'OPTIMIZER.eps=1'", "did you mean 'optimizer'"]),
        ("", "train.device=cuda", ["valid keys: output, seed"]),
        ("model:\n  window_size: big\n", None, ["c.yaml:2", "'big'", "integer"]),
        ("", "model.window_size=4.5", ["model.window_size", "4.5", "integer"]),
        ("", "zero.stage=4", ["zero.stage=4", "less than or equal to 3"]),
        ("", "model.drop_path_rate=1", ["model.drop_path_rate=1", "less than 1"]),
        ("", "moe.top_k=true", ["moe.top_k"]),
        ("", "train.seed=-1", ["train.seed=-1", "greater than or equal to 0"]),
        ("", "optimizer.base_lr=.nan", ["optimizer.base_lr"]),
        ("", "data=3", ["'data' is a section"]),
        ("", "nonsense", ["'nonsense'", "section.key=value"]),
        ("", "model.depths=[2, 2", ["not valid YAML"]),
        ("model: {depths: [2, 2]}\n", None, ["num_heads has 4 stages, depths has 2"]),
        ("model:\n  embed_dim: 4\n  embed_dim: 8\n", None, ["c.yaml:3", "stands twice"]),
        ("model: [\n", None, ["c.yaml:2", "not valid YAML"]),
        ("- 1\n", None, ["expected sections"]),
        ("base: missing.yaml\n", None, ["missing.yaml", "No such file"]),
        ("base: c.yaml\n", None, ["circle"]),
        ("model: {name: swinv2_tny_window8_256}\n", None, ["swinv2_tiny_window8_256"]),
        ("", "parallel.expert_parallel_size=2", ["moe.blocks is empty"]),
        ("moe: {blocks: [[9]]}\n", None, ["moe.blocks[0] names block 9"]),
        ("moe: {blocks: [[1]], num_experts: 6}\n", "parallel.expert_parallel_size=4",
         ["moe.num_experts=6 is not divisible by parallel.expert_parallel_size=4"]),
        ("moe: {blocks: [[1]], num_experts: 4}\n", "parallel.expert_parallel_size=6",
         ["nor the other way round"]),
        ("", "moe.overlap_degree=0", ["moe.overlap_degree=0"]),
        ("", "parallel.hierarchical_all_to_all=3", ["parallel.hierarchical_all_to_all=3"]),
        ("moe: {blocks: [[1]]}\nzero: {stage: 3}\n", "parallel.expert_parallel_size=2",
         ["zero.stage=3", "zero.stage=2"]),
        ("", "moe.gate_noise=0", ["balance=gshard"]),
        ("", "zero={stage: 0, offload_optimizer: cpu}", ["offload_optimizer=cpu needs zero.stage"]),
        ("", "zero={stage: 2, offload_optimizer: cpu, offload_param: cpu}",
         ["offload_param=cpu needs zero.stage=3"]),
        ("", "zero={stage: 3, offload_param: cpu}", 
         ["offload_param=cpu needs zero.offload_optimizer"]),
        ("", "zero={stage: 3, offload_optimizer: cpu, offload_param: nvme}", ["zero.nvme_path"]),
        ("", "schedule.warmup_epochs=400", ["warmup_epochs=400"]),
        ("", "data.mean=[0.5]", ["mean has 1"]),
        ("", "parallel.expert_parallel_size=foo",
         ["parallel.expert_parallel_size='foo': expected integer or 'auto'"]),
        ("moe: {blocks: [[1, 1]]}\n", None, ["moe.blocks[0]=[1, 1] names a block twice"]),
        ("", "optimizer.betas=[0.9]", ["betas=[0.9] must be two numbers"]),
        ("", "optimizer.base_lr=.inf", ["optimizer.base_lr=inf", "finite"]),
        ("", "data.batch_size=7", ["data.batch_size=7 is odd"]),
        ("model: &m {}\nmoe: *m\n", None, ["aliases"]),
    ],
)  # fmt: skip
def test_mistakes_are_one_helpful_line(tmp_path, text, override, parts):
    path = write(tmp_path, text)
    message = error(path, *([override] if override else []))
    for part in parts:
        assert part in message


def test_more_ranks_than_experts_share_them(tmp_path):
    path = write(tmp_path, "moe: {blocks: [[1]], num_experts: 2}\n")
    assert load_config(path, ["parallel.expert_parallel_size=8", "moe.overlap_degree=auto"])


def test_missing_file():
    assert "nowhere.yaml: no such config file or recipe" in error("nowhere.yaml")


def test_yaml_cannot_run_code(tmp_path):
    path = write(tmp_path, "train: {output: !!python/object/apply:os.getcwd []}\n")
    assert "not valid YAML" in error(path)


def test_defaults_are_valid_and_known():
    assert validate({}) == Config()
    assert set(yaml.safe_load(dump_config(Config()))) == set(Config.model_fields)
