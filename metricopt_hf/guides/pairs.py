"""Pairs: the slope of the metric, from antithetic perturbations of the coordinates.

The simplest value function: locally linear, V(z) = slope . z, fitted by least squares to pairs of calls at z + e and
z - e (SPSA; Spall, 1992; evolution strategies). It needs nothing but a number for each set of predictions, so that it
serves rankings and regressions as well as decisions.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..evaluation.local_metric import LocalMetric
from .base import Guide

PAIRS = 8  # in an update


class PairsGuide(Guide):
    """Follows the slope of the last update's pairs.

    Args:
        count: pairs in an update, of two metric calls each.
    """

    def __init__(self, count: int = PAIRS):
        self.count = count
        self.slope: Tensor | None = None

    def fit(self, metric: LocalMetric, z: Tensor) -> None:
        metric.halve()
        offsets = metric.draw(self.count)
        values = metric.values(torch.cat([z + offsets, z - offsets]))
        self.slope = slope_of(values[: self.count] - values[self.count :], offsets)

    def gradient(self, z: Tensor) -> Tensor:
        return self.slope


def slope_of(differences: np.ndarray, offsets: Tensor) -> Tensor:
    """[k] from differences [n] of the metric at both ends of offsets [n, k]; those that are nan say nothing."""
    return torch.as_tensor(np.nan_to_num(differences), dtype=torch.float32) @ offsets
