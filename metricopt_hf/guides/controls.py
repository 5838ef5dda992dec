"""Controls: guides that know nothing, which ours must beat."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..evaluation.trajectory import Trajectory
from .base import DirectionGuide, GuideContext
from .value_function import ValueFunctionGuide


class RandomGuide(DirectionGuide):
    """A random direction in the same coordinates, drawn anew at each fit and kept until the next.

    It has to persist: one drawn anew at every step would be averaged away by Adam.
    """

    def start(self, context: GuideContext) -> None:
        super().start(context)
        self.vector: Tensor | None = None

    def predict(self, z: np.ndarray) -> np.ndarray | None:
        return None if self.vector is None else z @ self.vector.numpy()

    def fit(self, trajectory: Trajectory) -> None:
        vector = torch.randn(self.context.coordinates.dim, generator=self.context.generator)
        self.vector = vector / vector.norm()

    def ascent(self, phi: Tensor) -> Tensor:
        return self.context.coordinates.lift(self.vector.to(phi.device))

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "vector": self.vector}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.vector = state["vector"]


class ShuffledGuide(ValueFunctionGuide):
    """A value function that is fitted to the same observations with their scores shuffled anew at each fit."""

    def scores(self, trajectory: Trajectory) -> np.ndarray:
        return trajectory.scores[torch.randperm(len(trajectory), generator=self.context.generator).numpy()]
