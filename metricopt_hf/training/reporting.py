"""Reporting: the result of a guided run, and the metric among the numbers of `evaluate()`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial, wraps
from typing import Any

import torch
from torch import Tensor
from transformers import EvalPrediction

from ..errors import MetricError
from ..evaluation.answer import weights_of
from ..evaluation.evaluator import agreed
from ..evaluation.ledger import Ledger
from ..evaluation.metric import Metric
from ..evaluation.model_metric import ModelMetric, score_of_model
from ..hub import ValueFunction
from ..phase.phase import MetricPhase
from ..phase.selection import Candidate
from ..phi import Coordinates
from ..phi.space import model_class, whole
from ..value import Signature, Trajectory, ValueNetwork, fit
from .evaluated import PREFIX
from .observing import Observing


@dataclass(frozen=True, eq=False)
class RunResult:
    """A run whose metric phase has begun; printed, five lines.

    Attributes:
        metric: its name.
        greater_is_better: which way it is better.
        start_step: optimizer steps before the metric phase.
        observed: "predictions" or "scores".
        start: the model at the start of the phase, with its score on the selection split.
        chosen: the selected candidate; while the run goes on, the latest one.
        why: the reason for that choice, in a sentence; empty while the run goes on.
        candidates: all candidates, in order.
        curve: one entry per metric step: step, guide (whose step was taken, or None), before and value (the metric on
            the observation set, greater is better), tried (by guide), standard_error, rates, calls, passes.
        ended: the reason of an early end; None without one.
        trajectory: the points of metric calls and their values, greater is better.
        ledger: metric calls, forward passes and seconds by purpose.
        failed_calls: metric calls that failed.
        phi: `PhiSpace.description` of the tuned parameters.
        coordinates: the compact coordinates of phi.
    """

    metric: str
    greater_is_better: bool
    start_step: int
    observed: str
    start: Candidate
    chosen: Candidate
    why: str
    candidates: Sequence[Candidate]
    curve: Sequence[dict[str, Any]]
    ended: str | None
    trajectory: Trajectory
    ledger: Ledger
    failed_calls: int
    phi: dict[str, Any]
    coordinates: Coordinates
    make_value_function: Callable[[], ValueFunction | None]

    @property
    def best_score(self) -> float:
        """Score of the chosen candidate on the selection split; nan without one."""
        return self.chosen.score

    @property
    def best_phi(self) -> Tensor:
        """Phi of the chosen candidate, [d]."""
        return self.chosen.phi

    @property
    def best_step(self) -> int:
        """Optimizer steps before the chosen candidate."""
        return self.chosen.step

    @property
    def taken(self) -> int:
        """Metric steps that were taken, not taken back."""
        return sum(row["guide"] is not None for row in self.curve)

    @cached_property
    def value_function(self) -> ValueFunction | None:
        """V(z) over the run's coordinates, fitted to its observations; None if they are too few.

        The first access fits it.
        """
        return self.make_value_function()

    def __str__(self) -> str:
        spent = self.ledger
        direction = "greater" if self.greater_is_better else "smaller"
        return (
            f"{self.metric} ({direction} is better) on the selection split: {self.start.score:.4f} at the start of the "
            f"metric phase, {self.chosen.score:.4f} now\n"
            f"kept: {self.chosen.kind}, at step {self.chosen.step}\n"
            f"why: {self.why or 'the run is not over'}\n"
            f"steps taken: {self.taken} of {len(self.curve)}"
            f"{f'; it ended early: {self.ended}' if self.ended else ''}\n"
            f"cost: {sum(spent.passes.values())} passes, {sum(spent.calls.values())} metric calls "
            f"({self.failed_calls} failed), {sum(spent.seconds.values()):.1f} s"
        )


logger = logging.getLogger(__name__)

FEWEST = 16  # observations of a value function


def result_of(phase: MetricPhase) -> RunResult:
    """The result so far of a phase that has begun."""
    selection, metric = phase.selection, phase.metric
    return RunResult(
        metric=metric.name,
        greater_is_better=metric.greater_is_better,
        start_step=phase.start_step,
        observed=phase.plan.observe,
        start=selection.candidates[0],
        chosen=selection.chosen or selection.candidates[-1],
        why=selection.why,
        candidates=tuple(selection.candidates),
        curve=tuple(phase.curve),
        ended=phase.ended,
        trajectory=phase.trajectory,
        ledger=phase.ledger,
        failed_calls=phase.faults.total + selection.faults.total,
        phi=phase.phi.description,
        coordinates=phase.coordinates,
        make_value_function=partial(value_function_of, phase),
    )


def warn_of_changed_weights(trainer: Any) -> None:
    """Warn where phi is not the chosen one, for example behind a callback that puts averaged weights in place."""
    phase: MetricPhase = trainer.phase
    chosen, left = phase.selection.chosen, phase.selection.weights
    if phase.started and not phase.finished:
        phase.selection.why = "training ended early, and load_best_model_at_end put its checkpoint in place of a choice"
        logger.warning(f"Nothing was selected: {phase.selection.why}.")
    now = [whole(parameter.detach()) for parameter in phase.phi.parameters]
    if chosen is not None and left and not all(map(torch.equal, now, left)):
        logger.warning(
            f"The score {chosen.score:.4f} is not that of the model that came out: the weights were changed behind the "
            "selection, in on_train_end or by load_best_model_at_end."
        )


def value_function_of(phase: MetricPhase) -> ValueFunction | None:
    """V(z) over the phase's coordinates, fitted to its observations, in the metric's own direction; None if too few.

    After the end of the phase it is fitted once.
    """
    if phase.finished and phase.value_function is not None:
        return phase.value_function
    metric, coordinates, trajectory = phase.metric, phase.coordinates, Trajectory(phase.trajectory.rows.clone())
    if len(trajectory) < FEWEST or not coordinates.dim:
        return None
    trajectory.scores.mul_(metric.sign)
    generator = torch.Generator().manual_seed(phase.plan.seed)
    network = ValueNetwork.started(coordinates.dim, None, generator)
    fit(network, trajectory.z, trajectory.scores, generator)
    signature = Signature(
        model_class(phase.phi.model),
        phase.phi.description,
        coordinates.kind,
        metric.name,
        metric.greater_is_better,
        coordinates.origin.cpu(),
        coordinates.basis.cpu(),
    )
    phase.value_function = ValueFunction.of(network, signature, trajectory)
    return phase.value_function


def with_metric(trainer: Any, compute_metrics: Callable | None) -> Callable | None:
    """A `compute_metrics` that, inside of `evaluate`, reports a metric of predictions given apart from it too."""
    args, metric = trainer.args, trainer.given.metric or getattr(trainer.args, "metric_name_or_path", None)
    of_model = isinstance(metric, ModelMetric) or str(metric).startswith(PREFIX)
    if metric is None or of_model or args.batch_eval_metrics:
        return compute_metrics

    def both(prediction: EvalPrediction) -> dict[str, float]:
        found = {} if compute_metrics is None else compute_metrics(prediction)
        inputs = trainer.metric_inputs
        metric = _known_metric(trainer) if inputs.evaluates else None
        if metric is not None and metric.of_predictions:
            name, complete = metric.name.removeprefix("eval_"), inputs.completing(inputs.evaluated)
            if not {name, f"eval_{name}"} & found.keys():
                with _nan_in_training(trainer, name, found):
                    score = agreed(args.process_index, args.world_size, lambda: metric(prediction, complete))
                    found[name] = float(score)
        return found

    return both if compute_metrics is None else wraps(compute_metrics, (), ())(both)


def _known_metric(trainer: Any) -> Metric | None:
    return trainer.setup.metric if trainer.setup else trainer.given.reported_metric(trainer)


@contextmanager
def _nan_in_training(trainer: Any, name: str, found: dict[str, float]) -> Iterator[None]:
    """Inside of a run, a metric that fails becomes nan in `found`, with a warning; outside, its error goes through."""
    try:
        yield
    except MetricError as error:
        if not trainer.is_in_train:
            raise
        logger.warning(f"{error} There is no {name} at step {trainer.state.global_step}; the run goes on.")
        found[name] = float("nan")


def missing_score(trainer: Any, dataset: Any, prefix: str, found: dict[str, float]) -> dict[str, float] | None:
    """The metric that is optimised, where `evaluate()` has not found it: one of the model, or a weighted sum.

    Args:
        dataset: the evaluated one.
        prefix: that of the names in `found`.
    """
    if not trainer.guided or isinstance(dataset, dict):
        return None
    if (metric := _known_metric(trainer)) is None:
        return None
    name, weights = f"{prefix}_{metric.name.removeprefix('eval_')}", weights_of(metric.name)
    if name in found:
        return None
    if isinstance(metric, ModelMetric):
        if not metric.wants_copy:  # it is what `evaluate` itself returns
            return None
        score: dict[str, float] = {}
        args = trainer.args
        with _nan_in_training(trainer, name, score):
            ranks = args.process_index, args.world_size
            score[name] = float(score_of_model(metric, trainer.model, dataset, prefix, *ranks))
        return score
    if trainer.setup is not None and trainer.metric_inputs.completes and trainer.compute_metrics is not None:
        # Trainer calls no compute_metrics on rows without labels, as of features whose answers are among the examples
        seen = Observing(trainer, metric, trainer.setup.phi)
        return {name: float(seen.evaluator(dataset, Ledger(), prefix).evaluate("offline"))}
    if weights and all(f"{prefix}_{key}" in found for key in weights):
        return {name: sum(weight * found[f"{prefix}_{key}"] for key, weight in weights.items())}
    return None
