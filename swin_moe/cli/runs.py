"""The commands of a run: ``swin-moe plan | launch | doctor | train | evaluate | inspect``."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

from ..common import ranks, signals
from ..common.writing import unbreakable_streams
from .shared import DONE, WRONG_USE, run_or_checkpoint, single_process, widen


@unbreakable_streams()
def train_command(arguments: argparse.Namespace, console: Any) -> int:
    """Train or resume, as one of the processes of a run."""
    from .. import distributed, preflight
    from ..distributed import watchdog

    config = _config(arguments)
    limit = config.faults.hang_timeout_s
    watch = watchdog.start(limit, ranks.environment_rank()[0], signals.STOPS)
    watch.enter("the other processes were awaited", works=True)
    if limit:  # the watchdog must find a hang before these time out: it names the ranks
        patience = min(watchdog.START * limit, distributed.PATIENCE)
        meeting = distributed.connect(patience, max(3 * watchdog.START * limit, 1800.0))
    else:
        meeting = distributed.connect()
    watch.meet(meeting.pulses())
    verdict = preflight.agree(config, meeting)
    preflight.refuse(verdict)  # before the groups: processes with different sizes would hang
    watch.enter("the processes made their groups", works=True)
    world = distributed.init(
        config.parallel.expert_parallel_size,
        hierarchical=config.parallel.hierarchical_all_to_all,
        meeting=meeting,
    )
    from .. import train  # imports DeepSpeed, which reads the environment that init sets

    try:
        train.train(
            config,
            world,
            console,
            watch,
            fresh=arguments.fresh,
            verdict=verdict,
            accept_changes=arguments.accept_changes,
        )
    finally:
        watch.stop()
    return DONE


def doctor_command(arguments: argparse.Namespace, console: Any) -> int:
    """Check the machines of a run."""
    from .. import distributed
    from ..config import share_global_batch
    from ..preflight.doctor import doctor

    config = _config(arguments)
    if arguments.clear_kernel_cache and ranks.environment_rank()[1] == 0:
        from ..ops.trial.kept import forget

        console.print(f"cleared {forget() or 'nothing: there is no folder to keep results in'}")
    share_global_batch(config, ranks.environment_rank()[2])
    meeting = distributed.connect(arguments.timeout)
    return DONE if doctor(config, meeting, console, arguments.json) else WRONG_USE


def _config(arguments: argparse.Namespace) -> Any:
    """Return the config of a run, with its automatic expert-parallel size resolved."""
    from ..config import load_config

    config = load_config(arguments.config, arguments.overrides)
    if config.parallel.expert_parallel_size == "auto":
        shardable = config.moe.enabled and config.zero.stage < 3
        size = ranks.auto_expert_parallel_size(config.moe.num_experts)
        config.parallel.expert_parallel_size = size if shardable else 1
    return config


@unbreakable_streams()
def launch_command(arguments: argparse.Namespace, console: Any) -> int:
    """Start the processes of a training."""
    from ..launch.command import Request, launch

    words = vars(arguments).items()
    request = {key: value for key, value in words if key not in ("command", "debug", "dry_run")}
    return launch(Request(**request), arguments.dry_run)


def plan_command(arguments: argparse.Namespace, console: Any) -> int:
    """Predict memory, messages and time of a run.

    Raises:
        ValueError: an option is out of range, or the config does not fit.
    """
    from ..config import load_config
    from ..planner import Cluster, plan

    for flag in ("nodes", "gpus_per_node", "images"):
        value = getattr(arguments, flag)
        if value is not None and value < 1:
            raise ValueError(f"--{flag.replace('_', '-')} {value} must be at least 1")
    if arguments.price is not None and not 0 <= arguments.price < math.inf:
        raise ValueError(f"--price {arguments.price:g} must be a number from 0 on")
    widen(console, 120)
    plan(
        load_config(arguments.config, arguments.overrides),
        Cluster(arguments.gpu, arguments.nodes, arguments.gpus_per_node),
        console,
        name=Path(arguments.config).stem,
        images=arguments.images,
        price=arguments.price,
        simulate=arguments.simulate,
        output=arguments.output,
        json_path=arguments.json,
    )
    return DONE


def evaluate_command(arguments: argparse.Namespace, console: Any) -> int:
    """Evaluate a run or a checkpoint."""
    path = run_or_checkpoint(arguments.path)
    world = single_process("evaluate")
    from ..evaluate import evaluate_checkpoint  # imports DeepSpeed, too

    evaluate_checkpoint(path, world, console, arguments.overrides)
    return DONE


def inspect_command(arguments: argparse.Namespace, console: Any) -> int:
    """Draw which image patches each expert takes."""
    path = run_or_checkpoint(arguments.path)
    world = single_process("inspect")
    from ..inspection import inspect_checkpoint  # imports DeepSpeed, too

    overrides = list(arguments.overrides)
    if arguments.data:
        is_override = "=" in arguments.data and not Path(arguments.data).exists()
        overrides.insert(0, arguments.data if is_override else f"data.path={arguments.data}")
    inspect_checkpoint(
        path,
        world,
        console,
        overrides,
        images=arguments.images,
        output=arguments.output,
        layers=arguments.layer,
    )
    return DONE
