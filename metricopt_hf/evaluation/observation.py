"""One observation of the metric: the record that everything else passes on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Observation:
    """The metric at one point.

    Attributes:
        z: [k] float32, the point's compact coordinates.
        score: the metric there, in its own unit; which way is better is the metric's business.
        variance: estimated variance of `score` that z does not explain (score unit squared), nan if unknown.
        step: optimizer step at which it was taken; observations of one step are one round.
        cost: seconds that the forward passes and the metric call took.
        raw: the numbers of the metric's `keys` beside its score, each in its own unit.
    """

    z: np.ndarray
    score: float
    variance: float
    step: int
    cost: float
    raw: tuple[float, ...] = ()
