"""Compact coordinates z = Q^T (phi - phi_0): what the value function sees. phi itself moves freely.

On some hundred raw parameters a value function fitted to a hundred observations predicts nothing; on a handful of
directions in which the training loss actually pulls, it does. So Q is taken from the loss at the start of the phase.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

from .space import PhiSpace, is_sharded, reshard

logger = logging.getLogger(__name__)

KINDS = ("gradient_pca", "group_gradients", "random", "identity")
GIVEN = "given"  # a basis that was not found here
# mini-batch gradients per coordinate: as in the measurements behind the default
GRADIENTS_PER_COORDINATE = 12


@dataclass(frozen=True)
class Coordinates:
    """An origin and an orthonormal basis in phi.

    Attributes:
        origin: [d] float32, phi_0.
        basis: [d, k] float32 with orthonormal columns, or None for the identity (k = d).
        kind: how the basis was found, for the record.
    """

    origin: Tensor
    basis: Tensor | None
    kind: str = GIVEN

    @property
    def dim(self) -> int:
        """k, the number of coordinates."""
        return self.origin.numel() if self.basis is None else self.basis.shape[1]

    def encode(self, phi: Tensor) -> Tensor:
        """phi: [d] -> z: [k]."""
        offset = phi - self.origin
        return offset if self.basis is None else self.basis.T @ offset

    def lift(self, z: Tensor) -> Tensor:
        """A step in the coordinates, [k], as a step in phi, [d]."""
        return z if self.basis is None else self.basis @ z

    def leading(self, count: int) -> Coordinates:
        """The first `count` of them, or all where there are no more."""
        if count >= self.dim:
            return self
        basis = torch.eye(self.dim, device=self.origin.device) if self.basis is None else self.basis
        return Coordinates(self.origin, basis[:, :count], self.kind)


def gradient_pca(gradients: Tensor, dim: int) -> Tensor | None:
    """The leading `dim` right singular vectors of mini-batch gradients [n, d], uncentred: a basis [d, <= dim].

    Uncentred, because the mean gradient is the one direction that training is sure to take. Batches whose loss or
    gradient was nan or infinite are left out; None where no other has a gradient at all.
    """
    gradients = gradients[gradients.isfinite().all(1) & (gradients != 0).any(1)]
    if not len(gradients):
        return None
    _, singular_values, rows = torch.linalg.svd(gradients.double(), full_matrices=False)
    rank = int((singular_values > singular_values[0] * 1e-7).sum())
    return rows[: min(dim, rank)].T.float().contiguous()


def group_gradients(gradients: Tensor) -> Tensor | None:
    """An orthonormal basis [d, <= groups] of the span of one loss gradient per group, [groups, d]; None as above.

    Each gradient is scaled to unit norm first, so that no group is lost beside a louder one.
    """
    norms = gradients.norm(dim=1, keepdim=True)
    return gradient_pca(gradients / norms.clamp_min(1e-12), len(gradients))


def random_basis(phi_dim: int, dim: int, generator: torch.Generator) -> Tensor:
    """A random orthonormal basis [phi_dim, min(dim, phi_dim)]."""
    matrix = torch.randn(phi_dim, min(dim, phi_dim), generator=generator, dtype=torch.float64)
    return torch.linalg.qr(matrix).Q.float()


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
    dim, basis = min(dim, phi.dim), None
    if kind == "group_gradients":
        basis = group_gradients(loss_gradients(phi, group_batches(), loss, rank, world_size))
    elif kind == "gradient_pca":
        batches = mini_batches(GRADIENTS_PER_COORDINATE * dim)
        basis = gradient_pca(loss_gradients(phi, batches, loss, rank, world_size), dim)
    if basis is None:
        if kind != "random":
            logger.warning(
                f"coordinates={kind!r} found no batch whose loss has a finite gradient at phi other than 0 (a loss "
                "that is nan, or has reached 0?): the coordinates are random directions instead."
            )
        kind, basis = "random", random_basis(phi.dim, dim, generator)
    return Coordinates(origin, basis.to(origin.device), kind)


def loss_gradients(
    phi: PhiSpace, batches: Iterable[Any], loss: Callable[[Any], Tensor], rank: int = 0, world_size: int = 1
) -> Tensor:
    """Gradients of the loss with respect to phi, [batches, d] on the CPU, computed by the ranks in turn.

    Of a sharded model all ranks compute each of them.
    """
    sharded, rows = is_sharded(phi.model), []
    for i, batch in enumerate(batches):
        if sharded:
            rows.append((i, _sharded_gradient(phi, batch, loss).cpu()))
        elif i % world_size == rank:
            parameters = phi.parameters
            gradients = torch.autograd.grad(loss(batch), parameters, allow_unused=True)
            full = [torch.zeros_like(p) if g is None else g for g, p in zip(gradients, parameters, strict=True)]
            rows.append((i, torch.cat([g.reshape(-1).float() for g in full]).cpu()))
    if world_size > 1 and not sharded:
        rows = sorted(gather_object(rows), key=lambda row: row[0])
    return torch.stack([row for _, row in rows]) if rows else torch.zeros(0, phi.dim)


def _sharded_gradient(phi: PhiSpace, batch: Any, loss: Callable[[Any], Tensor]) -> Tensor:
    """The gradient of the loss on a batch that all ranks have: [d]. FSDP2 leaves it in `.grad`, and nowhere else.

    What stands there is put back afterwards.
    """
    reshard(phi.model)
    before = [(parameter, parameter.grad) for parameter in phi.model.parameters()]
    for parameter, _ in before:
        parameter.grad = None
    try:
        loss(batch).backward()
        return phi.read_grad()
    finally:
        for parameter, gradient in before:
            parameter.grad = gradient
