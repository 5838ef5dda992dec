"""Where the compact coordinates come from: Q is taken from the training loss at the start of the metric phase."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

from .phi import Coordinates, PhiSpace, gradient_pca, group_gradients, random_basis
from .phi.space import whole

# mini-batch gradients per coordinate: about the 128 for ten coordinates of the measurements behind the default
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
        return Coordinates(origin, None)
    if kind == "random":
        basis = random_basis(phi.dim, dim, generator)
    elif kind == "group_gradients":
        basis = group_gradients(loss_gradients(phi, group_batches(), loss, rank, world_size))
    else:
        batches = mini_batches(GRADIENTS_PER_COORDINATE * dim)
        basis = gradient_pca(loss_gradients(phi, batches, loss, rank, world_size), dim)
    return Coordinates(origin, basis.to(origin.device))


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
