"""ValueFunctionGuide: an ensemble of networks from compact coordinates to the metric, and its gradient.

Each update fits it to all observations so far, which pays where a metric call costs a forward pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..linear.local_metric import LocalMetric
from ..value import ValueNetwork, fit
from .base import Guide, GuideContext
from .pairs import observed_pairs

PAIRS = 4  # per update
MOST = 512  # latest observations in a fit


class ValueFunctionGuide(Guide):
    """Follows the gradient of a value network.

    Args:
        count: antithetic pairs in an update, of two metric calls each.
    """

    def __init__(self, count: int = PAIRS):
        self.count = count

    def start(self, context: GuideContext) -> None:
        super().start(context)
        self.network = ValueNetwork.started(context.dim, context.network, context.generator)
        self.is_fitted = context.network is not None
        self.origin = torch.zeros(context.dim)
        self.z, self.values = torch.zeros(0, context.dim), torch.zeros(0)

    def fit(self, metric: LocalMetric, z: Tensor) -> None:
        self.origin = metric.origin
        values, offsets = observed_pairs(metric, z, self.count)
        points, values = self.origin + torch.cat([z + offsets, z - offsets]), torch.as_tensor(values)
        fine = values.isfinite()
        self.z = torch.cat([self.z, points[fine]])[-MOST:]
        self.values = torch.cat([self.values, values[fine]])[-MOST:]
        if len(self.values) > 1:
            fit(self.network, self.z, self.values, self.context.generator, standardise=not self.is_fitted)
            self.is_fitted = True

    def gradient(self, z: Tensor) -> Tensor:
        return self.network.gradient(self.origin + z)

    def state_dict(self) -> dict[str, Any]:
        return {
            "network": self.network.state_dict(),
            "is_fitted": self.is_fitted,
            "z": self.z,
            "values": self.values,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.network.load_state_dict(state["network"])
        self.is_fitted = state["is_fitted"]
        self.z, self.values = state["z"], state["values"]
