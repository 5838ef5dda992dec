"""Compact coordinates z = Q^T (phi - phi_0): what the value function sees. phi itself moves freely.

On some hundred raw parameters a value function fitted to a hundred observations predicts nothing; on a handful of
directions in which the training loss actually pulls, it does.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ConfigurationError


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
    kind: str = "given"

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


def gradient_pca(gradients: Tensor, dim: int) -> Tensor:
    """The leading `dim` right singular vectors of mini-batch gradients [n, d], uncentred: a basis [d, <= dim].

    Uncentred, because the mean gradient is the one direction that training is sure to take.
    """
    _, singular_values, rows = torch.linalg.svd(gradients.double(), full_matrices=False)
    rank = int((singular_values > singular_values[0] * 1e-7).sum()) if singular_values[0] > 0 else 0
    if rank == 0:
        raise ConfigurationError(
            "The training loss has no gradient at phi, so there is nothing to take coordinates from: "
            "does the loss depend on phi?"
        )
    return rows[: min(dim, rank)].T.float().contiguous()


def group_gradients(gradients: Tensor) -> Tensor:
    """An orthonormal basis [d, <= groups] of the span of one loss gradient per group, [groups, d].

    Each gradient is scaled to unit norm first, so that no group is lost beside a louder one.
    """
    norms = gradients.norm(dim=1, keepdim=True)
    return gradient_pca(gradients / norms.clamp_min(1e-12), len(gradients))


def random_basis(phi_dim: int, dim: int, generator: torch.Generator) -> Tensor:
    """A random orthonormal basis [phi_dim, min(dim, phi_dim)]."""
    matrix = torch.randn(phi_dim, min(dim, phi_dim), generator=generator, dtype=torch.float64)
    return torch.linalg.qr(matrix).Q.float()
