"""`MetricOptTrainer.diagnose`: predictions that a bias and phi would give, made before any training.

Observation and selection rows are two folds. On each, the predictions are linearised at the present phi; a bias is
tuned and phi goes up the metric on one fold, and both are measured on the other's predictions. Nothing is written.
"""

from __future__ import annotations

from functools import partial
from time import perf_counter
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import EvalPrediction

from ..diagnosis import BIAS, PHI, START, Diagnosis, Scored, judged, scored
from ..errors import ConfigurationError
from ..evaluation.evaluator import Evaluator, agreed
from ..evaluation.ledger import Faults, Ledger
from ..guides import AUTO, GuideContext, from_spec
from ..linear.linearization import Linearization
from ..linear.linearizer import Linearizer, NotLinearizable
from ..linear.local_metric import LocalMetric
from ..linear.rows import groups_of, take_rows
from ..phase.ascent import ascend
from ..phase.plan import PhasePlan
from ..phase.trust import applies
from ..phi import Coordinates
from ..posthoc import add_bias, logits_of, tune_bias
from ..value import Trajectory
from .observing import Observing
from .setup import Setup
from .steps import shown

UPDATES = 40  # of phi, on one linearization


class _Fold(NamedTuple):
    """One of the two sets; `value` is the metric's at phi."""

    evaluator: Evaluator
    linear: Linearization
    coordinates: Coordinates
    value: float

    def score(self, prediction: EvalPrediction) -> float:
        return self.evaluator.value(prediction, "select")


def diagnose(seen: Observing, setup: Setup, worthwhile: float | None, since: float) -> Diagnosis:
    """See `MetricOptTrainer.diagnose`.

    Args:
        since: when it was asked for, by `perf_counter`.

    Raises:
        ConfigurationError: the metric is one of the model, its predictions cannot be linearised, or `worthwhile` is not
            positive.
        MetricError: the metric fails at the start.
    """
    trainer, metric = seen.trainer, setup.metric
    if not metric.of_predictions:
        raise ConfigurationError(
            f"The metric {metric.name!r} is one of the model: what phi and a bias reach cannot be told from "
            "predictions, so there is nothing to diagnose."
        )
    if worthwhile is not None and not worthwhile > 0:
        raise ConfigurationError(f"worthwhile={worthwhile!r} must be positive: a gain, in the metric's unit.")
    ledger, args = Ledger(), trainer.args
    generator = torch.Generator().manual_seed(args.seed)
    plan = PhasePlan.from_args(args, 1, True)
    with shown(trainer, ledger, "diagnosis"):
        folds: list[_Fold] = []
        for part in (setup.observation, setup.selection):
            evaluator = seen.evaluator(part, ledger)
            score, prediction = evaluator.evaluate_with_predictions("observe")
            if prediction is None:
                raise ConfigurationError("The metric is computed batch by batch: there are no predictions to diagnose.")
            linearizer = Linearizer(evaluator, plan.dim, seen.loss_gradients, generator)
            try:
                coordinates = folds[0].coordinates if folds else linearizer.coordinates(prediction)
                linear = linearizer.linearize(coordinates.basis, prediction)
            except NotLinearizable as error:
                raise ConfigurationError(
                    f"Nothing can be told before training: {error}, so that every number would take a forward pass. "
                    "Train a short run instead, and print its result."
                ) from error
            ledger.add("observe", 0, 0.0, linearizer.cost(prediction, coordinates.dim).passes)
            folds.append(_Fold(evaluator, linear, coordinates, metric.sign * score))
        found: list[Scored] = []
        for fitted, held_out in (folds, folds[::-1]):
            found.append(_scored(fitted, held_out, _ascended(fitted, plan, generator), plan))
    examples = sum(fold.linear.num_rows for fold in folds)
    return judged(found, metric, examples, worthwhile, ledger, perf_counter() - since)


def _ascended(fold: _Fold, plan: PhasePlan, generator: torch.Generator) -> Tensor:
    """z, [k], to which the better of the guides goes on a fold's linearization."""
    evaluator, dim = fold.evaluator, fold.coordinates.dim
    best, best_value = torch.zeros(dim), fold.value
    for guide in from_spec(AUTO, linearised=True).values():
        near = evaluator, fold.coordinates, fold.linear, plan.spread(dim), generator, Faults(), Trajectory()
        local = LocalMetric(*near, 0, fold.value, plan.on_all_rows, allowance=plan.calls // 2)
        guide.start(GuideContext(dim, generator))
        if not applies(guide, local):
            continue
        rate = plan.learning_rate(dim) / 2
        z = ascend(guide, local, UPDATES, rate, lambda parameter, rate: torch.optim.Adam([parameter], rate))
        value = agreed(evaluator.rank, evaluator.world_size, partial(fold.score, fold.linear.at(z)))
        if value > best_value:
            best, best_value = z, value
    return best


def _scored(fitted: _Fold, held_out: _Fold, z: Tensor, plan: PhasePlan) -> Scored:
    """Each candidate on the fold that it was not fitted to."""
    evaluator, linear = held_out.evaluator, held_out.linear
    predictions = {START: linear.centre, PHI: linear.at(z)}
    if evaluator.concat and evaluator.complete is None and _has_place_for_bias(fitted.linear.centre):
        for name, there in ((START, fitted.linear.centre), (PHI, fitted.linear.at(z))):
            tune = partial(tune_bias, evaluator.metric, there, evaluator.ledger)
            bias = agreed(evaluator.rank, evaluator.world_size, tune)
            predictions[BIAS if name == START else PHI] = add_bias(predictions[name], bias)
    on_part = not plan.on_all_rows and evaluator.complete is None and linear.unsplittable is None

    groups = groups_of(linear.centre, evaluator.row_groups, evaluator.concat, linear.batch_sizes) if on_part else []

    def take(prediction: EvalPrediction, drawn: np.ndarray) -> EvalPrediction:
        rows = np.sort(np.concatenate([groups[i] for i in drawn]))
        return take_rows(prediction, rows, evaluator.concat, linear.batch_sizes)

    compute = partial(scored, held_out.score, predictions, len(groups), take if on_part else None, plan.seed)
    return agreed(evaluator.rank, evaluator.world_size, compute)


def _has_place_for_bias(prediction: EvalPrediction) -> bool:
    """Whether the predictions are logits: numbers with whole numbers as labels."""
    labels = prediction.label_ids[0] if isinstance(prediction.label_ids, tuple) else prediction.label_ids
    outputs = logits_of(prediction)
    return outputs.dtype.kind == "f" and getattr(labels, "dtype", np.dtype(float)).kind in "iub"
