"""Constraints: what must hold of a metric's other numbers before the metric itself counts."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import ConfigurationError, brief

AT_LEAST, AT_MOST = ">=", "<="
_PART = re.compile(r"([^<>=!]+?)\s*([<>=!]=?|=<|=>)\s*(.+)")


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
