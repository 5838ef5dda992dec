"""MetricPhaseCallback: what happens around a metric step where Trainer's loop leaves a place for it."""

from __future__ import annotations

import logging
from time import perf_counter
from typing import Any

import torch
from torch.amp import GradScaler
from torch.optim import Optimizer
from transformers import TrainerCallback

from ..errors import ConfigurationError
from . import building, steps

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


class MetricPhaseCallback(TrainerCallback):
    """In a metric step phi alone is moved, by the phase: no gradient is left for Trainer's optimizer.

    Args:
        trainer: whose loop it is.
        start: the first metric step.
        checked: whether the metric has been called, as in the run that is resumed; else it is before the first step,
            when callbacks have set up what losses and predictions need.
    """

    def __init__(self, trainer: Any, start: int, checked: bool):
        self.trainer, self.start, self.checked = trainer, start, checked
        self._begun, self._first = perf_counter(), 0
        self.batches: list[Any] = []  # of the metric step that is being made
        self._held: tuple[torch.nn.Parameter, torch.Tensor] | None = None

    def take_batches(self) -> list[Any]:
        """All batches of the metric step, whose last one is there."""
        batches, self.batches = self.batches, []
        return batches

    def on_train_begin(self, args, state, control, **kwargs):
        self._begun, self._first = perf_counter(), state.global_step

    def on_step_begin(self, args, state, control, **kwargs):
        if not self.checked:
            building.check_metric(self.trainer, self.trainer.setup, self.trainer.phase)
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
        if not steps.finish(self.trainer, state.global_step) and state.global_step <= self.start < state.max_steps:
            logger.warning(TOO_EARLY.format(step=state.global_step, start=self.start))
