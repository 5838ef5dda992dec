"""Standard errors of the metric on a set by the choice of its rows.

The scatter of the metric on random halves of the rows is about its standard error on all of them (as large as a
bootstrap's; Efron, 1979), and holds no row twice, which a retrieval metric would reward.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from transformers import EvalPrediction

from ..evaluation.evaluator import Evaluator, agreed
from .linearization import Linearization
from .rows import groups_of, half_of, take_rows, unsplittable

HALVES = 16


def standard_error(evaluator: Evaluator, linear: Linearization, generator: torch.Generator) -> float:
    """Standard error of the metric on the rows of a linearization, at its centre; 0 where it is not known."""
    halves = _halves(evaluator, linear.centre, generator, linear.batch_sizes)
    return _scatter(evaluator, [halves])


def paired_error(evaluator: Evaluator, first: EvalPrediction, second: EvalPrediction) -> float:
    """Standard error of the metric's difference between two predictions of the same rows; 0 where it is not known."""
    pair = [_halves(evaluator, p, torch.Generator().manual_seed(0), evaluator.batch_sizes) for p in (first, second)]
    return _scatter(evaluator, pair)


def _halves(
    evaluator: Evaluator, prediction: EvalPrediction, generator: torch.Generator, batch_sizes: Sequence[int] | None
) -> list[EvalPrediction]:
    """Random halves of a prediction; none where rows are not examples."""
    concat = evaluator.concat
    if unsplittable(prediction, concat, batch_sizes) is not None:
        return []
    groups = groups_of(prediction, evaluator.row_groups, concat, batch_sizes)
    return [take_rows(prediction, half_of(groups, generator), concat, batch_sizes) for _ in range(HALVES)]


def _scatter(evaluator: Evaluator, halves: Sequence[list[EvalPrediction]]) -> float:
    """Standard deviation of the metric on halves of a prediction, or of the difference between two predictions'."""
    if not all(halves):
        return 0.0

    def compute() -> float:
        found = np.array([[evaluator.value(half, "noise") for half in of_one] for of_one in halves])
        found = found[0] if len(found) == 1 else found[0] - found[1]
        found = found[np.isfinite(found)]  # it fails where a class is missing
        return float(found.std(ddof=1)) if len(found) > HALVES // 2 else 0.0

    error = agreed(evaluator.rank, evaluator.world_size, compute)
    if evaluator.rank:
        evaluator.ledger.add("noise", HALVES * len(halves), 0.0)
    return error
