"""Controls: guides that know nothing. The gains that they reach are not due to the metric."""

from __future__ import annotations

import torch
from torch import Tensor

from ..linear.local_metric import LocalMetric
from .base import Guide, GuideContext
from .pairs import PairsGuide, observed_pairs, slope_of


class ShuffledGuide(PairsGuide):
    """Makes the calls of `PairsGuide`, and learns from their values in a random order."""

    def fit(self, metric: LocalMetric, z: Tensor) -> None:
        values, offsets = observed_pairs(metric, z, self.count)
        self.slope = slope_of(values[torch.randperm(len(values), generator=self.context.generator).numpy()], offsets)


class RandomGuide(Guide):
    """Follows one random direction all the time: one drawn anew at each update would average out."""

    def start(self, context: GuideContext) -> None:
        super().start(context)
        self.direction = torch.randn(context.dim, generator=context.generator)

    def fit(self, metric: LocalMetric, z: Tensor) -> None:
        pass

    def gradient(self, z: Tensor) -> Tensor:
        return self.direction

    def state_dict(self) -> dict[str, Tensor]:
        return {"direction": self.direction}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.direction = state["direction"]
