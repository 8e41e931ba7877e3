"""Ranks from each launcher's environment, and the automatic expert-parallel size."""

import os

import pytest

from swin_moe import distributed
from swin_moe.common import ranks
from swin_moe.distributed import world


@pytest.fixture
def environment(monkeypatch):
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR",
             "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS", "SLURM_NTASKS_PER_NODE",
             "SLURM_STEP_ID")  # fmt: skip
    # A copy, so that the variables that the code sets are undone, too.
    monkeypatch.setattr(os, "environ", os.environ.copy())
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


def test_rows_travel_in_two_steps_if_a_group_spans_nodes(environment):
    environment(RANK=9, LOCAL_RANK=1, WORLD_SIZE=16, LOCAL_WORLD_SIZE=8)
    assert ranks.node_share(8, "auto") == 0  # inside the node
    assert ranks.node_share(16, "auto") == ranks.node_share(16, True) == 8
    assert ranks.node_share(16, False) == 0
    with pytest.raises(ValueError, match=r"hierarchical_all_to_all=true .*_size=8 and 8 processes"):
        ranks.node_share(8, True)
    environment(LOCAL_WORLD_SIZE=1)
    assert ranks.node_share(16, "auto") == 0  # one process a node has nothing to gather


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK=-1 is not a whole number of at least 0"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2, but WORLD_SIZE=2: ranks go from 0"),
        ({"RANK": "1"}, "RANK=1, but WORLD_SIZE is not set"),
        ({"RANK": "0", "WORLD_SIZE": "1e9"}, "WORLD_SIZE=1e9 is not a whole number from 1 to"),
        ({"RANK": "0", "WORLD_SIZE": "9" * 5000}, "WORLD_SIZE=9999.* is not a whole number from"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "WORLD_SIZE=0 is not a whole number from 1 to"),
        ({"RANK": "first", "WORLD_SIZE": "2"}, "RANK=first is not a whole number"),
        ({"RANK": "0", "LOCAL_RANK": "x", "WORLD_SIZE": "2"}, "LOCAL_RANK=x is not a whole"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "0"}, "LOCAL_WORLD_SIZE=0 is not"),
        ({"LOCAL_WORLD_SIZE": "0"}, "LOCAL_WORLD_SIZE=0 is not a whole number from 1 to"),
        ({"SLURM_PROCID": "4", "SLURM_NTASKS": "4", "MASTER_ADDR": "a"}, "SLURM_PROCID=4, but"),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "?", "MASTER_ADDR": "a"}, r"SLURM_NTASKS=\? is"),
    ],
)
def test_impossible_variables_are_named(environment, variables, message):
    environment(**variables)
    with pytest.raises(ValueError, match=f"^{message}"):
        ranks.environment_rank()


def test_a_number_of_processes_without_a_rank_is_refused_before_any_wait(environment):
    environment(WORLD_SIZE=4)
    with pytest.raises(ValueError, match=r"^WORLD_SIZE=4, but RANK is not set"):
        distributed.connect()


def test_one_process_in_a_batch_script_is_alone(environment):
    environment(SLURM_PROCID=0, SLURM_LOCALID=0, SLURM_NTASKS=4, MASTER_ADDR="a")
    assert ranks.without_srun()
    warning = ranks.check_alone("evaluate")
    assert warning == (
        "evaluate runs as one process, although SLURM_NTASKS=4 and SLURM_PROCID=0: no srun "
        "started it"
    )
    assert ranks.environment_rank() == (0, 0, 1)
    assert ranks.check_alone("evaluate") == ""


@pytest.mark.parametrize("step", ["0", "17"])
def test_a_command_of_one_process_refuses_several_of_srun(environment, step):
    environment(SLURM_PROCID=0, SLURM_NTASKS=4, MASTER_ADDR="a", SLURM_STEP_ID=step)
    assert not ranks.without_srun()
    with pytest.raises(ValueError, match="one process, but SLURM_NTASKS=4 and SLURM_PROCID=0: "):
        ranks.check_alone("evaluate")
    environment(RANK=0, WORLD_SIZE=2)
    with pytest.raises(ValueError, match="one process, but WORLD_SIZE=2 and RANK=0: start it"):
        ranks.check_alone("inspect")


def test_the_shell_of_salloc_is_no_step_of_srun(environment):
    environment(SLURM_PROCID=0, SLURM_NTASKS=4, MASTER_ADDR="a", SLURM_STEP_ID=4294967290)
    assert ranks.without_srun()


def test_processes_that_cannot_meet_do_not_train_alone(environment):
    environment(SLURM_PROCID=0, SLURM_NTASKS=4)
    ranks.check_launcher()  # a batch script is one process
    environment(SLURM_STEP_ID=0)
    with pytest.raises(ValueError, match="SLURM_NTASKS=4, but MASTER_ADDR is not set"):
        ranks.check_launcher()
    environment(SLURM_NTASKS=1)
    ranks.check_launcher()
    environment(OMPI_COMM_WORLD_RANK=1, OMPI_COMM_WORLD_SIZE=2)
    with pytest.raises(ValueError, match="OMPI_COMM_WORLD_SIZE=2, but MASTER_ADDR is not set"):
        ranks.check_launcher()


def test_empty_variables_count_as_not_set(environment, monkeypatch):
    environment(RANK="", WORLD_SIZE="")
    monkeypatch.setattr(world.dist, "is_initialized", lambda: True)
    distributed.init()
    assert [os.environ[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")] == ["0", "0", "1"]


@pytest.mark.parametrize("gpus", [0, 4])
def test_nccl_learns_its_device(environment, monkeypatch, gpus):
    environment(RANK=0, LOCAL_RANK=2, WORLD_SIZE=1)
    given, started = {}, []
    monkeypatch.setattr(world.torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(world.torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(world.torch.cuda, "set_device", started.append)
    monkeypatch.setattr(world, "bind_to_gpu", lambda _: "bound to CPUs" * (gpus > 0))
    monkeypatch.setattr(world.dist, "is_initialized", lambda: False)
    monkeypatch.setattr(world.dist, "init_process_group", lambda *_, **words: given.update(words))
    made = world.init()
    expected = world.torch.device("cuda", 2) if gpus else None
    assert given["device_id"] == expected
    assert started == [expected] * (gpus > 0)
    assert made.binding == "bound to CPUs" * (gpus > 0)
