"""Calibration: how far predictions of new observations were off, so that the spread says it of the next ones.

What an ensemble was fitted to it predicts too well, and its members err alike. So the noise is taken from errors made
*before* the guide was fitted to them (prequential, as for `Trust`), pooled over rounds.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy.stats import norm

from ..evaluation.trajectory import Trajectory
from ..value import ValueNetwork

LEVEL = 0.9  # of the intervals that `coverage` is about
# Weight of a round against the next one: a short memory, since errors shrink as observations come in.
DISCOUNT = 0.7


@dataclass
class Calibration:
    """Pools squared prediction errors over rounds.

    Attributes:
        evidence: discounted number of rounds.
        variance_sum: the same sum with each round times its mean squared error less the variance among the members
            (score unit squared).
        coverage: share of the last round inside the intervals that were predicted for it; None before there was one.
    """

    evidence: float = 0.0
    variance_sum: float = 0.0
    coverage: float | None = None

    def update(self, network: ValueNetwork, latest: Trajectory) -> None:
        """Take in one round, before the value function is fitted to it."""
        mean, std = (t.double().numpy() for t in network.predict(torch.as_tensor(latest.z)))
        error = np.abs(latest.scores - mean)
        self.coverage = float((error <= norm.ppf((1 + LEVEL) / 2) * std).mean())
        disagreement = std**2 - network.noise**2
        self.evidence = DISCOUNT * self.evidence + 1
        self.variance_sum = DISCOUNT * self.variance_sum + float((error**2 - disagreement).mean())

    def apply(self, network: ValueNetwork) -> None:
        """Set the value function's noise to what the errors say, where there are any."""
        if self.evidence:
            network.noise = max(self.variance_sum / self.evidence, 0.0) ** 0.5
