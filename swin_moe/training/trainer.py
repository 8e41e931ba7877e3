"""The training loop: epochs, updates, evaluations, saves; independent of DeepSpeed and files."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta

import torch
from timm.scheduler import CosineLRScheduler
from torch import Tensor
from torch.profiler import record_function

from ..checkpoint import Writer
from ..common.errors import Preempted, TrainingError
from ..common.signals import StopSignal
from ..config import FaultsConfig
from ..data import Batch, DeviceBatches, Loader
from ..data.bad_samples import allowed_bad
from ..data.watch import LoaderWatch
from ..distributed import World, all_reduce_
from ..distributed.watchdog import Watchdog
from ..models import Outputs
from ..moe import RouterMonitor, moe_layers
from ..reporting.metric_log import Meter, MetricLog, Record, progress_bar
from ..reporting.profiler import Profile
from ..reporting.tables import Result
from ..tasks import Evaluation, Task
from .engine import Engine
from .evaluation import evaluate
from .guard import Guard, SpikeDetector
from .progress import Position, TrainingPlan

logger = logging.getLogger("swin_moe")


class RollBack(Exception):
    """Too many updates in a row were skipped: all ranks must go back to a checkpoint."""


@dataclass
class Trainer:
    """The training loop, with everything that it needs.

    Attributes:
        save: begins to write a checkpoint of a position.
        saver: reports when a checkpoint is written, and waits for it.
        say: prints a line on rank 0.
        went_back: the weights are those of a checkpoint before ``position``.
        updates_made: updates of this object, without skipped ones.
    """

    plan: TrainingPlan
    engine: Engine
    schedule: CosineLRScheduler
    train_loader: Loader
    eval_loader: Loader
    task: Task
    world: World
    log: MetricLog | None
    save: Callable[[Position], None]
    saver: Writer
    faults: FaultsConfig
    watchdog: Watchdog
    stop_signal: StopSignal
    say: Callable[[str], None]
    position: Position = field(default_factory=Position)
    went_back: bool = False
    profile: Profile | None = None
    last_evaluation: Evaluation | None = None

    def __post_init__(self) -> None:
        device = self.world.device
        for layer in moe_layers(self.engine.model).values():
            layer.schedules.equal_tokens = True  # the loaders give all ranks batches of one size
        self._loss, self._aux = Meter(device), Meter(device)
        self._scalars: dict[str, Meter] = {}
        self._routers = RouterMonitor(self.engine.model, device)
        self._guard = Guard(self._routers.names, self.world, self.stop_signal)
        self._spikes = SpikeDetector(self.faults.spike_sigmas)
        self._bad_in_a_row = 0
        self.updates_made = 0
        self._unreadable = 0  # on this rank, since the last log
        self._clock, self._images, self._waited = time.monotonic(), 0, 0.0
        self._steps_logged, self.images_per_second = self.position.step, 0.0
        self._loader_watch = LoaderWatch()
        self._piped = False  # no progress bar is shown

    def fit(self) -> None:
        """Train from the current position to the end of the plan."""
        position, plan = self.position, self.plan
        self.watchdog.enter("the first batch was awaited")
        if self.went_back and plan.is_done(position):  # these weights are the result
            self._evaluate()
            self._save(proven=True)
        while not plan.is_done(position):
            epoch = position.epoch
            self.train_epoch()
            finished = position.epoch > epoch
            done = plan.is_done(position)
            evaluated = done or (finished and position.epoch % plan.eval_every_epochs == 0)
            best = evaluated and self._evaluate()
            if done or best or (finished and position.epoch % plan.save_every_epochs == 0):
                self._save(proven=evaluated)
        complete = self._wait_for_save()
        if not complete:
            self.saver.check_folder()
            raise TrainingError(
                "the last checkpoint could not be written (the warning above says why); "
                f"{self._mend()}"
            )

    def result(self) -> Result:
        """Return the result for the closing table."""
        position = self.position
        return Result(
            metric=self.task.metric,
            evaluation=self.last_evaluation,
            best=position.best,
            best_step=position.best_step,
            unreadable=position.unreadable,
            images_per_second=self.images_per_second,
            limit=self.plan.limit(position),
        )

    def train_epoch(self) -> None:
        """Train to the end of the epoch, or of the plan."""
        position, plan = self.position, self.plan
        self.engine.train()
        first = position.update * plan.gradient_accumulation_steps
        batches = DeviceBatches(self.train_loader, self.world.device, position.epoch, first)
        with progress_bar(self.world.is_main) as bar:
            task = bar.add_task(
                "", total=plan.updates_per_epoch, completed=position.update,
                epoch=f"{position.epoch + 1}/{plan.epochs}", status="",
            )  # fmt: skip
            self._piped = bar.disable
            self._restart_clock()
            last = False
            while not last:
                with record_function("update"):
                    stop = self._update(batches)
                if self.profile:
                    self.profile.step()
                last = position.update == plan.updates_per_epoch or plan.is_done(position)
                every = plan.save_every_steps
                saves = every > 0 and position.step % every == 0 and not last
                # Also at each save, so that a resumed run loses no record.
                if position.step % plan.log_every_steps == 0 or saves or last or stop:
                    bar.update(task, status=self._log_training())
                bar.update(task, completed=position.update)
                if saves:
                    self._save()
                if stop and not last:  # otherwise after the evaluation and one more update
                    self._stop(interrupted=stop == 1)
        self._turn_epoch()

    def _turn_epoch(self) -> None:
        position = self.position
        if position.update == self.plan.updates_per_epoch:
            position.epoch, position.update = position.epoch + 1, 0
            position.unreadable_before = position.unreadable

    def _save(self, proven: bool = False) -> None:
        """Begin a save, but not after skipped updates, which may have come from bad weights.

        Args:
            proven: an evaluation has shown that the weights are good.
        """
        if proven or not self._bad_in_a_row:
            with self.watchdog.phase("a checkpoint was copied", writes=True):
                self.save(self.position)

    def _wait_for_save(self) -> bool:
        """Wait for the last save and return whether it is complete."""
        with self.watchdog.phase("the other ranks' files were awaited", writes=True):
            return self.saver.wait()

    def _stop(self, interrupted: bool) -> None:
        """Save and end the training, because a rank received a signal.

        Raises:
            Preempted: always, unless the save failed.
            TrainingError: the save failed.
        """
        self._save()
        complete = self._wait_for_save()
        end = "interrupted" if interrupted else "stopped by a signal"
        end += f" at step {self.position.step}"
        if not complete:
            raise TrainingError(
                f"{end}, but the checkpoint could not be written (the warning above says why); "
                f"{self._mend()}"
            )
        if self._bad_in_a_row:
            raise Preempted(
                f"{end}, while updates were being skipped: start again to go on from the last "
                "checkpoint",
                interrupted,
            )
        again = "the same command goes on" if interrupted else "start again to go on"
        raise Preempted(f"{end}; the checkpoint is written: {again} from it", interrupted)

    def _mend(self) -> str:
        """Return the last good checkpoint and the remedy, after a failed save."""
        good = self.saver.writing.good
        there = f"the last good one is {good}" if good else "no other of this run is complete"
        return f"{there}: mend that and start again"

    def _update(self, batches: DeviceBatches) -> int:
        """Make an update: ``gradient_accumulation_steps`` micro-batches and an optimizer step.

        Returns:
            whether to stop, see :class:`~swin_moe.training.guard.UpdateStatus`.
        """
        position, plan = self.position, self.plan
        self.schedule.step_update(position.epoch * plan.updates_per_epoch + position.update)
        samples: list[Batch] = []
        bad = ""
        for micro in range(plan.gradient_accumulation_steps):
            waited = time.monotonic()
            first = self.updates_made == 0
            self.watchdog.doing(f"{'the first' if first else 'a'} batch was awaited")
            with record_function("data"):
                batch = next(batches)
            samples.append(batch._replace(inputs={}, targets=None))  # their memory is free sooner
            self._waited += time.monotonic() - waited
            self.watchdog.doing(f"{'the first' if first else 'an'} update was made")
            with record_function("forward"):
                loss = self._forward(
                    batch, position.step * plan.gradient_accumulation_steps + micro
                )
            if self.engine.at_boundary:
                loss = loss * self._guard.agree()
            with record_function("backward"):
                self.engine.backward(loss)
            self._look_ahead(batches)
            try:
                with record_function("optimizer"):
                    self.engine.step()
            except FloatingPointError:
                bad = "gradient norm"
        status = self._guard.read()
        position.step += 1
        position.update += 1
        if bad and not status.bad and self.engine.lower_loss_scale():
            self._overflowed()
        elif bad:
            self._skipped(status.bad or bad, samples)
        else:
            self._made(status.loss, samples)
        self.watchdog.beat()
        self.saver.poll()
        return status.stop

    def _look_ahead(self, batches: DeviceBatches) -> None:
        """Await the next batch while the device computes, before the host must wait for it."""
        waited = time.monotonic()
        self.watchdog.doing("a batch was awaited")
        with record_function("data"):
            batches.look_ahead()
        self.watchdog.doing("an update was made")
        self._waited += time.monotonic() - waited

    def _made(self, loss: float, samples: list[Batch]) -> None:
        """Account for an update that was made."""
        self._bad_in_a_row = 0
        self.updates_made += 1
        self._routers.after_update(made=True)
        if usual := self._spikes.check(loss):
            self._log_samples(samples)
            self.say(
                f"warning at step {self.position.step}: the loss jumped to {loss:.4g} from "
                f"{usual}; its samples are listed in logs/rank-*.log"
            )

    def _overflowed(self) -> None:
        """Account for an update that was not made because the loss scale was too large."""
        self.position.overflows += 1
        self._routers.after_update(made=False)
        logger.info("step %d: gradients overflowed, the loss scale falls", self.position.step)

    def _skipped(self, bad: str, samples: list[Batch]) -> None:
        """Account for an update that was skipped on every rank.

        Raises:
            TrainingError, RollBack: by ``faults.nonfinite`` and ``faults.max_nonfinite``.
        """
        self._bad_in_a_row += 1
        self.position.skipped += 1
        self._routers.after_update(made=False)
        self._log_samples(samples)
        policy, limit = self.faults.nonfinite, self.faults.max_nonfinite
        if policy == "stop" or (policy == "skip" and self._bad_in_a_row >= limit):
            raise self._nonfinite_error(bad)
        self.say(
            f"warning at step {self.position.step}: non-finite {bad}; the update is skipped "
            f"({self._bad_in_a_row} in a row, {policy} at {limit}); its samples are listed in "
            "logs/rank-*.log"
        )
        if self._bad_in_a_row >= limit:
            self._turn_epoch()
            raise RollBack

    def _log_samples(self, samples: list[Batch]) -> None:
        for batch in samples:
            keys = " ".join(self.train_loader.keys(batch))
            logger.info("samples of step %d: %s", self.position.step, keys)

    def _forward(self, batch: Batch, micro_step: int) -> Tensor:
        prepared = self.task.prepare(batch, micro_step, training=True)
        outputs, result, loss = self.task.step(self.engine.forward, prepared)
        self._loss.update(result.loss)
        for key, scalar in result.scalars.items():
            self._scalars.setdefault(key, Meter(self.world.device)).update(scalar)
        if outputs.routing is not None and outputs.aux_loss is not None:
            self._aux.update(outputs.aux_loss)
            self._routers.update(outputs.routing)
        self._guard.see(loss, None if outputs.routing is None else outputs.routing.nonfinite)
        self._images += len(prepared.indices) * self.world.size
        self._unreadable += len(batch.skipped)
        return loss

    def _check_bad_samples(self) -> None:
        bad = self.position.unreadable - self.position.unreadable_before
        if bad > allowed_bad(self.train_loader.num_samples, self.plan.max_bad_share):
            raise TrainingError(
                f"{bad} of {self.train_loader.num_samples} training images could not be read in "
                f"this epoch, more than data.max_bad_share={self.plan.max_bad_share}: "
                "logs/bad-samples-rank-*.jsonl in the run directory lists them by kind"
            )

    def _nonfinite_error(self, bad: str) -> TrainingError:
        ways = ["a lower optimizer.base_lr", "a longer schedule.warmup_epochs"]
        if self.engine.dtype != torch.float32:
            ways.append("precision.dtype=fp32")
        return TrainingError(
            f"non-finite {bad} at step {self.position.step}; the weights were not changed and "
            f"{self._kept()} (try {' or '.join(ways)})"
        )

    def _kept(self) -> str:
        """Return a clause on the checkpoint that a failure leaves."""
        self._wait_for_save()
        kept = self.saver.writing.good
        return "the last checkpoint is kept" if kept else "there is no checkpoint yet"

    # ----------------------------------------------------------------------------------------
    # Records

    def _epochs_done(self) -> float:
        return round(self.position.epoch + self.position.update / self.plan.updates_per_epoch, 4)

    def _restart_clock(self) -> None:
        self._clock, self._images, self._waited = time.monotonic(), 0, 0.0

    def _log_training(self) -> str:
        """Reduce the meters over ranks, write a record, and return the bar's status text.

        Without a bar the status is printed as a line.
        """
        device, position = self.world.device, self.position
        waited = self._waited / max(time.monotonic() - self._clock, 1e-9)
        local = [self._loss.read(), self._aux.read(), float(self._unreadable), waited]
        local += [meter.read() for meter in self._scalars.values()]
        sums = all_reduce_(torch.tensor(local, device=device)).tolist()
        unreadable = sums[2]
        loss, aux, _, waited, *scalars = (value / self.world.size for value in sums)
        position.unreadable += int(unreadable)
        self._unreadable = 0
        self._check_bad_samples()
        routers = self._routers.read()
        elapsed = time.monotonic() - self._clock
        self.images_per_second = self._images / max(elapsed, 1e-9)
        steps = max(position.step - self._steps_logged, 1)
        self._steps_logged = position.step
        self._restart_clock()
        record: Record = {
            "step": position.step,
            "epoch": self._epochs_done(),
            "train/loss": loss,
            "train/lr": self.engine.lr,
            "train/grad_norm": self.engine.grad_norm(),
            "train/images_per_second": round(self.images_per_second, 1),
            "train/data_wait_ms": round(1e3 * waited * elapsed / steps, 2),
        }
        if position.skipped:
            record["train/skipped_updates"] = position.skipped
        if self.engine.loss_scale:
            record["train/loss_scale"] = self.engine.loss_scale.value
        if routers:
            record["train/aux_loss"] = aux
        for key, value in zip(self._scalars, scalars, strict=True):
            record[f"train/{key}"] = value
        record |= self._routers.record(routers)
        if self.profile:
            record |= self.profile.take()
        if self.log:
            self.log.write(record)
        for warning in self._routers.warnings(routers):
            self.say(f"warning at step {position.step}: {warning}")
        if warning := self._loader_watch.check(waited, self.train_loader.workers):
            self.say(f"warning at step {position.step}: {warning}")
        status = (
            f"loss {loss:.4f}  lr {record['train/lr']:.2e}  norm {record['train/grad_norm']:.2f}  "
            f"{self.images_per_second:.0f} img/s"
        )
        eta = timedelta(seconds=round(self._updates_left() * elapsed / steps))
        line = f"epoch {position.epoch + 1}/{self.plan.epochs}  step {position.step}  {status}"
        (self.say if self._piped else logger.info)(f"{line}  eta {eta}")
        return status

    def _updates_left(self) -> int:
        """Return the number of updates until the training ends."""
        position, plan = self.position, self.plan
        left = (plan.epochs - position.epoch) * plan.updates_per_epoch - position.update
        return min(left, plan.max_steps - position.step) if plan.max_steps else left

    def _forward_watched(self, inputs: dict[str, Tensor]) -> Outputs:
        self.watchdog.beat()
        return self.engine.forward(inputs)

    def _evaluate(self) -> bool:
        """Evaluate, write and print the result; return whether it is the best so far."""
        position = self.position
        self.engine.train(False)
        with self.watchdog.phase("the held-out images were evaluated"):
            result = evaluate(self.task, self._forward_watched, self.eval_loader, self.world.device)
        self.last_evaluation = result
        if not all(map(math.isfinite, result.metrics.values())):
            raise TrainingError(
                f"non-finite loss on the held-out images after step {position.step}: the weights "
                f"have blown up; they are not saved and {self._kept()}"
            )
        metric = self.task.metric
        value = result.metrics[metric.key]
        best = metric.is_better(value, position.best)
        if best:
            position.best, position.best_step = value, position.step
        if self.log:
            self.log.write(
                {
                    "step": position.step,
                    "epoch": self._epochs_done(),
                    **{f"val/{key}": value for key, value in result.metrics.items()},
                    "data/unreadable": result.unreadable + position.unreadable,
                }
            )
        figures = [f"{m.label} {m.format(result.metrics[m.key])}" for m in self.task.metrics]
        without = f"  ({result.unreadable} images unreadable)" if result.unreadable else ""
        self.say(
            f"epoch {self._epochs_done():.4g}/{self.plan.epochs}  step {position.step}  "
            f"{'  '.join(figures)}  {self.images_per_second:.0f} img/s{without}"
            + ("  (best)" if best else "")
        )
        return best
