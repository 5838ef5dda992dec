"""How far a metric's numbers on a set would be off by the choice of its rows alone: a bootstrap over predictions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from accelerate.utils import broadcast_object_list
from transformers import EvalPrediction

from ..errors import MetricError
from .answer import values_of
from .constraints import ConstraintCheck
from .evaluator import Evaluator
from .ledger import Ledger
from .metric import Metric
from .rows import num_rows, take_rows

RESAMPLES = 40


def checked_constraints(
    evaluator: Evaluator, on_all_rows: bool = False, values: Sequence[float] | None = None
) -> tuple[ConstraintCheck, ...]:
    """Which of the metric's constraints hold on the evaluator's set at the present phi; the same on every rank.

    Args:
        on_all_rows: whether the metric makes sense on all rows only; then the noise is not known.
        values: of the metric's `keys`, where they are known.

    Raises:
        MetricError: they are not known, and the metric fails.
    """
    metric, errors = evaluator.metric, np.full(len(evaluator.metric.keys), np.nan)
    if values is None:
        values = values_of(evaluator.evaluate("offline"))
    if metric.of_predictions and not on_all_rows and evaluator.complete is None:
        prediction = evaluator.predictions()
        if evaluator.rank == 0:
            errors = standard_errors(metric, prediction, evaluator.ledger, "select", evaluator.concat)
        if evaluator.world_size > 1:
            errors, *_ = broadcast_object_list([errors])
    return metric.checks(values, errors)


def standard_errors(
    metric: Metric,
    prediction: EvalPrediction,
    ledger: Ledger,
    purpose: str,
    concat: bool = True,
) -> np.ndarray:
    """[m]: standard errors of the numbers of the metric's `keys`, by the bootstrap (Efron, 1979).

    No forward pass, but `RESAMPLES` metric calls on rows drawn with replacement. nan where too few calls succeed.
    """
    drawn = np.empty((0, len(metric.keys)))
    generator = np.random.default_rng(0)
    for _ in range(RESAMPLES):
        size = num_rows(prediction, concat)
        rows = np.sort(generator.integers(size, size=size))
        try:
            with ledger.charge(purpose):
                score = metric(take_rows(prediction, rows, concat))
        except MetricError:  # a class may be missing
            continue
        drawn = np.vstack([drawn, values_of(score)])
    return drawn.std(0, ddof=1) if len(drawn) > RESAMPLES // 2 else np.full(len(metric.keys), np.nan)
