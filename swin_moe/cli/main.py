"""The command line: ``swin-moe``, ``python -m swin_moe`` and ``torchrun -m swin_moe``."""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import math
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..common import ranks, signals
from ..common.errors import Preempted, RunRemoved, TrainingError
from ..common.signals import INTERRUPTED, PREEMPTED
from ..common.text import plain, plain_lines, reason
from ..common.writing import LogFile, PlainFormatter, unbreakable_streams
from .parser import parse
from .system_errors import explain

DONE, FAILED, WRONG_USE = 0, 1, 2

_PATIENCE = 5.0  # seconds that the launcher may take to end the other processes of a node

# What gloo, NCCL and the store say when the other end is gone.
_LOST_PEER = ("closed by peer", "reset by peer", "remote process exited", "Broken pipe")


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    arguments = parse(argv)
    if arguments.command not in ("train", "launch"):  # a launch begins a training
        signals.release()
    _quiet()
    try:
        os.getcwd()  # without it torch's libraries abort
        rank, local_rank, size = ranks.environment_rank()
    except FileNotFoundError:
        gone = "the folder in which this was started has been removed: cd to another one"
        return _fail(gone, True, WRONG_USE)
    except ValueError as error:
        return _fail(reason(error), True, WRONG_USE)
    where = f"[rank {rank}] " if local_rank else ""
    try:
        code = _run(arguments)
        if distributed := sys.modules.get("swin_moe.distributed.world"):
            distributed.shutdown()
        return code
    except KeyboardInterrupt:
        goes_on = "; the same command goes on" * (arguments.command == "prepare-data")
        return _fail(f"interrupted{goes_on}", local_rank == 0, INTERRUPTED)
    except (ValueError, OSError) as error:
        # Every rank of a node has the same error: one of them prints it.
        _show_traceback(arguments)
        if isinstance(error, ValueError):
            ranks.refuse_restart()
        told = explain(error, arguments) if isinstance(error, OSError) else reason(error)
        return _fail(f"{where}{told}", local_rank == 0, WRONG_USE)
    except Exception as error:
        if isinstance(error, (Preempted, TrainingError, RunRemoved)):
            ranks.refuse_restart()
        if isinstance(error, Preempted):
            code = INTERRUPTED if error.interrupted else PREEMPTED
            return _fail(reason(error), local_rank == 0, code, alone=False)
        _show_traceback(arguments)
        if isinstance(error, RunRemoved):  # a rank may be the first to see it
            return _fail(f"{where}{reason(error)}", local_rank == 0)
        if isinstance(error, TrainingError):  # raised on every rank, or on none
            return _fail(reason(error), local_rank == 0, alone=False)
        where = f"[rank {rank}] " if size > 1 else ""
        loader = sys.modules.get("swin_moe.data.loader")
        if loader and (died := loader.why_died(error)):
            return _fail(f"{where}{died}", True)
        if size > 1 and any(sign in str(error) for sign in _LOST_PEER):
            return _fail(f"{where}another process ended, and this one with it", False)
        return _fail(f"{where}{_unexpected(error, arguments)}", True)


def _show_traceback(arguments: argparse.Namespace) -> None:
    """Write the traceback to the run's log, if there is one, and with --debug to the console."""
    logging.getLogger("swin_moe").debug("failed", exc_info=True)
    if arguments.debug:
        traceback.print_exc()


def _unexpected(error: Exception, arguments: argparse.Namespace) -> str:
    """The message of an unforeseen error, and where to read more about it."""
    kind, told = type(error).__name__, reason(error)
    if kind == "OutOfMemoryError":  # torch's, of a GPU
        return (
            f"{told.removesuffix('.')}: lower data.batch_size, or see what fits by "
            "`swin-moe plan CONFIG`"
        )
    text = kind if told == kind else f"{kind}: {told}"
    if arguments.debug:
        return text
    log_file = LogFile.current()
    where = f"the traceback is in {plain(log_file)}" if log_file else "--debug shows the traceback"
    return f"{text} ({where})"


def _fail(message: str, tell: bool, code: int = FAILED, alone: bool = True) -> int:
    """Print one line; what all ranks meet alike, only the first of each node tells.

    Args:
        alone: whether this rank may be the only one to fail, and must tell in the end.
    """
    logging.getLogger("swin_moe").debug("error: %s", message)
    if not tell:
        # The first exit ends all processes of the node. Who still lives after a while failed alone.
        deadline = time.monotonic() + _PATIENCE
        while time.monotonic() < deadline:
            if signals.StopSignal.came:  # the launcher ends us
                return code
            time.sleep(0.05)
    if tell or alone:
        with contextlib.suppress(OSError):  # a full disk must not change the exit code
            print(f"swin-moe: error: {plain_lines(message)}", file=sys.stderr, flush=True)
    return code


def _run(arguments: argparse.Namespace) -> int:
    from ..common.terminal import Terminal

    # Each imports what it needs, so that a command that needs no torch starts at once.
    commands: dict[str, Callable[[argparse.Namespace, Any], int]] = {
        "train": _train,
        "doctor": _doctor,
        "evaluate": _evaluate,
        "inspect": _inspect,
        "models": _models,
        "convert": _convert,
        "checkpoint": _checkpoint,
        "prepare-data": _prepare_data,
        "data": _data,
        "plan": _plan,
        "launch": _launch,
    }
    return commands[arguments.command](arguments, Terminal())


@unbreakable_streams()
def _train(arguments: argparse.Namespace, console: Any) -> int:
    from .. import distributed, preflight
    from ..distributed import watchdog

    config = _config(arguments)
    limit = config.faults.hang_timeout_s
    dog = watchdog.start(limit, ranks.environment_rank()[0], signals.STOPS)
    dog.enter("the other processes were awaited", works=True)
    if limit:  # the watchdog must find a hang before these do: it names who hangs
        patience = min(watchdog.START * limit, distributed.PATIENCE)
        meeting = distributed.connect(patience, max(3 * watchdog.START * limit, 1800.0))
    else:
        meeting = distributed.connect()
    dog.meet(meeting.pulses())
    verdict = preflight.agree(config, meeting)
    preflight.refuse(verdict)  # before groups are made: of other sizes they would hang
    dog.enter("the processes made their groups", works=True)
    world = distributed.init(
        config.parallel.expert_parallel_size,
        hierarchical=config.parallel.hierarchical_all_to_all,
        meeting=meeting,
    )
    from .. import train  # imports DeepSpeed, which looks at the environment that init sets

    try:
        train.train(
            config,
            world,
            console,
            dog,
            fresh=arguments.fresh,
            verdict=verdict,
            accept_changes=arguments.accept_changes,
        )
    finally:
        dog.stop()
    return DONE


def _doctor(arguments: argparse.Namespace, console: Any) -> int:
    from .. import distributed
    from ..config import share_global_batch
    from ..preflight.doctor import doctor

    config = _config(arguments)
    share_global_batch(config, ranks.environment_rank()[2])
    meeting = distributed.connect(arguments.timeout)
    return DONE if doctor(config, meeting, console, arguments.json) else WRONG_USE


def _evaluate(arguments: argparse.Namespace, console: Any) -> int:
    path = _existing_folder(arguments.path)
    world = _alone("evaluate")
    from ..evaluate import evaluate_checkpoint  # imports DeepSpeed, too

    evaluate_checkpoint(path, world, console, arguments.overrides)
    return DONE


def _alone(command: str) -> Any:
    """The world of a command that runs as one process and waits for no others."""
    if told := ranks.check_alone(command):
        print(f"swin-moe: {told}", file=sys.stderr, flush=True)
    from .. import distributed

    return distributed.init()


def _existing_folder(text: str) -> Path:
    path = Path(text)
    # A folder of another program's weights, such as Hugging Face's, has this file.
    if path.is_file() or (path / "config.json").is_file():
        what = "is a file" if path.is_file() else "is a folder of weights alone"
        raise ValueError(
            f"{plain(text)} {what}; a run or checkpoint folder also knows its data: make one of "
            f"these weights by `swin-moe train CONFIG model.pretrained={plain(text)} "
            "train.output=FOLDER train.max_steps=1 schedule.warmup_epochs=1 schedule.warmup_lr=0` "
            "(one update at a rate of 0), and give FOLDER"
        )
    if not path.is_dir():
        raise ValueError(f"{plain(text)}: no such run directory or checkpoint folder")
    return path


def _models(arguments: argparse.Namespace, console: Any) -> int:
    from .models import models_table

    table = models_table(arguments.pattern)
    if not console.is_terminal:
        console.width = 120  # a pipe has none of its own
    console.print(table)
    return DONE


def _config(arguments: argparse.Namespace) -> Any:
    """The config of a run, its automatic sizes resolved."""
    from ..config import load_config

    config = load_config(arguments.config, arguments.overrides)
    if config.parallel.expert_parallel_size == "auto":
        shardable = config.moe.enabled and config.zero.stage < 3
        size = ranks.auto_expert_parallel_size(config.moe.num_experts)
        config.parallel.expert_parallel_size = size if shardable else 1
    return config


def _checkpoint(arguments: argparse.Namespace, console: Any) -> int:
    from . import checkpoints

    path = Path(arguments.path)
    if arguments.action == "list":
        if not console.is_terminal:
            console.width = 160  # a pipe has none of its own
        console.print(checkpoints.list_table(path))
    elif arguments.action == "verify":
        return DONE if checkpoints.verify(path, console) else FAILED
    elif arguments.action == "reshard":
        checkpoints.reshard(path, Path(arguments.output), arguments.files, console)
    else:
        checkpoints.export(path, Path(arguments.output), console, arguments.overwrite)
    return DONE


def _prepare_data(arguments: argparse.Namespace, console: Any) -> int:
    from ..data.tools.commands import prepare_data

    prepare_data(
        Path(arguments.input),
        Path(arguments.output),
        console,
        val_share=arguments.val,
        shard_megabytes=arguments.shard_size,
        resize=arguments.resize,
        classes=arguments.classes,
        seed=arguments.seed,
        workers=arguments.workers,
        max_pixels=arguments.max_pixels,
    )
    return DONE


def _data(arguments: argparse.Namespace, console: Any) -> int:
    if arguments.action == "verify":
        from ..data.tools.commands import verify_data

        path = Path(arguments.path)
        well = verify_data(path, console, arguments.output, arguments.workers, arguments.max_pixels)
        return DONE if well else FAILED
    else:
        from ..config import load_config
        from ..reporting.contact_sheet import show

        show(load_config(arguments.config, arguments.overrides), arguments.output, console)
    return DONE


def _plan(arguments: argparse.Namespace, console: Any) -> int:
    from ..config import load_config
    from ..planner import Cluster, plan

    for flag in ("nodes", "gpus_per_node", "images"):
        value = getattr(arguments, flag)
        if value is not None and value < 1:
            raise ValueError(f"--{flag.replace('_', '-')} {value} must be at least 1")
    if arguments.price is not None and not 0 <= arguments.price < math.inf:
        raise ValueError(f"--price {arguments.price:g} must be a number from 0 on")
    if not console.is_terminal:
        console.width = 120  # a pipe has none of its own
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


@unbreakable_streams()
def _launch(arguments: argparse.Namespace, console: Any) -> int:
    from ..launch.command import Request, launch

    said = vars(arguments).items()
    words = {key: value for key, value in said if key not in ("command", "debug", "dry_run")}
    return launch(Request(**words), arguments.dry_run)


def _inspect(arguments: argparse.Namespace, console: Any) -> int:
    path = _existing_folder(arguments.path)
    world = _alone("inspect")
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


def _convert(arguments: argparse.Namespace, console: Any) -> int:
    from ..config import parse_overrides
    from ..weights.convert import Upcycle, convert

    convert(
        Path(arguments.input),
        Path(arguments.output),
        console,
        source_dialect=arguments.source,
        dialect=arguments.target,
        model_name=arguments.model,
        overrides=parse_overrides(arguments.overrides),
        allow_missing=arguments.allow_missing,
        upcycling=Upcycle.parse(arguments.upcycle) if arguments.upcycle else None,
        ranks=arguments.ranks,
        overwrite=arguments.overwrite,
        network=arguments.take,
    )
    return DONE


def _quiet() -> None:
    """Keep the console for the run: libraries' chatter goes to the logs, warnings stay."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a name that it cannot encode is shown escaped
            stream.reconfigure(errors="backslashreplace")
    console = logging.StreamHandler()
    console.setLevel(logging.WARNING)
    console.setFormatter(PlainFormatter("%(levelname)s: %(message)s"))
    # timm warns of what our config has checked or means, such as a cosine of one update.
    console.addFilter(lambda record: not record.name.startswith("timm."))
    logging.getLogger().addHandler(console)
    logging.captureWarnings(True)
    warnings.formatwarning = lambda message, category, *_: f"{category.__name__}: {message}"
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)


def entry() -> None:
    """The program: run and leave."""
    signals.watch()
    code = main()
    ranks.leave(code)


if __name__ == "__main__":
    entry()
