"""Tangent: how a summary of predictions moves with the coordinates, from the points at which it was taken anyway."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

DISCOUNT = 0.7  # of a round against the next one: phi moves, and rows differ from round to round
RIDGE = 1e-3  # of the mean variance of a coordinate: a round of few points does not span all of them


class Tangent:
    """s(z) = level + slope z, by least squares over rounds, whose differences within a round say what the slope is.

    Between rounds the rows differ, and with them the summary at the same z; so those differences only set the level.
    Near a centre outputs are taken to be linear in z (see `Interpolator`), and so is what is made of them.

    Args:
        num_coordinates: k, of z.
        size: m, of s.
    """

    def __init__(self, num_coordinates: int, size: int):
        self.weight = 0.0
        self.z, self.s = torch.zeros(num_coordinates), torch.zeros(size)  # discounted means over rounds
        self.moments = torch.zeros(num_coordinates, num_coordinates, dtype=torch.float64)
        self.products = torch.zeros(num_coordinates, size, dtype=torch.float64)
        self.slope = torch.zeros(size, num_coordinates)

    def update(self, z: np.ndarray, s: Tensor) -> None:
        """Take in a round. z: [n, k]; s: [n, m]."""
        z, s = torch.as_tensor(z, dtype=torch.float64), s.double()
        within, moved = z - z.mean(0), s - s.mean(0)
        self.moments = DISCOUNT * self.moments + within.T @ within / len(z)
        self.products = DISCOUNT * self.products + within.T @ moved / len(z)
        self.weight = DISCOUNT * self.weight + 1
        self.z = self.z + (z.mean(0).float() - self.z) / self.weight
        self.s = self.s + (s.mean(0).float() - self.s) / self.weight
        variance = self.moments.trace() / len(self.moments)
        if variance > 0:
            penalty = RIDGE * variance * torch.eye(len(self.moments), dtype=torch.float64)
            self.slope = torch.linalg.solve(self.moments + penalty, self.products).T.float().contiguous()

    def at(self, z: Tensor) -> Tensor:
        """The summary expected at z: [k] -> [m]."""
        return self.s.to(z.device) + self.slope.to(z.device) @ (z - self.z.to(z.device))

    def state_dict(self) -> dict[str, float | Tensor]:
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, float | Tensor]) -> None:
        vars(self).update({name: state[name] for name in vars(self)})
