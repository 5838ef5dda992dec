"""Watch: sees to a guided run from where no subclass can pass by, and what other callbacks do to its model."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import TrainerCallback

if TYPE_CHECKING:
    from .trainer import MetricOptTrainer

NO_STEPS = (
    "Of {steps} steps, metric_start_ratio={ratio} leaves none for the metric phase: this run is not guided. Take more "
    "steps, or a smaller ratio (0: the metric phase alone)."
)
TOO_EARLY = (
    "Training ended at step {step}, before the metric phase (step {start}): the model is Trainer's, and nothing was "
    "guided. A smaller metric_start_ratio lets it begin earlier."
)
CHANGED = (
    "A callback changed the weights in on_train_end, as one that averages them does: what comes out is its model, and "
    "not the one that was selected by {}. To keep that one, leave the callback out."
)
STEPS = ("on_step_begin", "on_pre_optimizer_step", "on_optimizer_step", "on_step_end")


class Watch(TrainerCallback):
    """The first of all callbacks of a guided run."""

    def __init__(self, trainer: MetricOptTrainer):
        self.trainer = trainer

    def on_step_begin(self, args, state, control, **kwargs):
        self.trainer._rehearse()

    def on_step_end(self, args, state, control, **kwargs):
        self.trainer._check_guided()

    def on_train_end(self, args, state, control, **kwargs):
        self.trainer._finish_run()  # first of all callbacks: what another one saves is the model that comes out


def followed(callbacks: Iterable[TrainerCallback]) -> bool:
    """Whether a callback of the user's acts on steps and on the end of training, as one that averages weights does.

    It looks then for the parameters that it has followed, phi's among them, by their names or by their order.
    """

    def overrides(callback: TrainerCallback, name: str) -> bool:
        return getattr(type(callback), name) is not getattr(TrainerCallback, name)

    return any(
        overrides(callback, "on_train_end") and any(overrides(callback, name) for name in STEPS)
        for callback in callbacks
        if not type(callback).__module__.startswith(("transformers.", "metricopt_hf."))
    )


def sums(model: nn.Module) -> dict[str, float | None]:
    """Of each of the weights that the model would save, None where it is not finite: do they change, so do these."""
    weights = {name: tensor for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
    found = {name: tensor.sum(dtype=torch.float32).item() for name, tensor in weights.items()}
    return {name: value if math.isfinite(value) else None for name, value in found.items()}
