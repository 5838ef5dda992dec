"""Reporting: what a run says of itself afterwards, and the metric among the numbers of `evaluate()`."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from transformers import EvalPrediction

from ..errors import MetricError
from ..evaluation.answer import ConstraintCheck, weights_of
from ..evaluation.evaluator import agreed
from ..evaluation.ledger import Ledger
from ..evaluation.metric import Metric
from ..evaluation.model_metric import score_of_model
from ..evaluation.noise import checked_constraints
from ..evaluation.trajectory import Trajectory
from ..hub import ValueFunction
from ..phi.space import model_class, whole
from ..value import Signature, ValueNetwork, fit
from .observing import Observing
from .phase import MetricPhase
from .result import RunResult
from .setup import Setup

logger = logging.getLogger(__name__)

FEWEST = 16  # observations that a value function is fitted to


def result_of(phase: MetricPhase) -> RunResult:
    """What is known of a phase that has begun."""
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
        constraints=selection.constraints,
        trajectory=phase.trajectory,
        ledger=phase.ledger,
        failed_calls=phase.faults.total + selection.faults.total,
        phi=phase.phi.description,
        coordinates=phase.coordinates,
        make_value_function=partial(value_function_of, phase),
    )


def tell_changed_weights(phase: MetricPhase) -> None:
    """Warn where phi is another one than was chosen, as a callback leaves it that puts averaged weights in place."""
    chosen, left = phase.selection.chosen, phase.selection.weights
    now = [whole(parameter.detach()) for parameter in phase.phi.parameters]
    if left and not all(map(torch.equal, now, left)):
        logger.warning(
            f"The score {chosen.score:.4f} is not that of the model that came out: the weights were changed behind the "
            "selection, in on_train_end or by load_best_model_at_end."
        )


def value_function_of(phase: MetricPhase) -> ValueFunction | None:
    """V(z) over the phase's coordinates, fitted to its observations, in the metric's own direction; None of too few.

    Behind the end of the phase it is fitted once.
    """
    if phase.finished and phase.value_function is not None:
        return phase.value_function
    metric, coordinates, state = phase.metric, phase.coordinates, phase.trajectory.state_dict()
    trajectory = Trajectory.from_state_dict({**state, "scores": metric.sign * state["scores"]})
    if len(trajectory) < FEWEST or not coordinates.dim:
        return None
    generator = torch.Generator().manual_seed(phase.plan.seed)
    network = ValueNetwork.started(coordinates.dim, None, generator)
    fit(network, trajectory.z, trajectory.scores, trajectory.variances, generator)
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


def check_constraints(seen: Observing, setup: Setup, dataset: Any, split: str) -> tuple[ConstraintCheck, ...]:
    """See `MetricOptTrainer.check_constraints`."""
    on_all_rows = seen.trainer.args.observe == "predictions_on_all_rows"
    return checked_constraints(seen.evaluator(dataset, Ledger(), split), on_all_rows)


@contextmanager
def with_metric(trainer: Any, dataset: Any) -> Iterator[None]:
    """Inside, `evaluate` reports a metric of predictions that is no part of `compute_metrics`.

    Args:
        dataset: that is evaluated.
    """
    args, compute_metrics = trainer.args, trainer.compute_metrics
    apart = trainer.given.metric is not None or getattr(args, "metric_name_or_path", None) is not None
    metric = _known_metric(trainer) if apart and not args.batch_eval_metrics else None
    if metric is None or not metric.of_predictions or isinstance(dataset, dict):
        yield
        return
    name, complete = metric.name.removeprefix("eval_"), trainer.metric_inputs.completing(dataset)

    def both(prediction: EvalPrediction) -> dict[str, float]:
        found = {} if compute_metrics is None else compute_metrics(prediction)
        if not {name, f"eval_{name}"} & found.keys():
            with _told_in_training(trainer, name, found):
                found[name] = float(agreed(args.process_index, args.world_size, lambda: metric(prediction, complete)))
        return found

    trainer.compute_metrics = both
    try:
        yield
    finally:
        trainer.compute_metrics = compute_metrics


def _known_metric(trainer: Any) -> Metric | None:
    return trainer.setup.metric if trainer.setup else trainer.given.reported_metric(trainer)


@contextmanager
def _told_in_training(trainer: Any, name: str, found: dict[str, float]) -> Iterator[None]:
    """A metric that fails in an evaluation of a run is nan among what was found; the run goes on."""
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
        dataset: that was evaluated.
        prefix: of the names in `found`.
    """
    if not trainer.guided or isinstance(dataset, dict):
        return None
    if (metric := _known_metric(trainer)) is None:
        return None
    name, weights = f"{prefix}_{metric.name.removeprefix('eval_')}", weights_of(metric.name)
    if name in found:
        return None
    if not metric.of_predictions and not metric.wants_copy:  # what `evaluate` itself returns
        return None
    if not metric.of_predictions:
        args, score = trainer.args, {}
        with _told_in_training(trainer, name, score):
            ranks = args.process_index, args.world_size
            score[name] = float(score_of_model(metric, trainer.model, dataset, prefix, *ranks))
        return score
    if trainer.setup is not None and trainer.metric_inputs.completes and trainer.compute_metrics is not None:
        # Trainer calls no compute_metrics on rows without labels, as of features whose answers are among the examples
        seen = Observing(trainer, metric, trainer.setup.phi, trainer.metric_inputs, trainer.ignore_keys)
        return {name: float(seen.evaluator(dataset, Ledger(), prefix).evaluate("offline"))}
    if weights and all(f"{prefix}_{key}" in found for key in weights):
        return {name: sum(weight * found[f"{prefix}_{key}"] for key, weight in weights.items())}
    return None
