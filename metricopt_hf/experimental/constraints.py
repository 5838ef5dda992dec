"""Constraints: bounds on the other numbers that a metric returns, as a penalty on the metric itself.

In `docs/results/constraints.md` this reaches no more than its shuffled control.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import EvalPrediction

from ..errors import ConfigurationError, brief
from ..evaluation.answer import look_up, number, score_of
from ..evaluation.metric import Metric
from ..linear.rows import num_rows, take_rows, unsplittable

AT_LEAST, AT_MOST = ">=", "<="
HALVES = 16  # random halves of the rows, whose scatter is a number's standard error
_PART = re.compile(r"([^<>=!]+?)\s*([<>=!]=?|=<|=>)\s*(.+)")


@dataclass(frozen=True)
class Constraint:
    """A bound on one number of the dict that the metric returns: its key, ">=" or "<=", and the bound."""

    key: str
    operator: str
    bound: float

    def shortfall(self, value: float) -> float:
        """By how much `value` misses the bound, relative to the bound (absolute where that is 0); 0 where it holds."""
        missing = self.bound - value if self.operator == AT_LEAST else value - self.bound
        return max(0.0, missing) / (abs(self.bound) or 1.0)

    def __str__(self) -> str:
        return f"{self.key}{self.operator}{self.bound:g}"


@dataclass(frozen=True)
class ConstraintCheck:
    """Whether a constraint holds on some predictions.

    Attributes:
        constraint: the bound.
        value: the number that it bounds.
        error: standard error of that number by the choice of rows; nan where rows cannot be resampled.
    """

    constraint: Constraint
    value: float
    error: float

    @property
    def holds(self) -> bool:
        """Whether the number is within the bound."""
        return self.constraint.shortfall(self.value) == 0

    def __str__(self) -> str:
        error = "" if math.isnan(self.error) else f" ± {self.error:.4f}"
        return f"{self.constraint} {'holds' if self.holds else 'does not hold'}: {self.value:.4f}{error}"


def parse(text: str) -> tuple[Constraint, ...]:
    """Constraints from "precision>=0.6, ece<=0.05".

    Raises:
        ConfigurationError: a part is no constraint; the message quotes it.

    Example:
        >>> [str(constraint) for constraint in parse("precision>=0.6, ece <= 5e-2")]
        ['precision>=0.6', 'ece<=0.05']
    """
    found: dict[tuple[str, str], Constraint] = {}
    for part in map(str.strip, text.split(",")):
        key, operator, bound = match.groups() if (match := _PART.fullmatch(part)) else ("", "", "")
        try:
            limit = float(bound)
        except ValueError:
            limit = math.nan
        if operator not in (AT_LEAST, AT_MOST) or not math.isfinite(limit) or (key, operator) in found:
            raise ConfigurationError(
                f"{brief(part)} is no constraint, or stands there twice. Write a key, {AT_LEAST} or {AT_MOST}, and a "
                'finite number, several with commas between: "precision>=0.6, ece<=0.05".'
            )
        found[key, operator] = Constraint(key, operator, limit)
    return tuple(found.values())


def constrained(metric: Metric, constraints: str, penalty: float = 10.0) -> Metric:
    """A copy of a metric that gets worse by how far the bounds on its other numbers are missed.

    Args:
        metric: its function returns a dict, which holds the numbers that are bounded.
        constraints: see `parse`.
        penalty: cost of a bound that is missed by its own size, in the metric's unit.

    Raises:
        ConfigurationError: see `parse`.

    Example:
        >>> metric = Metric(lambda prediction: {"recall": 0.7, "precision": 0.5}, "recall")
        >>> round(constrained(metric, "precision>=0.6")(EvalPrediction(np.eye(2), np.arange(2))), 3)
        -0.967
    """
    bounds, made = parse(constraints), copy.copy(metric)

    def function(*args: Any, **kwargs: Any) -> float:
        result = metric.function(*args, **kwargs)
        missed = sum(bound.shortfall(value) for bound, value in zip(bounds, _values(result, bounds), strict=True))
        return score_of(result, metric.name, metric.exact) - metric.sign * penalty * missed

    made.function, made.name = function, f"{metric.name} with {', '.join(map(str, bounds))}"
    return made


def check(metric: Metric, constraints: str, prediction: Any) -> tuple[ConstraintCheck, ...]:
    """Which constraints hold for predictions, such as those of `trainer.predict(rows)`.

    Args:
        metric: as `constrained` takes it, of predictions.
        prediction: has `predictions` and `label_ids`.

    Raises:
        MetricError: the metric lacks one of the numbers.
    """
    bounds, prediction = parse(constraints), EvalPrediction(prediction.predictions, prediction.label_ids)
    generator, drawn = np.random.default_rng(0), []
    if unsplittable(prediction) is None:
        count = num_rows(prediction)
        rows = [np.sort(generator.permutation(count)[: max(1, count // 2)]) for _ in range(HALVES)]
        drawn = [_values(metric.function(take_rows(prediction, half)), bounds) for half in rows]
    errors = np.std(drawn, axis=0, ddof=1) if drawn else [math.nan] * len(bounds)
    values = _values(metric.function(prediction), bounds)
    return tuple(map(ConstraintCheck, bounds, values, map(float, errors)))


def _values(result: Any, bounds: Sequence[Constraint]) -> list[float]:
    """The bounded numbers in the result of a metric's function. Raises MetricError where one is missing."""
    return [number(look_up(result if isinstance(result, Mapping) else {}, b.key, True), b.key) for b in bounds]
