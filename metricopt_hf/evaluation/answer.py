"""From whatever a metric answers to a finite number, those that are wanted beside it, and what must hold of these."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from decimal import Decimal
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch

from ..errors import ConfigurationError, MetricError, brief

# The value function computes in float32, up to 3.4e38: a score beyond this is as little use as an infinite one.
LARGEST_SCORE = 1e30

# "0.7*f1 - 0.3*ece": each weight and the sign in front of it; what stands between two of them is a key
_WEIGHT = re.compile(r"([+-]?)\s*((?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*\*\s*")

AT_LEAST, AT_MOST = ">=", "<="
_PART = re.compile(r"([^<>=!]+?)\s*([<>=!]=?|=<|=>)\s*(.+)")


class Score(float):
    """A metric's number with others beside it; where none are wanted, scores are plain floats.

    Attributes:
        values: the numbers that were wanted beside it, in the order of the metric's `keys`.
    """

    values: tuple[float, ...]

    def __new__(cls, score: float, values: Sequence[float] = ()):
        made = super().__new__(cls, score)
        made.values = tuple(values)
        return made


def values_of(score: float) -> tuple[float, ...]:
    """The numbers beside a score."""
    return getattr(score, "values", ())


@functools.lru_cache(maxsize=64)
def weights_of(name: str) -> dict[str, float]:
    """The weights of several metrics, where a name is a weighted sum; else nothing.

    Example:
        >>> weights_of("0.7*f1 - 0.3*top-1"), weights_of("f1")
        ({'f1': 0.7, 'top-1': -0.3}, {})
    """
    found = list(_WEIGHT.finditer(name))
    if not found or found[0].start():
        return {}
    ends = [match.start() for match in found[1:]] + [len(name)]
    return {name[match.end() : end].strip(): float(match[1] + match[2]) for match, end in zip(found, ends, strict=True)}


def score_of(result: Any, name: str, exact: bool, keys: Sequence[str] = ()) -> float:
    """The number that `name` says, of what a metric called so answered, with those of `keys` beside it.

    Args:
        exact: whether a dict must have that key; else its only one will do.

    Raises:
        MetricError: there is no such number, or it is not finite.
    """
    if keys and not isinstance(result, Mapping):
        raise MetricError(
            f"The metric {name!r} returned {brief(result)}, and {', '.join(keys)} is wanted too: return a dict of "
            "numbers by name."
        )
    values = [number(look_up(result, key, True), key) for key in keys]
    weights = weights_of(name)
    if weights and isinstance(result, Mapping) and _key_in(result, name) is None:
        parts = [weight * number(look_up(result, key, True), key) for key, weight in weights.items()]
        score = number(sum(parts), name)
    else:
        score = number(look_up(result, name, exact), name)
    return Score(score, values) if keys else score


def look_up(result: Any, name: str, exact: bool) -> Any:
    """What a dict has under `name`, with or without Trainer's prefix; anything else is what it is."""
    if not isinstance(result, Mapping):
        return result
    key = _key_in(result, name)
    if key is None and len(result) == 1 and not exact:
        key = next(iter(result))
    if key is None:
        raise MetricError(
            f"The metric returned the keys {brief(list(result))}, none of which is {name!r}. Say which "
            'is meant: metric_for_best_model="..." with compute_metrics, else metric=Metric(function, "..."). Several '
            "are weighed as in 0.7*f1+0.3*recall; metric_constraints names keys too."
        )
    return result[key]


def _key_in(result: Mapping, name: str) -> Any:
    bare = name.removeprefix("eval_")
    return next((k for k in (name, bare, f"eval_{bare}") if k in result), None)


def plain(value: Any) -> Any:
    """Python's own bool, int or float for a number of any other type (numpy, torch, Fraction, Decimal); all else as is.

    Example:
        >>> plain(np.float32(0.5)), plain(torch.tensor(2)), plain(np.True_), plain("0.5"), plain([1])
        (0.5, 2, True, '0.5', [1])
    """
    if isinstance(value, (np.generic, np.ndarray, torch.Tensor)) and value.ndim == 0:
        if np.ma.is_masked(value) or getattr(value.dtype, "kind", "f") not in "fiub":
            return value
        value = value.item()
    if isinstance(value, (bool, int, float)) or not isinstance(value, (Real, Decimal, np.floating)):
        return value
    return int(value) if isinstance(value, Integral) else float(value)


def number(result: Any, name: str) -> float:
    """One finite number. Raises MetricError for anything else."""
    array = np.empty(0)
    with suppress(Exception):  # nested lists of unequal lengths; sparse, quantised, meta tensors; and so on
        one = isinstance(result, torch.Tensor) and result.numel() == 1
        array = np.asarray(plain(result.item() if one else result))
    if array.size != 1 or array.dtype.kind not in "fiub" or np.ma.is_masked(result):
        raise MetricError(
            f"The metric {name!r} must return one number, got {brief(result)}. Of one number per class, return the "
            'mean or the least (many `evaluate` modules do with metric_kwargs={"average": "macro"}).'
        )
    value = float(array.reshape(()))
    if not np.isfinite(value):
        raise MetricError(
            f"The metric {name!r} returned {value}, which is not a finite number. Return one also where it is not "
            "defined, as for a class without examples or without predictions (scikit-learn: zero_division=0)."
        )
    if abs(value) > LARGEST_SCORE:
        raise MetricError(
            f"The metric {name!r} returned {value:g}; numbers beyond {LARGEST_SCORE:g} cannot be learned from. Return "
            "its logarithm, or cut it off."
        )
    return value


# Constraints: what must hold of a metric's other numbers before the metric itself counts


@dataclass(frozen=True)
class Constraint:
    """A bound on one number of the dict that the metric returns.

    Attributes:
        key: of the dict.
        operator: ">=" or "<=".
        bound: the number it is compared with.
    """

    key: str
    operator: str
    bound: float

    @property
    def greater_is_better(self) -> bool:
        """Which way the number must go where the constraint does not hold."""
        return self.operator == AT_LEAST

    def shortfall(self, value: float) -> float:
        """By how much `value` misses the bound, relative to the bound (absolute where that is 0); 0 where it holds."""
        missing = self.bound - value if self.greater_is_better else value - self.bound
        return max(0.0, missing) / (abs(self.bound) or 1.0)

    def __str__(self) -> str:
        return f"{self.key}{self.operator}{self.bound:g}"


@dataclass(frozen=True)
class ConstraintCheck:
    """Whether a constraint held somewhere.

    Attributes:
        constraint: in words, such as "precision>=0.6".
        value: what the number was.
        holds: whether that is within the bound.
        noise: standard error of the number, from resampled rows; nan where there is nothing to resample.
    """

    constraint: str
    value: float
    holds: bool
    noise: float

    def __str__(self) -> str:
        noise = "" if math.isnan(self.noise) else f" ± {self.noise:.4f}"
        return f"{self.constraint} {'holds' if self.holds else 'does not hold'}: {self.value:.4f}{noise}"


def parse(text: str | None) -> tuple[Constraint, ...]:
    """Constraints from "precision>=0.6, ece<=0.05".

    Raises:
        ConfigurationError: it cannot be read so; quotes the part that cannot.

    Example:
        >>> [str(constraint) for constraint in parse("precision>=0.6, ece <= 5e-2")]
        ['precision>=0.6', 'ece<=0.05']
    """
    found: list[Constraint] = []
    for part in [] if text is None else text.split(","):
        match = _PART.fullmatch(part.strip())
        if match is None:
            raise ConfigurationError(
                f"metric_constraints: {brief(part.strip())} is no constraint. Write the key, {AT_LEAST} or {AT_MOST}, "
                'and a number, several with commas between: "precision>=0.6, ece<=0.05".'
            )
        key, operator, bound = match.groups()
        if operator not in (AT_LEAST, AT_MOST):
            raise ConfigurationError(
                f"metric_constraints: in {brief(part.strip())} the operator {operator!r} is none of {AT_LEAST}, "
                f"{AT_MOST}."
            )
        try:
            number = float(bound)
        except ValueError:
            number = math.nan
        if not math.isfinite(number):
            raise ConfigurationError(f"metric_constraints: in {brief(part.strip())} {bound!r} is no finite number.")
        if any((key, operator) == (other.key, other.operator) for other in found):
            raise ConfigurationError(f"metric_constraints: {key}{operator} stands there twice; keep the stricter one.")
        found.append(Constraint(key, operator, number))
    return tuple(found)


def shortfall(constraints: Sequence[Constraint], values: Sequence[float]) -> float:
    """Of all constraints together, by the values of their keys; 0 where all hold."""
    return sum(constraint.shortfall(value) for constraint, value in zip(constraints, values, strict=True))
