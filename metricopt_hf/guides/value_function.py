"""ValueFunctionGuide: an ensemble of networks from compact coordinates to the metric, and its gradient.

It is fitted anew to all that was observed at each update, which pays where a metric call costs a forward pass.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..evaluation.local_metric import LocalMetric
from ..value import ValueNetwork, fit
from .base import Guide, GuideContext
from .pairs import observed_pairs

PAIRS = 4  # in an update
MOST = 512  # the latest observations, which are fitted to


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
        self.z, self.values = np.zeros((0, context.dim), np.float32), np.zeros(0)

    def fit(self, metric: LocalMetric, z: Tensor) -> None:
        self.origin = metric.origin
        values, offsets = observed_pairs(metric, z, self.count)
        points = torch.cat([z + offsets, z - offsets])
        fine = np.isfinite(values)
        self.z = np.concatenate([self.z, (self.origin + points).numpy()[fine]])[-MOST:]
        self.values = np.concatenate([self.values, values[fine]])[-MOST:]
        if len(self.values) > 1:
            noise = np.full(len(self.values), np.nan)
            fit(self.network, self.z, self.values, noise, self.context.generator, standardise=not self.is_fitted)
            self.is_fitted = True

    def gradient(self, z: Tensor) -> Tensor:
        return self.network.gradient(self.origin + z)

    def predict(self, z: Tensor) -> float | None:
        return float(self.network.predict(self.origin + z)[0]) if self.is_fitted else None

    def state_dict(self) -> dict[str, Any]:
        return {
            "network": self.network.state_dict(),
            "is_fitted": self.is_fitted,
            "z": torch.as_tensor(self.z),
            "values": torch.as_tensor(self.values),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.network.load_state_dict(state["network"])
        self.is_fitted = state["is_fitted"]
        self.z, self.values = state["z"].numpy(), state["values"].numpy()
