"""Ranks from each launcher's environment, and the automatic expert-parallel size."""

import pytest

from swin_moe import ranks


@pytest.fixture
def environment(monkeypatch):
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR",
             "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS", "SLURM_NTASKS_PER_NODE")  # fmt: skip
    for name in names:
        monkeypatch.delenv(name, raising=False)

    def set_all(**values):
        for name, value in values.items():
            monkeypatch.setenv(name, str(value))

    return set_all


def test_without_a_launcher_there_is_one_process(environment):
    assert ranks.environment_rank() == (0, 0, 1)
    assert ranks.auto_expert_parallel_size(8) == 1


def test_torchrun(environment):
    environment(RANK=9, LOCAL_RANK=1, WORLD_SIZE=16, LOCAL_WORLD_SIZE=8)
    assert ranks.environment_rank() == (9, 1, 16)
    assert ranks.auto_expert_parallel_size(64) == 8  # inside the node
    assert ranks.auto_expert_parallel_size(12) == 4


def test_deepspeed(environment):
    environment(RANK=9, LOCAL_RANK=1, WORLD_SIZE=16, LOCAL_SIZE=8)
    assert ranks.auto_expert_parallel_size(64) == 8


def test_slurm(environment):
    environment(SLURM_PROCID=3, SLURM_LOCALID=1, SLURM_NTASKS=4, SLURM_NTASKS_PER_NODE=2)
    assert ranks.environment_rank() == (0, 0, 1)  # a shell in an allocation is no launcher
    environment(MASTER_ADDR="node-0")
    assert ranks.environment_rank() == (3, 1, 4)
    assert ranks.auto_expert_parallel_size(8) == 2


def test_expert_group_must_divide_the_world():
    ranks.check_world(4, 2)
    with pytest.raises(ValueError, match=r"expert_parallel_size=3 does not divide the 4 processes"):
        ranks.check_world(4, 3)


def test_rows_travel_in_two_steps_where_a_group_is_of_several_nodes(environment):
    environment(RANK=9, LOCAL_RANK=1, WORLD_SIZE=16, LOCAL_WORLD_SIZE=8)
    assert ranks.node_share(8, "auto") == 0  # inside the node
    assert ranks.node_share(16, "auto") == ranks.node_share(16, True) == 8
    assert ranks.node_share(16, False) == 0
    with pytest.raises(ValueError, match=r"hierarchical_all_to_all=true .*_size=8 and 8 processes"):
        ranks.node_share(8, True)
    environment(LOCAL_WORLD_SIZE=1)
    assert ranks.node_share(16, "auto") == 0  # a node of one has nothing to bring together
