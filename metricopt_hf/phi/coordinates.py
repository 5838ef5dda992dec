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
MOST_EXACT = 2048  # numbers of phi, up to which J^T J is held as it is
CHUNK_BYTES = 2**24  # of derivatives in float64, which are taken in at once
OVERSAMPLED = 16  # random directions beyond those that are wanted, where it is not


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


class Sketch:
    """The leading eigenvectors of J^T J, whose rows come batch by batch, in memory that is linear in phi.

    Of a wide phi the sum is S = J^T J omega, with a few random directions omega: its range is close to that of the
    leading eigenvectors, and S (omega^T S)^-1 S^T to J^T J (Nyström; Tropp, Yurtsever, Udell and Cevher, 2017).

    Args:
        phi_dim: d.
        dim: the most directions that are wanted.

    Attributes:
        sum: [d, d], or [d, dim + OVERSAMPLED] of a wide phi, float64; sums of several ranks add up.
    """

    def __init__(self, phi_dim: int, dim: int):
        self.dim, self._omega = dim, None
        if phi_dim > MOST_EXACT:
            width = min(phi_dim, dim + OVERSAMPLED)
            self._omega = torch.randn(phi_dim, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        self.sum = torch.zeros(phi_dim, phi_dim if self._omega is None else width, dtype=torch.float64)

    def add(self, jacobian: Tensor) -> None:
        """Take in derivatives: [rows, outputs, d].

        What moves all outputs of a row alike decides nothing, so each row's mean over outputs is taken out. What is
        not finite is left out.
        """
        for part in jacobian.split(max(1, CHUNK_BYTES // (8 * jacobian.shape[1:].numel()))):
            if part.shape[1] > 1:
                part = part - part.mean(1, keepdim=True)
            rows = part.flatten(0, 1)
            rows = rows[rows.isfinite().all(1)].double()
            self.sum += rows.T @ (rows if self._omega is None else rows @ self._omega)

    def directions(self) -> Tensor | None:
        """[d, <= dim] float32, orthonormal, the leading one first; None where nothing but zeros was taken in."""
        if not self.sum.any():
            return None
        values, vectors = _leading(self.sum if self._omega is None else self._omega.T @ self.sum)
        if self._omega is not None:
            vectors = torch.linalg.svd(self.sum @ (vectors / values.sqrt()), full_matrices=False).U
        return vectors[:, : self.dim].float().contiguous()


def _leading(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues above rounding of a symmetric matrix, and their vectors, the greatest first."""
    values, vectors = (found.flip(-1) for found in torch.linalg.eigh(matrix))
    rank = max(1, int((values > values[0] * 1e-12).sum()))
    return values[:rank], vectors[:, :rank]


def random_directions(phi_dim: int, dim: int, generator: torch.Generator) -> Tensor:
    """Random orthonormal directions: [phi_dim, min(dim, phi_dim)]."""
    matrix = torch.randn(phi_dim, min(dim, phi_dim), generator=generator, dtype=torch.float64)
    return torch.linalg.qr(matrix).Q.float()
