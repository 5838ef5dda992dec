"""Metric steps: the metric phase inside of Trainer's loop, in place of training steps."""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer
from transformers import Trainer, TrainerCallback

from ..errors import ConfigurationError
from ..evaluation.ledger import Ledger
from . import building
from .observing import Observing
from .subclasses import bookkeeping_kept, is_overridden

logger = logging.getLogger(__name__)

UNGUIDED = (
    "Step {step} belongs to the metric phase, which begins at {start}, and was not guided: {cls} takes its steps "
    "without calling MetricOptTrainer.training_step. Let its training_step call super().training_step(model, inputs, "
    "num_items_in_batch)."
)
TOO_EARLY = (
    "Training ended at step {step}, before its metric phase, which would have begun at step {start}: the model is what "
    "the loss made of it. Let it end later, or set metric_steps to more."
)


def take(trainer: Any, inputs: Any) -> Tensor:
    """A micro-batch of a metric step: its loss, for the log; with the last one the phase moves phi."""
    step, phase, around = trainer.state.global_step, trainer.phase, trainer.around
    seen, made = _observing(trainer), step - around.start
    _hold_still(trainer.model)
    loss = seen.logged_loss(inputs) / trainer.current_gradient_accumulation_steps
    around.batches.append(inputs)
    if trainer.accelerator.sync_gradients:
        starts = not phase.started
        with bookkeeping_kept(trainer):
            if starts:
                with shown(trainer, phase.ledger, "start of the metric phase"):
                    phase.start(step, around.trained_seconds(step))
            batches, of = around.take_batches(), phase.plan.steps
            calls = phase.ledger.remaining // (of - made)
            with shown(trainer, phase.ledger, f"metric step {made + 1} of {of}", calls):
                phase.advance(step, lambda: torch.stack([seen.loss_gradient(batch) for batch in batches]).mean(0))
            if step + 1 == trainer.state.max_steps:
                with shown(trainer, phase.ledger, "selection"):
                    phase.finish(step + 1)
        if starts:
            _log(trainer, "start_score", phase.selection.candidates[0].score)
        if phase.finished:
            _log(trainer, "kept_score", phase.selection.chosen.score)
        around.hold(trainer.optimizer, trainer.accelerator.scaler)
    if is_overridden(trainer, "training_step"):  # it may look at gradients, as adversarial training does
        for parameter in trainer.model.parameters():
            if parameter.requires_grad and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
    return loss


def finish(trainer: Any, step: int) -> bool:
    """Behind the last step, or an earlier end: choose, if that is not done; whether there is something to choose."""
    phase = trainer.phase
    best_is_loaded = trainer.args.load_best_model_at_end and trainer.state.best_model_checkpoint is not None
    if phase.started:
        trainer.model.train()  # as Trainer leaves it
        if not phase.finished and not best_is_loaded:
            with bookkeeping_kept(trainer), shown(trainer, phase.ledger, "selection"):
                phase.finish(step)
            _log(trainer, "kept_score", phase.selection.chosen.score)
    return phase.started


def _observing(trainer: Any) -> Observing:
    return Observing(trainer, trainer.setup.metric, trainer.setup.phi)


def shown(trainer: Any, ledger: Ledger, what: str, calls: float | None = None) -> AbstractContextManager[None]:
    """Inside, a progress bar on the first rank, where bars are wanted; see `Ledger.shown`."""
    return ledger.shown(what, calls, trainer.args.disable_tqdm or not trainer.is_world_process_zero())


def _log(trainer: Any, name: str, score: float) -> None:
    """An entry of its own, whatever `logging_steps` is, past a subclass's `log`, which may gather numbers and clear."""
    Trainer.log(trainer, {f"metricopt/{name}": score})


def _hold_still(model: nn.Module) -> None:
    """Eval mode, so that no pass of a subclass moves statistics; the root alone is in train mode, by which subclasses
    tell training from evaluation."""
    model.eval()
    model.training = True


class MetricPhaseCallback(TrainerCallback):
    """In a metric step the phase moves phi, and no gradient is left for Trainer's optimizer.

    Args:
        trainer: the owner of the loop.
        start: the first metric step.
        checked: whether the metric has been called before, as in a resumed run; else it is called before the first
            step, when callbacks have set up what losses and predictions need.
    """

    def __init__(self, trainer: Any, start: int, checked: bool):
        self.trainer, self.start, self.checked = trainer, start, checked
        self._begun, self._first = perf_counter(), 0
        self.batches: list[Any] = []  # micro-batches of the present metric step
        self._held: tuple[torch.nn.Parameter, torch.Tensor] | None = None

    def take_batches(self) -> list[Any]:
        """All batches of the metric step, whose last one is there."""
        batches, self.batches = self.batches, []
        return batches

    def on_train_begin(self, args, state, control, **kwargs):
        self._begun, self._first = perf_counter(), state.global_step

    def on_step_begin(self, args, state, control, **kwargs):
        if not self.checked:
            with shown(self.trainer, self.trainer.phase.ledger, "first call of the metric"):
                building.check_metric(self.trainer, self.trainer.setup, self.trainer.phase)
            if self.trainer.phase.plan.blends:
                _observing(self.trainer).check_loss_gradient()
            self.checked = True

    def trained_seconds(self, step: int) -> float:
        """About how long the steps before this one took, those before a resume included."""
        done = step - self._first
        return (perf_counter() - self._begun) * step / done if done else 0.0

    def hold(self, optimizer: Optimizer, scaler: GradScaler | None) -> None:
        """A gradient scaler wants a gradient to look at: give one parameter a gradient of zeros, and keep its value."""
        if scaler is None:
            return
        held = next(parameter for group in optimizer.param_groups for parameter in group["params"])
        held.grad = torch.zeros_like(held)
        scaler.scale(torch.zeros((), device=held.device))  # where no loss was scaled yet, it has no scale
        self._held = held, held.detach().clone()

    def on_pre_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        if state.global_step < self.start:
            return
        if self.trainer.phase.last_step != state.global_step:
            cls = type(self.trainer).__name__
            raise ConfigurationError(UNGUIDED.format(step=state.global_step, start=self.start, cls=cls))
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if self._held is None or parameter is not self._held[0]:
                    parameter.grad = None  # such as an adversarial step of a subclass leaves it

    def on_optimizer_step(self, args, state, control, **kwargs):
        if self._held is not None:
            parameter, value = self._held
            with torch.no_grad():
                parameter.copy_(value)
            self._held = None

    def on_train_end(self, args, state, control, **kwargs):
        if not finish(self.trainer, state.global_step) and state.global_step <= self.start < state.max_steps:
            logger.warning(TOO_EARLY.format(step=state.global_step, start=self.start))
