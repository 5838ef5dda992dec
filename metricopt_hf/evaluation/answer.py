"""The one finite number in the result of a metric."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from contextlib import suppress
from decimal import Decimal
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch

from ..errors import MetricError, brief

# The value function computes in float32, up to 3.4e38; it cannot use a score beyond this.
LARGEST_SCORE = 1e30

# "0.7*f1 - 0.3*ece": each weight with its sign; a key stands between two of them
_WEIGHT = re.compile(r"([+-]?)\s*((?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*\*\s*")


@functools.lru_cache(maxsize=64)
def weights_of(name: str) -> dict[str, float]:
    """The weight of each metric, where a name is a weighted sum; else an empty dict.

    Example:
        >>> weights_of("0.7*f1 - 0.3*top-1"), weights_of("f1")
        ({'f1': 0.7, 'top-1': -0.3}, {})
    """
    found = list(_WEIGHT.finditer(name))
    if not found or found[0].start():
        return {}
    ends = [match.start() for match in found[1:]] + [len(name)]
    return {name[match.end() : end].strip(): float(match[1] + match[2]) for match, end in zip(found, ends, strict=True)}


def score_of(result: Any, name: str, exact: bool) -> float:
    """Extract the score `name` from a metric's result.

    Args:
        exact: whether a dict must have that key; else its only one will do.

    Raises:
        MetricError: there is no such number, or it is not finite.
    """
    weights = weights_of(name)
    if weights and isinstance(result, Mapping) and _key_in(result, name) is None:
        return number(sum(w * number(look_up(result, key, True), key) for key, w in weights.items()), name)
    return number(look_up(result, name, exact), name)


def look_up(result: Any, name: str, exact: bool) -> Any:
    """The entry `name` of a dict, with or without Trainer's prefix; a result that is no dict is returned as it is."""
    if not isinstance(result, Mapping):
        return result
    key = _key_in(result, name)
    if key is None and len(result) == 1 and not exact:
        key = next(iter(result))
    if key is None:
        raise MetricError(
            f"The metric returned the keys {brief(list(result))}, none of which is {name!r}. Name the "
            'one to optimise: metric_for_best_model="..." with compute_metrics, else metric=Metric(function, "..."). '
            "Several can be weighed, as in 0.7*f1+0.3*recall."
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
            f"The metric {name!r} must return one number, got {brief(result)}. If it has one number per class, return "
            'the mean or the least (many `evaluate` modules do with metric_kwargs={"average": "macro"}).'
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
