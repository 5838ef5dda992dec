"""Cost of a linearization: the way that is taken, its passes over the data set, and its memory, before it is made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

# How derivatives are had: row by row of all outputs or of each row's largest, or by differences of forward passes
ROW_BY_ROW, LARGEST, DIFFERENCES = "row by row", "row by row, of the largest outputs", "by differences"
MOST_LARGEST = 5  # outputs that each have a backward pass, of the many of which a metric reads the largest alone
MOST_DIFFERENCES = 16  # coordinates, where each takes a forward pass; and outputs, if the metric reads all of them
MOST_BYTES = 2**30  # memory of a linearization; rows are drawn where all would take more


@dataclass(frozen=True)
class Cost:
    """What a linearization takes, beside the pass that predicts.

    Attributes:
        way: `ROW_BY_ROW`, `LARGEST` or `DIFFERENCES`.
        dim: coordinates.
        forwards, backwards: passes over the data set.
        rows: examples (or, by differences, entries of the arrays) whose derivatives are kept.
        nbytes: memory of the derivatives.
    """

    way: str
    dim: int
    forwards: int
    backwards: int
    rows: int
    nbytes: int

    @property
    def passes(self) -> int:
        """Forward and backward ones: a backward pass that reaches phi alone takes about as long as a forward pass."""
        return self.forwards + self.backwards

    def __str__(self) -> str:
        return f"{self.way}, {self.passes} passes, {self.nbytes / 2**20:.1f} MiB in {self.dim} coordinates"


def outputs_per_row(shape: Sequence[int], way: str) -> int:
    """How many outputs of each row, or token, are differentiated.

    Args:
        shape: of the predictions, [rows], [rows, outputs] or [rows, tokens, outputs].
    """
    outputs = shape[-1] if len(shape) > 1 else 1
    return min(outputs, MOST_LARGEST) if way == LARGEST else outputs


def way_of(shapes: Sequence[Sequence[int]], taps: bool, reads_all: bool) -> str:
    """The cheapest way to linearise predictions.

    Args:
        shapes: of their floating-point arrays, rows first.
        taps: whether phi and the model allow derivatives row by row.
        reads_all: whether the metric reads other outputs than each row's `MOST_LARGEST`.
    """
    if not taps or len(shapes) != 1 or not 1 <= len(shapes[0]) <= 3:
        return DIFFERENCES
    outputs = outputs_per_row(shapes[0], ROW_BY_ROW)
    if outputs > MOST_LARGEST and not reads_all:
        return LARGEST
    return ROW_BY_ROW if outputs <= MOST_DIFFERENCES else DIFFERENCES


def cost(shapes: Sequence[Sequence[int]], phi_dim: int, dim: int, way: str) -> Cost:
    """Of one linearization.

    Args:
        shapes: as for `way_of`.
        phi_dim: numbers of phi.
        dim: the most coordinates.
        way: see `way_of`.
    """
    dim = min(dim, phi_dim)
    if way == DIFFERENCES:
        dim = min(dim, MOST_DIFFERENCES)
        return Cost(way, dim, dim, 0, max((s[0] for s in shapes if s), default=0), 4 * dim * sum(map(prod, shapes)))
    outputs = outputs_per_row(shapes[0], way)
    a_row = 4 * prod(shapes[0][1:-1]) * outputs * dim
    rows = min(shapes[0][0], max(1, int(MOST_BYTES / a_row)))
    return Cost(way, dim, 1, outputs, rows, rows * a_row)
