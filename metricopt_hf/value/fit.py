"""Fitting a value function to observations: regression plus a pairwise ranking term."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ValueFunctionError
from .model import ValueNetwork, one_thread

LEARNING_RATE = 1e-2
WEIGHT_DECAY = 0.1
RANKING_WEIGHT = 1.0
RIDGE = 1.0  # penalty on the linear part, in standardised units: the weight of one observation
PAIRS_PER_STEP = 512  # drawn for the ranking term, whose cost would else grow with the square of the observations
BATCH_SIZE = 1024  # observations per step: full batch in an ordinary run, mini-batches beyond
MOST_RESIDUALS = 4096  # observations, evenly from all of them, whose residuals say how noisy they are


@one_thread()
def fit(
    network: ValueNetwork,
    z: Tensor,
    scores: Tensor,
    generator: torch.Generator,
    steps: int = 100,
    standardise: bool = True,
) -> None:
    """Fit in place, starting from the present weights (warm).

    Each member sees its own random reweighting of the observations (a Bayesian bootstrap), so that the spread of the
    ensemble shows where the observations do not settle the answer. The ranking term asks of every pair only which is
    better: a logistic loss on the difference, with the same weights.

    Args:
        network: changed in place.
        z: [n, k]. scores: [n].
        generator: the only source of randomness.
        steps: optimizer steps.
        standardise: take the standardisation from these observations. False: keep the present one, and with it the
            function that the weights stand for.

    Raises:
        ValueFunctionError: fewer than two observations, or something not finite.
    """
    if len(scores) < 2 or not (z.isfinite().all() and scores.isfinite().all()):
        raise ValueFunctionError(
            f"A fit needs at least two observations and finite numbers, got {len(scores)} observations."
        )
    scores, mean, std = scores.double(), network.score_mean, network.score_std
    if standardise:
        mean, std = scores.mean(), scores.std(correction=0).clamp_min(1e-8)
        with torch.no_grad():
            network.z_mean.copy_(z.mean(0))
            # one scale for all coordinates: they are one orthonormal system, and a scale each would bend its gradient
            network.z_std.fill_(z.std(0, correction=0).mean().clamp_min(1e-8))
            network.score_mean.fill_(mean)
            network.score_std.fill_(std)
    inputs, targets = z.float(), ((scores - mean) / std).float()
    n, members = len(targets), network.num_members
    weights = torch.empty(members, n).exponential_(generator=generator)

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
        network.noise_std.fill_(residual.std(correction=0))


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
