"""Compact coordinates z of phi: phi = origin + basis z. A value function sees z, and phi moves in them.

On some hundred raw parameters a value function fitted to a thousand observations predicts little; in the directions
that move the model's decisions most it does. Those are the leading eigenvectors of J^T J, J being the derivatives of
all outputs by phi.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

JACOBIAN, LOSS, RANDOM, GIVEN = "jacobian", "loss gradients", "random", "given"  # how a basis was found


@dataclass(frozen=True)
class Coordinates:
    """An origin and an orthonormal basis in phi.

    Attributes:
        origin: [d] float32.
        basis: [d, k] float32 with orthonormal columns.
        kind: how the basis was found, for the record.
    """

    origin: Tensor
    basis: Tensor
    kind: str = GIVEN

    @property
    def dim(self) -> int:
        """k, the number of coordinates."""
        return self.basis.shape[1]

    def encode(self, phi: Tensor) -> Tensor:
        """phi: [d] -> z: [k], the coordinates of its projection."""
        return self.basis.T @ (phi - self.origin)

    def lift(self, z: Tensor) -> Tensor:
        """A step in the coordinates, [k], as a step in phi, [d]."""
        return self.basis @ z


def leading_directions(rows: Tensor, dim: int) -> Tensor | None:
    """The leading `dim` right singular vectors of a matrix [n, d], uncentred: [d, <= dim].

    Rows that are not finite, or zero, are left out; None where there is no other.
    """
    rows = rows[rows.isfinite().all(1) & (rows != 0).any(1)].double()
    if not len(rows):
        return None
    wide = rows.shape[1] > len(rows)
    values, vectors = torch.linalg.eigh(rows @ rows.T if wide else rows.T @ rows)
    values, vectors = values.flip(0), vectors.flip(1)
    rank = max(1, int((values > values[0] * 1e-12).sum()))
    vectors = vectors[:, : min(dim, rank)]
    if wide:
        vectors = torch.linalg.qr(rows.T @ vectors).Q
    return vectors.float().contiguous()


def output_directions(jacobian: Tensor, dim: int) -> Tensor | None:
    """Directions of phi that move the decisions most: [d, <= dim].

    Args:
        jacobian: [rows, outputs, d]. What moves all outputs of a row alike decides nothing, so each row's mean over
            outputs is taken out.
    """
    if jacobian.shape[1] > 1:
        jacobian = jacobian - jacobian.mean(1, keepdim=True)
    return leading_directions(jacobian.flatten(0, 1), dim)


def random_directions(phi_dim: int, dim: int, generator: torch.Generator) -> Tensor:
    """Random orthonormal directions: [phi_dim, min(dim, phi_dim)]."""
    matrix = torch.randn(phi_dim, min(dim, phi_dim), generator=generator, dtype=torch.float64)
    return torch.linalg.qr(matrix).Q.float()
