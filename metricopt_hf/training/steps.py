"""Metric steps: what is done in Trainer's loop in place of a training step, from the start of the phase on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from . import building
from .bookkeeping import bookkeeping_kept
from .overrides import is_overridden


def take(trainer: Any, inputs: Any) -> Tensor:
    """A micro-batch of a metric step: its loss, for the log; with the last one the phase moves phi."""
    step, phase, around = trainer.state.global_step, trainer.phase, trainer.around
    seen = building.observing(trainer, trainer.setup)
    _hold_still(trainer.model)
    loss = seen.logged_loss(inputs) / trainer.current_gradient_accumulation_steps
    around.batches.append(inputs)
    if trainer.accelerator.sync_gradients:
        starts = not phase.started
        with bookkeeping_kept(trainer):  # what a subclass keeps of losses and batches is of training
            if starts:
                phase.start(step, around.trained_seconds(step))
            batches = around.take_batches()
            phase.advance(step, lambda: torch.stack([seen.loss_gradient(batch) for batch in batches]).mean(0))
            if step + 1 == trainer.state.max_steps:
                phase.finish(step + 1)
        if starts:
            _log(trainer, "start_score", phase.selection.candidates[0].score)
        if phase.finished:
            _log(trainer, "kept_score", phase.selection.chosen.score)
        around.hold(trainer.optimizer, trainer.accelerator.scaler)
    if is_overridden(trainer, "training_step"):  # which may look at gradients, such as adversarial training
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
            with bookkeeping_kept(trainer):
                phase.finish(step)
            _log(trainer, "kept_score", phase.selection.chosen.score)
    return phase.started


def _log(trainer: Any, name: str, score: float) -> None:
    """An entry of its own, whatever `logging_steps` is, past a subclass's `log`, which may gather numbers and clear."""
    Trainer.log(trainer, {f"metricopt/{name}": score})


def _hold_still(model: nn.Module) -> None:
    """Eval mode, so that no further pass of a subclass moves statistics. The model itself says that it is trained: by
    that subclasses tell numbers of training from those of evaluation."""
    model.eval()
    model.training = True
