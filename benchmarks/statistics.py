"""Paired differences over seeds and items, and what is left of them when many are looked at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import t as student_t

LEVEL = 0.95


@dataclass(frozen=True)
class Paired:
    """A paired difference; positive is better.

    Attributes:
        mean: over the seeds.
        error: standard error, from a bootstrap over seeds and items.
        low, high: 95 % interval (Student's t); nan for one seed.
        p: two-sided, of no difference; nan for one seed.
        seeds: how many.
    """

    mean: float
    error: float
    low: float
    high: float
    p: float
    seeds: int


def bootstrap_error(differences: np.ndarray) -> float:
    """Standard error of the mean over seeds, by a bootstrap over seeds and items.

    In each redraw the items are drawn once, for all seeds alike, and the seeds with replacement. Of the redraws of the
    seeds the limit of infinitely many is taken, which has a closed form: for each draw of the items the variance of a
    mean of n, averaged, and the variance of these means over the draws. Conservative: where seeds have other items,
    their scatter holds the items' once already.

    Args:
        differences: [n seeds, draws of the items].

    Example:
        >>> bootstrap_error(np.array([[1.0, 1.0], [3.0, 3.0]]))  # no scatter of the items: 1.41 / sqrt(2)
        1.0
    """
    n = len(differences)
    if n < 2:
        return float("nan")
    seeds = differences.var(axis=0, ddof=1).mean() / n
    items = differences.mean(axis=0).var(ddof=1) if differences.shape[1] > 1 else 0.0
    return float(np.sqrt(seeds + items))


def paired(scores: Sequence[float], items: np.ndarray, sign: int = 1) -> Paired:
    """
    Args:
        scores: [n] differences, one per seed.
        items: [n, draws] the same on draws of the items.
        sign: -1 where smaller scores are better.
    """
    scores = np.asarray(scores, dtype=float) * sign
    n, mean, error = len(scores), float(scores.mean()), bootstrap_error(np.asarray(items, dtype=float))
    if n < 2:
        return Paired(mean, error, error, error, error, n)
    half = float(student_t.ppf((1 + LEVEL) / 2, n - 1)) * error
    if error == 0:
        p = 1.0 if mean == 0 else 0.0
    else:
        p = float(2 * student_t.sf(abs(mean) / error, n - 1))
    return Paired(mean, error, mean - half, mean + half, p, n)


def holm(p: Sequence[float]) -> list[float]:
    """p-values corrected for looking at all of them (Holm, 1979), in the order given.

    Example:
        >>> holm([0.01, 0.04, 0.03])
        [0.03, 0.06, 0.06]
    """
    order, corrected, greatest = np.argsort(p), [0.0] * len(p), 0.0
    for rank, i in enumerate(order):
        greatest = max(greatest, min(1.0, (len(p) - rank) * p[i]))
        corrected[i] = greatest
    return corrected
