"""PhasePlan: the numbers of a metric phase, from the config and the number of optimizer steps."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from ..linear.linearization import Linearization
from ..linear.local_metric import PERTURBED
from ..linear.noise import HALVES

# Observed are predictions, on which the metric is called without a pass, or scores, which take a pass each
PREDICTIONS, SCORES = "predictions", "scores"
CALLS = {PREDICTIONS: 5000, SCORES: 160}  # metric calls
FEW_CALLS = 10 * HALVES  # of a step; beside fewer, a standard error in each step would cost too many
UPDATES = {PREDICTIONS: 20, SCORES: 2}  # updates of the coordinates in a step
STEP_LENGTH = 0.32  # length in phi of an update by Adam; chosen for FiLM, in which 1 doubles a channel
SPREAD_LENGTH = 1.6  # length in phi of a perturbation
MOST_MOVED = 0.5  # standard deviations of the outputs by which a perturbation moves them at most, else it is smaller
PATIENCE = 60.0  # seconds that metric calls may take, however short the training was
DEFAULT_STEPS = 10
CLASSES, MOST_CLASSES = 4, 10  # calls grow with the logits of a row from the first number to the second


def default_calls(linear: Linearization) -> int:
    """Metric calls on a linearization: more where a row has many logits, as there are more decisions to tell apart."""
    leaf = linear.decisions
    classes = 1 if leaf is None or leaf.outputs.dim() < 2 else min(MOST_CLASSES, leaf.outputs.shape[1])
    return int(CALLS[PREDICTIONS] * max(1.0, classes / CLASSES))


@dataclass(frozen=True)
class PhasePlan:
    """The numbers of a metric phase.

    Attributes:
        steps: optimizer steps.
        calls: the most metric calls to observe.
        observe: "predictions" or "scores".
        on_all_rows: whether the metric makes sense on all rows only.
        dim: the most coordinates.
        rate: learning rate of an update of phi, in units of `STEP_LENGTH`.
        value_weight: lambda in `blended`.
        seed: seeds the private generator.
        follows_outputs: whether `calls` is the default, which grows with the number of logits, and is lowered for
            a slow metric.
        scale: factor on steps and perturbations, see `MOST_MOVED`.
    """

    steps: int
    calls: int
    observe: str
    on_all_rows: bool
    dim: int
    rate: float
    value_weight: float
    seed: int
    follows_outputs: bool = True
    scale: float = 1.0

    @classmethod
    def from_args(cls, args: Any, steps: int, of_predictions: bool) -> PhasePlan:
        """The plan of the config, where that is possible.

        Args:
            args: the `MetricOptConfig`.
            of_predictions: whether the metric is one of predictions.
        """
        observe = SCORES if args.observe == SCORES or not of_predictions else PREDICTIONS
        calls = CALLS[observe] if args.metric_call_budget is None else args.metric_call_budget
        on_all_rows = args.observe == "predictions_on_all_rows"
        return cls(
            steps,
            calls,
            observe,
            on_all_rows,
            args.phi_dim,
            args.phi_learning_rate,
            args.value_weight,
            args.seed,
            follows_outputs=args.metric_call_budget is None,
        )

    def observing_scores(self, args: Any) -> PhasePlan:
        """The same where predictions cannot be linearised."""
        calls = CALLS[SCORES] if args.metric_call_budget is None else args.metric_call_budget
        return replace(self, observe=SCORES, calls=calls)

    def for_outputs(self, linear: Linearization) -> PhasePlan:
        """With the calls of `default_calls`, where the config leaves them open."""
        return replace(self, calls=default_calls(linear)) if self.follows_outputs else self

    def in_time(self, call_seconds: float, trained_seconds: float) -> PhasePlan:
        """With fewer calls, where the metric is slow: as many as take no longer than training did, or a minute."""
        if not self.follows_outputs or not call_seconds > 0:
            return self
        return replace(self, calls=min(self.calls, max(2, int(max(PATIENCE, trained_seconds) / call_seconds))))

    @property
    def blends(self) -> bool:
        """Whether the gradient of the loss is blended in."""
        return math.isfinite(self.value_weight)

    @property
    def updates(self) -> int:
        """Updates of the coordinates in a step."""
        return UPDATES[self.observe]

    def spread(self, dim: int) -> float:
        """Standard deviation of a perturbation on each of `dim` coordinates."""
        return self.scale * SPREAD_LENGTH / min(dim, PERTURBED) ** 0.5

    def learning_rate(self, dim: int) -> float:
        """Size of an update on each of `dim` coordinates: a step can go as far whatever its number of updates."""
        return self.scale * self.rate * STEP_LENGTH / dim**0.5 * UPDATES[PREDICTIONS] / self.updates
