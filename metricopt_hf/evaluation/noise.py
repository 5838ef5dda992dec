"""How far the metric on a set would be off by the choice of its rows alone.

The scatter of the metric on random halves of the rows is about its standard error on all of them (as great as a
bootstrap's; Efron, 1979), and no row stands there twice, which a retrieval metric would praise.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from transformers import EvalPrediction

from ..errors import MetricError
from .answer import values_of
from .constraints import ConstraintCheck
from .evaluator import Evaluator
from .linearization import Linearization
from .ranks import agreed
from .rows import divisible, num_rows, take_rows

HALVES = 16


def standard_error(evaluator: Evaluator, linear: Linearization, generator: torch.Generator) -> float:
    """Of the metric's value (`Metric.merit`) on the rows of a linearization, at its centre; 0 where it is not known."""
    return _scatter(evaluator, [linear.centre], generator, lambda found: found[:, 0])


def paired_error(evaluator: Evaluator, first: EvalPrediction, second: EvalPrediction) -> float:
    """Of the difference of the metric's values on two predictions of the same rows; 0 where it is not known."""
    generator = torch.Generator().manual_seed(0)
    return _scatter(evaluator, [first, second], generator, lambda found: found[:, 0] - found[:, 1])


def _scatter(evaluator: Evaluator, predictions: Sequence[EvalPrediction], generator: torch.Generator, of) -> float:
    if evaluator.metric.batchwise or not divisible(predictions[0], evaluator.concat):
        return 0.0
    rows = num_rows(predictions[0], evaluator.concat)
    halves = [
        np.sort(torch.randperm(rows, generator=generator)[: max(1, rows // 2)].numpy()) for _ in range(HALVES)
    ]

    def compute() -> float:
        found = of(np.array([[_value(evaluator, take_rows(p, half, evaluator.concat)) for p in predictions] for half in halves]))
        found = found[np.isfinite(found)]
        return float(found.std(ddof=1)) if len(found) > HALVES // 2 else 0.0

    error = agreed(evaluator.rank, evaluator.world_size, compute)
    if evaluator.rank:
        evaluator.ledger.add("noise", HALVES * len(predictions), 0.0)
    return error


def _value(evaluator: Evaluator, prediction: EvalPrediction) -> float:
    try:
        return evaluator.metric.merit(evaluator.score(prediction, "noise"))
    except MetricError:  # a class may be missing
        return float("nan")


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
        errors = agreed(evaluator.rank, evaluator.world_size, lambda: _errors_of_keys(evaluator, prediction))
    return metric.checks(values, errors)


def _errors_of_keys(evaluator: Evaluator, prediction: EvalPrediction) -> np.ndarray:
    """[m]: standard errors of the numbers of the metric's `keys`; nan where too few calls succeed."""
    keys = len(evaluator.metric.keys)
    if evaluator.metric.batchwise or not divisible(prediction, evaluator.concat):
        return np.full(keys, np.nan)
    generator = torch.Generator().manual_seed(0)
    rows, drawn = num_rows(prediction, evaluator.concat), []
    for _ in range(HALVES):
        half = np.sort(torch.randperm(rows, generator=generator)[: max(1, rows // 2)].numpy())
        try:
            drawn.append(values_of(evaluator.score(take_rows(prediction, half, evaluator.concat), "noise")))
        except MetricError:
            continue
    return np.std(drawn, axis=0, ddof=1) if len(drawn) > HALVES // 2 else np.full(keys, np.nan)
