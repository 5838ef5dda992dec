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
from .answer import ConstraintCheck, values_of
from .evaluator import Evaluator, agreed
from .linearization import Linearization
from .rows import num_rows, take_rows, unsplittable

HALVES = 16


def standard_error(evaluator: Evaluator, linear: Linearization, generator: torch.Generator) -> float:
    """Of the metric's value (`Metric.merit`) on the rows of a linearization, at its centre; 0 where it is not known."""
    halves = _halves(evaluator, linear.centre, generator, linear.batch_sizes)
    return _scatter(evaluator, [halves])


def paired_error(evaluator: Evaluator, first: EvalPrediction, second: EvalPrediction) -> float:
    """Of the difference of the metric's values on two predictions of the same rows; 0 where it is not known."""
    pair = [_halves(evaluator, p, torch.Generator().manual_seed(0), evaluator.batch_sizes) for p in (first, second)]
    return _scatter(evaluator, pair)


def _halves(
    evaluator: Evaluator, prediction: EvalPrediction, generator: torch.Generator, batch_sizes: Sequence[int] | None
) -> list[EvalPrediction]:
    """A prediction's random halves; none where examples cannot be told apart."""
    concat = evaluator.concat
    if unsplittable(prediction, concat, batch_sizes) is not None:
        return []
    count = num_rows(prediction, concat, batch_sizes)
    drawn = [torch.randperm(count, generator=generator)[: max(1, count // 2)] for _ in range(HALVES)]
    return [take_rows(prediction, np.sort(rows.numpy()), concat, batch_sizes) for rows in drawn]


def _scatter(evaluator: Evaluator, halves: Sequence[list[EvalPrediction]]) -> float:
    """Standard deviation of the metric on halves of a prediction, or of the difference between two predictions'."""
    if not all(halves):
        return 0.0

    def compute() -> float:
        found = np.array([[_value(evaluator, half) for half in of_one] for of_one in halves])
        found = found[0] if len(found) == 1 else found[0] - found[1]
        found = found[np.isfinite(found)]
        return float(found.std(ddof=1)) if len(found) > HALVES // 2 else 0.0

    error = agreed(evaluator.rank, evaluator.world_size, compute)
    if evaluator.rank:
        evaluator.ledger.add("noise", HALVES * len(halves), 0.0)
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
    if metric.of_predictions and not metric.batchwise and not on_all_rows and evaluator.complete is None:
        prediction = evaluator.predictions()
        errors = agreed(evaluator.rank, evaluator.world_size, lambda: _errors_of_keys(evaluator, prediction))
    return metric.checks(values, errors)


def _errors_of_keys(evaluator: Evaluator, prediction: EvalPrediction) -> np.ndarray:
    """[m]: standard errors of the numbers of the metric's `keys`; nan where too few calls succeed."""
    drawn: list[tuple[float, ...]] = []
    for half in _halves(evaluator, prediction, torch.Generator().manual_seed(0), evaluator.batch_sizes):
        try:
            drawn.append(values_of(evaluator.score(half, "noise")))
        except MetricError:
            continue
    keys = len(evaluator.metric.keys)
    return np.std(drawn, axis=0, ddof=1) if len(drawn) > HALVES // 2 else np.full(keys, np.nan)
