"""Pairs: the slope of the metric, from antithetic perturbations of the coordinates.

The simplest value function: locally linear, V(z) = slope . z, fitted by least squares to pairs of calls at z + e and
z - e (SPSA; Spall, 1992; evolution strategies). It needs only a number for each set of predictions, and so serves
rankings and regressions as well as decisions.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..linear.local_metric import LocalMetric
from .base import Guide

PAIRS = 8  # per update


class PairsGuide(Guide):
    """Follows the slope of the last update's pairs.

    Args:
        count: pairs in an update, of two metric calls each.
    """

    def __init__(self, count: int = PAIRS):
        self.count = count
        self.slope: Tensor | None = None

    def fit(self, metric: LocalMetric, z: Tensor) -> None:
        values, offsets = observed_pairs(metric, z, self.count)
        self.slope = slope_of(values, offsets)

    def gradient(self, z: Tensor) -> Tensor:
        return self.slope


def observed_pairs(metric: LocalMetric, z: Tensor, count: int) -> tuple[np.ndarray, Tensor]:
    """([2n] values at both ends of random offsets from z, the first ends first, offsets [n, k]), on a half of the rows.

    Args:
        count: the most pairs; fewer where an update may not call as often.
    """
    metric.halve()
    offsets = metric.draw(max(1, int(min(count, metric.share // 2))))
    return metric.values(torch.cat([z + offsets, z - offsets])), offsets


def slope_of(values: np.ndarray, offsets: Tensor) -> Tensor:
    """Slope, [k], from the results of `observed_pairs`; values that are nan are left out."""
    differences = values[: len(offsets)] - values[len(offsets) :]
    return torch.as_tensor(np.nan_to_num(differences), dtype=torch.float32) @ offsets
