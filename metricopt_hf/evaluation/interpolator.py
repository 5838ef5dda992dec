"""Interpolator: a model's outputs near phi as a function of the coordinates, so that a metric call costs no pass.

Near a centre the outputs are smooth in z: o(z) = o_0 + D z, where D comes from the differences of forward passes
at both ends of k directions in z. Minimum error rate training (Och, 2003) does this for the few weights of a log-linear
model; this module does it for the adapters of any network. The metric itself is exact; its argument o(z) is
approximate, and `error` measures by how much.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from transformers import EvalPrediction

from .rows import FIELDS, take_rows

# Arrays of interpolated outputs that are made at once, in bytes.
CHUNK_BYTES = 2**26
INTERPOLATED = ("predictions", "losses")  # fields of a prediction; the others are what they are


class NotInterpolable(Exception):
    """The outputs are no smooth function of phi; the message says why."""


class Interpolator:
    """Outputs as a function of z, relative to a centre.

    Args:
        centre: predictions and labels at the centre.
        pairs: predictions at both ends of each direction.
        directions: [k, k] from the centre to the first of these, orthogonal to each other and of one length.
        concat: whether batches are joined (see `rows`).

    Raises:
        NotInterpolable: there is no floating-point output, or shapes or integers change with phi (generated tokens).
    """

    def __init__(
        self,
        centre: EvalPrediction,
        pairs: Sequence[tuple[EvalPrediction, EvalPrediction]],
        directions: np.ndarray,
        concat: bool = True,
    ):
        leaves = _leaves(centre)
        differences: dict[tuple, np.ndarray] = {}
        for j, (plus, minus) in enumerate(pairs):
            above, below = _leaves(plus), _leaves(minus)
            for path, value in leaves.items():
                if path[0] not in INTERPOLATED:
                    continue
                ends = above.get(path), below.get(path)
                if any(end is None or end.shape != value.shape for end in ends):
                    raise NotInterpolable("the shape of the model's outputs changes with phi")
                if np.issubdtype(value.dtype, np.floating):
                    differences.setdefault(path, np.empty((len(pairs), *value.shape), np.float32))[j] = (
                        ends[0].astype(np.float32) - ends[1]
                    ) / 2
                elif not all(np.array_equal(value, end) for end in ends):
                    raise NotInterpolable("the model's outputs are whole numbers that change with phi")
        if not any(path[0] == "predictions" for path in differences):
            raise NotInterpolable("the model's outputs hold no floating-point numbers")
        inverse = np.asarray(directions, np.float32) / np.square(directions[0]).sum()  # of what is orthogonal
        self._set(centre, {path: np.tensordot(inverse.T, d, 1) for path, d in differences.items()}, concat)

    def _set(self, centre: EvalPrediction, slopes: dict[tuple, np.ndarray], concat: bool) -> None:
        self.centre, self.concat = centre, concat
        self._slopes = slopes  # path of a leaf -> [k, *shape] float32

    @property
    def num_coordinates(self) -> int:
        """k."""
        return len(next(iter(self._slopes.values())))

    @property
    def nbytes(self) -> int:
        """Memory of the slopes."""
        return sum(slopes.nbytes for slopes in self._slopes.values())

    def take(self, rows: np.ndarray) -> Interpolator:
        """The same for some of the examples; see `take_rows`."""
        columns = ({path: slopes[j] for path, slopes in self._slopes.items()} for j in range(self.num_coordinates))
        taken = [_leaves(take_rows(_planted(self.centre, column), rows, self.concat)) for column in columns]
        centre = take_rows(self.centre, rows, self.concat)
        paths = [
            path
            for path, value in _leaves(centre).items()
            if path[0] in INTERPOLATED and np.issubdtype(value.dtype, np.floating)
        ]
        part = object.__new__(Interpolator)
        part._set(centre, {path: np.stack([leaves[path] for leaves in taken]) for path in paths}, self.concat)
        return part

    def at(self, z: np.ndarray) -> Iterator[EvalPrediction]:
        """Predictions and labels at each of the points z: [n, k], relative to the centre."""
        z = np.asarray(z, np.float32)
        leaves = _leaves(self.centre)
        size = max(1, sum(4 * leaves[path].size for path in self._slopes))
        chunk = max(1, CHUNK_BYTES // size)
        for start in range(0, len(z), chunk):
            points = z[start : start + chunk]
            moved = {path: leaves[path] + np.tensordot(points, slopes, 1) for path, slopes in self._slopes.items()}
            for i in range(len(points)):
                yield _planted(self.centre, {path: values[i] for path, values in moved.items()})

    def error(self, z: np.ndarray, true: EvalPrediction) -> float:
        """How far the outputs at z: [k] are off, as a share of how far they have moved: 0 exact, 1 worthless."""
        leaves, there = _leaves(self.centre), _leaves(true)
        (here,) = map(_leaves, self.at(z[None]))
        off = sum(float(np.abs(here[path] - there[path]).sum()) for path in self._slopes)
        moved = sum(float(np.abs(leaves[path] - there[path]).sum()) for path in self._slopes)
        return off / moved if moved else 0.0


class InterpolatedPredictions(Sequence[EvalPrediction]):
    """What an interpolator says of points z: [n, k], made when it is looked at, as all at once may be large."""

    def __init__(self, interpolator: Interpolator, z: np.ndarray):
        self.interpolator, self.z = interpolator, z

    def __len__(self) -> int:
        return len(self.z)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return InterpolatedPredictions(self.interpolator, self.z[index])
        (prediction,) = self.interpolator.at(self.z[index][None])
        return prediction


def _leaves(prediction: EvalPrediction) -> dict[tuple, np.ndarray]:
    """Path -> array, of all arrays in the fields of a prediction."""
    found: dict[tuple, np.ndarray] = {}

    def walk(tree: Any, path: tuple) -> None:
        if isinstance(tree, np.ndarray):
            found[path] = tree
        elif isinstance(tree, Mapping):
            for key, value in tree.items():
                walk(value, (*path, key))
        elif isinstance(tree, (list, tuple)):
            for i, value in enumerate(tree):
                walk(value, (*path, i))

    for name in FIELDS:
        walk(getattr(prediction, name), (name,))
    return found


def _planted(prediction: EvalPrediction, leaves: Mapping[tuple, np.ndarray]) -> EvalPrediction:
    """`prediction` with other arrays at some paths."""

    def walk(tree: Any, path: tuple) -> Any:
        if path in leaves:
            return leaves[path]
        if isinstance(tree, Mapping):
            return {key: walk(value, (*path, key)) for key, value in tree.items()}
        if isinstance(tree, (list, tuple)):
            return type(tree)(walk(value, (*path, i)) for i, value in enumerate(tree))
        return tree

    return EvalPrediction(**{name: walk(getattr(prediction, name), (name,)) for name in FIELDS})
