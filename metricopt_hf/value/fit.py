"""Fitting a value function to observations: weighted regression plus a pairwise ranking term."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ValueFunctionError
from .model import ValueNetwork, one_thread

LEARNING_RATE = 1e-2
WEIGHT_DECAY = 0.1
RANKING_WEIGHT = 1.0
RIDGE = 1.0  # of the linear part, in standardised units: as much as one observation says
# standardised variance added to every observation's, so that a round that looks noiseless does not drown the others
VARIANCE_FLOOR = 0.3
# and the most: what is beyond it weighs nothing as it is, and would not fit into float32
MOST_NOISE = 1e30
# pairs drawn per step for the ranking term, so that its cost does not grow with the square of the observations
PAIRS_PER_STEP = 512
# observations per step: full batch in an ordinary run, mini-batches beyond
BATCH_SIZE = 1024
# observations, evenly from all of them, whose residuals say how noisy they are
MOST_RESIDUALS = 4096


@dataclass(frozen=True)
class FitReport:
    """What a fit did: optimizer steps, last regression loss (standardised) and ranking loss (nats per pair)."""

    steps: int
    regression_loss: float
    ranking_loss: float


def _fit_linear_part(network: ValueNetwork, inputs: Tensor, targets: Tensor, weights: Tensor) -> None:
    """Ridge regression in closed form: the slopes and intercepts of all members at once. weights: [members, n]."""
    h = (inputs - network.z_mean) / network.z_std
    design = torch.cat([h, torch.ones(len(h), 1)], 1).double()
    penalty = torch.eye(design.shape[1], dtype=torch.float64)
    penalty[-1, -1] = 1e-6  # the intercept is free
    moments = torch.einsum("mn,ni,nj->mij", weights.double(), design, design) + RIDGE * penalty
    solution = torch.linalg.solve(moments, torch.einsum("mn,ni,n->mi", weights.double(), design, targets.double()))
    with torch.no_grad():
        network.slopes.copy_(solution[:, :-1, None])
        network.intercepts.copy_(solution[:, -1:, None])


@one_thread()
def fit(
    network: ValueNetwork,
    z: np.ndarray,
    scores: np.ndarray,
    variances: np.ndarray,
    generator: torch.Generator,
    steps: int = 100,
    standardise: bool = True,
) -> FitReport:
    """Fit in place, starting from the present weights (warm).

    Regression is weighted by 1 / (variance + floor). Each member sees its own random reweighting of the
    observations (a Bayesian bootstrap), so that the spread of the ensemble shows where the observations do not
    settle the answer. The ranking term asks of every pair only which is better: a logistic loss on the difference,
    with the same weights.

    Args:
        network: changed in place.
        z: [n, k]. scores: [n]. variances: [n], nan where unknown (then the mean of the known ones is taken).
        generator: the only source of randomness.
        steps: optimizer steps.
        standardise: take the standardisation from these observations. False: keep the present one, and with it the
            function that the weights stand for.

    Raises:
        ValueFunctionError: fewer than two observations, or something not finite.
    """
    if len(scores) < 2 or not (np.isfinite(z).all() and np.isfinite(scores).all()):
        raise ValueFunctionError(
            f"A fit needs at least two observations and finite numbers, got {len(scores)} observations."
        )
    known = np.isfinite(variances)
    noise = np.where(known, variances, variances[known].mean() if known.any() else 0.0)
    if standardise:
        with torch.no_grad():
            network.z_mean.copy_(torch.as_tensor(z.mean(0)))
            # one scale for all coordinates: they are one orthonormal system, and a scale each would bend its gradient
            network.z_std.fill_(max(float(z.std(0).mean()), 1e-8))
            network.score_mean.fill_(float(scores.mean()))
            network.score_std.fill_(max(float(scores.std()), 1e-8))
        score_mean, score_std = scores.mean(), max(float(scores.std()), 1e-8)
    else:
        score_mean, score_std = float(network.score_mean), float(network.score_std)

    inputs = torch.as_tensor(z, dtype=torch.float32)
    targets = torch.as_tensor((scores - score_mean) / score_std, dtype=torch.float32)
    noise = torch.as_tensor(np.minimum(noise / score_std**2, MOST_NOISE), dtype=torch.float32)
    weights = 1 / (noise + VARIANCE_FLOOR)
    n, members = len(targets), network.num_members
    bootstrap = torch.empty(members, n).exponential_(generator=generator)
    weights = weights / weights.mean() * bootstrap

    if standardise:
        _fit_linear_part(network, inputs, targets, weights)
    # fused: these networks are so small that the optimizer's bookkeeping is a good part of a step
    optimizer = torch.optim.AdamW(network.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True)
    for _ in range(steps):
        rows = torch.arange(n) if n <= BATCH_SIZE else torch.randint(n, (BATCH_SIZE,), generator=generator)
        target, weight = targets[rows], weights[:, rows]
        predicted = network(inputs[rows])
        regression = (weight * (predicted - target) ** 2).mean()
        first, second = torch.randint(len(rows), (2, PAIRS_PER_STEP), generator=generator)
        order = torch.sign(target[first] - target[second])
        pair_weight = (weight[:, first] * weight[:, second]).sqrt() * order.abs()
        ranking = (pair_weight * F.softplus(-order * (predicted[:, first] - predicted[:, second]))).mean()
        optimizer.zero_grad()
        (regression + RANKING_WEIGHT * ranking).backward()
        optimizer.step()

    with torch.no_grad():
        rows = slice(None, None, -(-n // MOST_RESIDUALS))
        residual = network(inputs[rows]).mean(0) - targets[rows]
        network.noise_std.fill_(float(residual.std(correction=0)))
    return FitReport(steps, float(regression.detach()), float(ranking.detach()))
