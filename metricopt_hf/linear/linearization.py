"""Linearization: a model's predictions near phi as a first-order function of compact coordinates, without a pass.

    outputs(z) = outputs(0) + jacobian z          z: [k]; phi + basis z is then in the model

Minimum error rate training (Och, 2003) calls a metric on outputs that are linear in the few weights of a log-linear
model; here they are linear in the parameters of any network, near where it was linearised. The metric itself is exact.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten
from transformers import EvalPrediction

from .rows import FIELDS, num_rows, sizes_of, take_rows, unsplittable

CHUNK_BYTES = 2**24  # outputs computed at once


@dataclass(frozen=True)
class LinearLeaf:
    """One array of the predictions that depends on phi.

    Attributes:
        outputs: its values at phi, float32, rows first.
        jacobian: [*shape, k] float32, or, with `columns`, [..., m, k] in place of the last dimension.
        columns: [..., m] int64 which outputs of each row (or token) move; None: all of them.
    """

    outputs: Tensor
    jacobian: Tensor
    columns: Tensor | None = None

    def at(self, z: Tensor) -> Tensor:
        """Values where phi is moved by z: [k]."""
        moved = self.jacobian @ z
        return self.outputs + moved if self.columns is None else self.outputs.scatter_add(-1, self.columns, moved)

    def at_each(self, z: Tensor) -> Tensor:
        """Values where phi is moved by each of z, [n, k]: [n, *shape]."""
        moved = torch.tensordot(z, self.jacobian, dims=([1], [-1]))
        if self.columns is None:
            return self.outputs + moved
        return self.outputs.expand(len(z), *self.outputs.shape).scatter_add(-1, self.columns.expand_as(moved), moved)

    def rows(self, rows: Tensor) -> LinearLeaf:
        """The same for some rows."""
        columns = None if self.columns is None else self.columns[rows]
        return LinearLeaf(self.outputs[rows], self.jacobian[rows], columns)

    def pull(self, gradient: Tensor) -> Tensor:
        """The gradient of a number by the outputs, as one by z: [k]."""
        if self.columns is not None:
            gradient = gradient.gather(-1, self.columns)
        return torch.tensordot(gradient, self.jacobian, gradient.dim())


@dataclass(frozen=True)
class Linearization:
    """Predictions and labels of a data set near phi.

    Attributes:
        centre: predictions and labels at phi.
        leaves: position of an array in `centre` (flattened) -> how it moves.
        concat: whether batches are joined (see `rows`).
        batch_sizes: examples in each batch; None: not known.
    """

    centre: EvalPrediction
    leaves: dict[int, LinearLeaf]
    concat: bool = True
    batch_sizes: tuple[int, ...] | None = None

    @property
    def num_rows(self) -> int:
        """How many examples it is of."""
        return num_rows(self.centre, self.concat, self.batch_sizes)

    @cached_property
    def unsplittable(self) -> str | None:
        """Why it is unknown which rows are an example's; None where it is known."""
        return unsplittable(self.centre, self.concat, self.batch_sizes)

    @property
    def dim(self) -> int:
        """k, the number of coordinates."""
        return next(iter(self.leaves.values())).jacobian.shape[-1]

    @property
    def nbytes(self) -> int:
        """Memory that the derivatives take up."""
        return sum(leaf.jacobian.nbytes for leaf in self.leaves.values())

    def movement(self, spread: float) -> float:
        """Standard deviations of the outputs by which a perturbation moves them; of several arrays the most.

        Args:
            spread: standard deviation of the perturbation on each coordinate.
        """
        moved = [spread * float(leaf.jacobian.square().sum(-1).mean().sqrt()) for leaf in self.leaves.values()]
        sizes = [float(leaf.outputs.std(correction=0)) for leaf in self.leaves.values()]
        return max((m / size for m, size in zip(moved, sizes, strict=True) if size > 0), default=0.0)

    @cached_property
    def decisions(self) -> LinearLeaf | None:
        """The outputs as logits: [rows] or [rows, classes]; None where they are something else."""
        if len(self.leaves) != 1 or not self.concat:
            return None
        (leaf,) = self.leaves.values()
        return leaf if leaf.outputs.dim() <= 2 else None

    def at(self, z: Tensor) -> EvalPrediction:
        """Predictions and labels where phi is moved by z: [k]."""
        return self.planted({i: leaf.at(z) for i, leaf in self.leaves.items()})

    def at_each(self, z: Tensor) -> Iterator[EvalPrediction]:
        """Predictions and labels at each of z, [n, k]; products are computed for several of them at once."""
        size = sum(leaf.outputs.nbytes for leaf in self.leaves.values())
        for points in z.split(max(1, CHUNK_BYTES // max(1, size))):
            moved = {i: leaf.at_each(points) for i, leaf in self.leaves.items()}
            for j in range(len(points)):
                yield self.planted({i: values[j] for i, values in moved.items()})

    def rows(self, rows: np.ndarray) -> Linearization:
        """The linearization of some rows, in increasing order."""
        if self.concat:
            index = torch.as_tensor(rows)
            total = self.num_rows  # leaves with another number of rows, such as tokens, stay
            leaves = {i: leaf.rows(index) if len(leaf.outputs) == total else leaf for i, leaf in self.leaves.items()}
            centre = take_rows(self.centre, rows, True, self.batch_sizes)
            return replace(self, centre=centre, leaves=leaves, batch_sizes=(len(rows),))
        # lists of batches: the rows of each coordinate's slopes are taken as those of the predictions are
        slopes = [self.planted({i: leaf.jacobian[..., j] for i, leaf in self.leaves.items()}) for j in range(self.dim)]
        parts = [arrays(take_rows(slope, rows, False, self.batch_sizes)) for slope in slopes]
        centre = take_rows(self.centre, rows, False, self.batch_sizes)
        values = arrays(centre)
        # other numbers in their places show which of them move
        other = self.planted({i: (leaf.outputs == 0).float() for i, leaf in self.leaves.items()})
        others = arrays(take_rows(other, rows, False, self.batch_sizes))
        leaves = {
            i: LinearLeaf(torch.as_tensor(value), torch.as_tensor(np.stack([part[i] for part in parts], -1)))
            for i, (value, another) in enumerate(zip(values, others, strict=True))
            if isinstance(value, np.ndarray) and value.size and not np.array_equal(value, another)
        }
        sizes = sizes_of(self.centre, rows, self.batch_sizes)
        return Linearization(centre, leaves, False, sizes) if leaves else self

    def planted(self, values: dict[int, Tensor]) -> EvalPrediction:
        """`centre` with other arrays at some positions."""
        leaves, spec = self._flat
        leaves = list(leaves)
        for i, value in values.items():
            leaves[i] = value.numpy()
        return EvalPrediction(**tree_unflatten(leaves, spec))

    @cached_property
    def _flat(self) -> tuple[list, TreeSpec]:
        return _flat(self.centre)


def arrays(prediction: EvalPrediction) -> list:
    """All leaves of the fields of a prediction, in order."""
    return _flat(prediction)[0]


def _flat(prediction: EvalPrediction) -> tuple[list, TreeSpec]:
    return tree_flatten({name: getattr(prediction, name) for name in FIELDS})
