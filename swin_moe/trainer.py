"""The training loop: epoch, step, evaluate, save. It knows no DeepSpeed and no file format."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from timm.loss import SoftTargetCrossEntropy
from timm.scheduler import CosineLRScheduler
from torch import Tensor

from .data import Batch, Loader
from .data.mixing import Mixing
from .distributed import World, all_reduce_
from .engine import Engine
from .evaluation import Evaluation, evaluate
from .metrics import Meter, MetricLog, Record, progress_bar
from .models import split_output
from .moe import ChoiceCounter, RouterMeter, RouterWatch

logger = logging.getLogger("swin_moe")


class TrainingError(RuntimeError):
    """Training cannot go on; the message is one line for the user."""


@dataclass
class Position:
    """Where training stands.

    ``step`` counts the updates made and never falls; the place in the schedule is ``epoch`` and
    ``update``, which a resume with another global batch converts.
    """

    step: int = 0
    epoch: int = 0
    update: int = 0  # updates done within the epoch
    best_top1: float = -1.0
    best_step: int = -1
    unreadable: int = 0

    def state(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class Plan:
    """How long to train and when to do what, in updates and epochs."""

    epochs: int
    updates_per_epoch: int
    accumulation_steps: int
    eval_every_epochs: int
    save_every_epochs: int
    save_every_steps: int
    log_every_steps: int
    max_steps: int
    num_classes: int

    def is_done(self, position: Position) -> bool:
        return position.epoch >= self.epochs or 0 < self.max_steps <= position.step


@dataclass
class Trainer:
    """Everything a loop needs, built elsewhere.

    ``save`` writes a checkpoint of the position it is handed; ``say`` prints a line on rank 0.
    """

    plan: Plan
    engine: Engine
    schedule: CosineLRScheduler
    train_loader: Loader
    eval_loader: Loader
    mixing: Mixing
    world: World
    log: MetricLog | None
    save: Callable[[Position], None]
    say: Callable[[str], None]
    position: Position = field(default_factory=Position)
    last_evaluation: Evaluation | None = None

    def __post_init__(self) -> None:
        device = self.world.device
        self.loss_function = SoftTargetCrossEntropy()
        self._loss, self._aux = Meter(device), Meter(device)
        model = self.engine.model
        self._layer_names = model.moe_layer_names()
        self._routers = RouterMeter(len(self._layer_names), model.moe.num_experts, device)
        self._watch = RouterWatch(self._layer_names, model.moe)
        # Nobody else pays for the reduction of each update's counts.
        self._choices = ChoiceCounter() if model.moe.bias_update_rate > 0 else None
        # Whether something was not finite in this update: tokens of each layer, then the loss.
        self._nonfinite = torch.zeros(len(self._layer_names) + 1, device=device)
        self._unreadable = 0  # on this rank, since the last log
        self._clock, self._images, self.images_per_second = time.monotonic(), 0, 0.0

    def fit(self) -> None:
        """Train from the current position to the end of the plan."""
        position, plan = self.position, self.plan
        while not plan.is_done(position):
            epoch = position.epoch
            self._train_epoch()
            finished = position.epoch > epoch
            done = plan.is_done(position)
            best = False
            if done or (finished and position.epoch % plan.eval_every_epochs == 0):
                best = self._evaluate()
            if done or best or (finished and position.epoch % plan.save_every_epochs == 0):
                self.save(position)

    def _train_epoch(self) -> None:
        position, plan = self.position, self.plan
        self.engine.train()
        batches = self.train_loader.epoch(position.epoch, position.update * plan.accumulation_steps)
        with progress_bar(self.world.is_main) as bar:
            task = bar.add_task(
                "", total=plan.updates_per_epoch, completed=position.update,
                epoch=f"{position.epoch + 1}/{plan.epochs}", status="",
            )  # fmt: skip
            self._restart_clock()
            last = False
            while not last:
                self._update(batches)
                last = position.update == plan.updates_per_epoch or plan.is_done(position)
                every = plan.save_every_steps
                saves = every > 0 and position.step % every == 0 and not last
                # Also at each save, so that a resumed run repeats the records.
                if position.step % plan.log_every_steps == 0 or saves or last:
                    bar.update(task, status=self._log_training())
                bar.update(task, completed=position.update)
                if saves:
                    self.save(position)
        if position.update == plan.updates_per_epoch:
            position.epoch, position.update = position.epoch + 1, 0

    def _update(self, batches: Iterator[Batch]) -> None:
        """One optimizer update: ``accumulation_steps`` micro-batches and a step."""
        position = self.position
        plan = self.plan
        self.schedule.step_update(position.epoch * plan.updates_per_epoch + position.update)
        for micro in range(plan.accumulation_steps):
            loss = self._forward(next(batches), position.step * plan.accumulation_steps + micro)
            self.engine.backward(loss)
            if self.engine.at_boundary:
                self._stop_if_nonfinite()
            try:
                self.engine.step()
            except FloatingPointError:
                raise self._nonfinite_error("gradient norm", "") from None
        if self._choices is not None:
            self.engine.model.update_choice_bias(self._choices.read())
        position.step += 1
        position.update += 1

    def _forward(self, batch: Batch, micro_step: int) -> Tensor:
        device = self.world.device
        images = batch.images.to(device, non_blocking=True)
        labels = batch.labels.to(device, non_blocking=True)
        images, targets = self.mixing(images, labels, micro_step)
        logits, routed = split_output(self.engine.forward(images))
        cross_entropy = self.loss_function(logits, targets)
        loss = cross_entropy
        self._loss.update(cross_entropy)
        if routed is not None:
            loss = loss + routed.aux_loss
            self._aux.update(routed.aux_loss)
            self._routers.update(routed.stats)
            if self._choices is not None:
                self._choices.update(routed.stats)
            self._nonfinite[:-1] += routed.stats.nonfinite
        self._nonfinite[-1] += ~torch.isfinite(loss.detach())
        self._images += images.shape[0] * self.world.size
        self._unreadable += len(batch.skipped)
        return loss

    def _stop_if_nonfinite(self) -> None:
        """Raise on every rank, before the weights change, if any rank met NaN or infinity.

        The first layer that met it is the nearest to the cause; later ones got it from there.
        """
        mine = (self._nonfinite > 0).to(torch.float32) * (self.world.rank + 1)
        culprits = all_reduce_(mine, "max").tolist()
        for name, culprit in zip([*self._layer_names, ""], culprits, strict=True):
            if culprit > 0:
                what = f"tokens at {name}" if name else "loss"
                raise self._nonfinite_error(what, f" on rank {int(culprit) - 1}")

    def _nonfinite_error(self, what: str, where: str) -> TrainingError:
        return TrainingError(
            f"non-finite {what}{where} at step {self.position.step + 1}; the weights were not "
            "changed and the last checkpoint is kept (try a lower optimizer.base_lr, a longer "
            "schedule.warmup_epochs or precision.dtype=fp32)"
        )

    # ----------------------------------------------------------------------------------------
    # Figures

    def _epochs_done(self) -> float:
        return round(self.position.epoch + self.position.update / self.plan.updates_per_epoch, 4)

    def _restart_clock(self) -> None:
        self._clock, self._images = time.monotonic(), 0

    def _log_training(self) -> str:
        """Reduce the meters over ranks and write a record; returns the bar's status text."""
        device, position = self.world.device, self.position
        local = [self._loss.read(), self._aux.read(), float(self._unreadable)]
        loss, aux, unreadable = all_reduce_(torch.tensor(local, device=device)).tolist()
        loss, aux = loss / self.world.size, aux / self.world.size
        position.unreadable += int(unreadable)
        self._unreadable = 0
        routers = self._routers.read()
        elapsed = time.monotonic() - self._clock
        self.images_per_second = self._images / max(elapsed, 1e-9)
        self._restart_clock()
        record: Record = {
            "step": position.step,
            "epoch": self._epochs_done(),
            "train/loss": loss,
            "train/lr": self.engine.lr,
            "train/grad_norm": self.engine.grad_norm(),
            "train/images_per_second": round(self.images_per_second, 1),
        }
        if routers:
            record["train/aux_loss"] = aux
        for name, totals in zip(self._layer_names, routers, strict=True):
            record |= totals.record(name)
        if self.log:
            self.log.write(record)
        for warning in self._watch.check(routers):
            self.say(f"warning at step {position.step}: {warning}")
        status = (
            f"loss {loss:.4f}  lr {record['train/lr']:.2e}  norm {record['train/grad_norm']:.2f}  "
            f"{self.images_per_second:.0f} img/s"
        )
        logger.info("step %d  %s", position.step, status)
        return status

    def _evaluate(self) -> bool:
        """Evaluate, record and tell; returns whether it is the best so far."""
        position = self.position
        self.engine.train(False)
        result = evaluate(
            self.engine.forward, self.eval_loader, self.plan.num_classes, self.world.device
        )
        self.last_evaluation = result
        if not math.isfinite(result.loss):
            raise TrainingError(
                f"non-finite loss on the held-out images after step {position.step}: the weights "
                "have blown up; they are not saved and the last checkpoint is kept"
            )
        best = result.top1 > position.best_top1
        if best:
            position.best_top1, position.best_step = result.top1, position.step
        if self.log:
            self.log.write(
                {
                    "step": position.step,
                    "epoch": self._epochs_done(),
                    "val/loss": result.loss,
                    "val/top1": result.top1,
                    "val/top5": result.top5,
                    "data/unreadable": result.unreadable + position.unreadable,
                }
            )
        self.say(
            f"epoch {self._epochs_done():.4g}/{self.plan.epochs}  step {position.step}  "
            f"top-1 {result.top1:.2f} %  top-5 {result.top5:.2f} %  val loss {result.loss:.4f}  "
            f"{self.images_per_second:.0f} img/s" + ("  (best)" if best else "")
        )
        return best
