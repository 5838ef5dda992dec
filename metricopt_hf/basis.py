"""Where the compact coordinates come from: Q is taken from the training loss at the start of the metric phase."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import Tensor

from .phi import Coordinates, PhiSpace, gradient_pca, group_gradients, random_basis
from .phi.space import whole
from .value import ValueFunction

logger = logging.getLogger(__name__)

# mini-batch gradients per coordinate: as in the measurements behind the default
GRADIENTS_PER_COORDINATE = 12


def make_coordinates(
    kind: str,
    phi: PhiSpace,
    dim: int,
    generator: torch.Generator,
    mini_batches: Callable[[int], Iterable[Any]],
    group_batches: Callable[[], Iterable[Any]],
    loss: Callable[[Any], Tensor],
    rank: int = 0,
    world_size: int = 1,
) -> Coordinates:
    """Coordinates at the present phi, the same on every rank.

    Args:
        kind: "gradient_pca", "group_gradients", "random" or "identity".
        dim: how many (of group gradients: as many as there are groups; identity: all of phi).
        mini_batches: count -> that many batches of training data.
        group_batches: -> one batch per group (class).
        loss: batch -> the training loss, differentiable in phi.
    """
    origin = phi.read()
    if kind == "identity":
        return Coordinates(origin, None, kind)
    if kind == "random":
        basis = random_basis(phi.dim, dim, generator)
    elif kind == "group_gradients":
        basis = group_gradients(loss_gradients(phi, group_batches(), loss, rank, world_size))
    else:
        batches = mini_batches(GRADIENTS_PER_COORDINATE * dim)
        basis = gradient_pca(loss_gradients(phi, batches, loss, rank, world_size), dim)
    return Coordinates(origin, basis.to(origin.device), kind)


def shared_coordinates(value_function: ValueFunction, phi: PhiSpace) -> Coordinates:
    """The coordinates that a value function was learned in. phi may start elsewhere: z is relative to its origin."""
    domain, here = value_function.domain, phi.read()
    basis = None if domain.basis is None else domain.basis.to(here.device)
    coordinates = Coordinates(domain.origin.to(here.device), basis, domain.coordinates)
    if len(value_function.observations):
        z, known = coordinates.encode(here).cpu().numpy(), value_function.observations.z
        low, high = known.min(0), known.max(0)
        away = float((np.maximum(low - z, z - high) / np.maximum(high - low, 1e-8)).max())
        if away > 1:
            logger.warning(
                f"This run starts {away:.1f} times the observed range away from all that the value function given has "
                "seen, so it has to learn anew: is this the model, and the start, that it was learned on?"
            )
    return coordinates


def loss_gradients(
    phi: PhiSpace, batches: Iterable[Any], loss: Callable[[Any], Tensor], rank: int = 0, world_size: int = 1
) -> Tensor:
    """Gradients of the loss with respect to phi, [batches, d] on the CPU, computed by the ranks in turn."""
    rows = []
    for i, batch in enumerate(batches):
        if i % world_size == rank:
            parameters = phi.parameters
            gradients = torch.autograd.grad(loss(batch), parameters, allow_unused=True)
            full = [torch.zeros_like(p) if g is None else g for g, p in zip(gradients, parameters, strict=True)]
            rows.append((i, torch.cat([whole(g).reshape(-1).float() for g in full]).cpu()))
    if world_size > 1:
        rows = sorted(gather_object(rows), key=lambda row: row[0])
    return torch.stack([row for _, row in rows])
