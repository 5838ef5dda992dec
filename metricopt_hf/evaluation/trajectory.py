"""Trajectory: the observations of a run, in the order in which they were taken."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow
import pyarrow.parquet

from ..errors import ValueFunctionError, brief

# what is unpacked at a time of a file that is not trusted
BATCH_BYTES = 2**22
# the largest coordinate or score that is taken from one: its squares still fit into float32
LARGEST = 1e15
# column of a parquet file -> attribute, beside z
COLUMNS = {"score": "scores", "variance": "variances", "step": "steps", "cost": "costs"}
# attribute -> what its numbers are, in the order of an Observation's fields
DTYPES = {"z": np.float32, "scores": float, "variances": float, "steps": np.int64, "costs": float, "raw": float}


@dataclass(frozen=True)
class Observation:
    """The metric at one point.

    Attributes:
        z: [k] float32, the point's compact coordinates.
        score: the metric there, in its own unit; which way is better is the metric's business.
        variance: estimated variance of `score` that z does not explain (score unit squared), nan if unknown.
        step: optimizer step at which it was taken; observations of one step are one round.
        cost: seconds that the forward passes and the metric call took.
        raw: the numbers of the metric's `keys` beside its score, each in its own unit.
    """

    z: np.ndarray
    score: float
    variance: float
    step: int
    cost: float
    raw: tuple[float, ...] = ()


class Trajectory(Sequence[Observation]):
    """A growing list of observations, handed over round by round and read as arrays.

    Attributes of n observations in k coordinates: `z` [n, k] float32, `scores` [n], `variances` [n], `steps` [n] int64,
    `costs` [n] float64, and `raw` [n, m] float64, the numbers of the metric's `keys`. They are views: not to be
    written to.
    """

    def __init__(self, observations: Sequence[Observation] = ()):
        self._count, self._columns = 0, {name: np.zeros(0, dtype) for name, dtype in DTYPES.items()}
        self._columns["z"], self._columns["raw"] = np.zeros((0, 0), np.float32), np.zeros((0, 0))
        self.extend(observations)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        index = range(len(self))[index]
        z, score, variance, step, cost, raw = (column[index] for column in self._columns.values())
        return Observation(z.copy(), float(score), float(variance), int(step), float(cost), tuple(raw.tolist()))

    def __iter__(self) -> Iterator[Observation]:
        return (self[i] for i in range(len(self)))

    def extend(self, observations: Sequence[Observation]) -> None:
        """Append; takes the same time whatever is there already, but for a doubling of the memory now and then."""
        if not len(observations):
            return
        rows = [(o.z, o.score, o.variance, o.step, o.cost, o.raw) for o in observations]
        start, self._count = self._count, self._count + len(rows)
        for (name, column), values in zip(self._columns.items(), zip(*rows, strict=True), strict=True):
            values = np.array(values, column.dtype)
            if len(column) < self._count:
                grown = np.zeros((max(self._count, 2 * len(column)), *values.shape[1:]), column.dtype)
                grown[:start] = column[:start].reshape(start, *values.shape[1:])
                self._columns[name] = column = grown
            column[start : self._count] = values

    @property
    def z(self) -> np.ndarray:
        return self._columns["z"][: len(self)]

    @property
    def scores(self) -> np.ndarray:
        return self._columns["scores"][: len(self)]

    @property
    def variances(self) -> np.ndarray:
        return self._columns["variances"][: len(self)]

    @property
    def steps(self) -> np.ndarray:
        return self._columns["steps"][: len(self)]

    @property
    def costs(self) -> np.ndarray:
        return self._columns["costs"][: len(self)]

    @property
    def raw(self) -> np.ndarray:
        return self._columns["raw"][: len(self)]

    @property
    def last_round(self) -> Trajectory:
        """The observations of the latest step."""
        return self.where(self.steps == self.steps[-1]) if len(self) else Trajectory()

    def joined(self, other: Trajectory) -> Trajectory:
        """These and then the others, as a trajectory of their own."""
        if not len(self) or not len(other):
            return other if len(other) else self
        columns = zip(self._columns.items(), other._columns.values(), strict=True)
        return self._of({name: np.concatenate([a[: len(self)], b[: len(other)]]) for (name, a), b in columns})

    def latest(self, count: int) -> Trajectory:
        """The last `count`, as a trajectory of their own."""
        return self.where(np.arange(len(self)) >= len(self) - count)

    def where(self, wanted: np.ndarray) -> Trajectory:
        """Those of [n] bool that are wanted, as a trajectory of their own."""
        return self._of({name: column[: len(self)][wanted] for name, column in self._columns.items()})

    @classmethod
    def _of(cls, columns: dict[str, np.ndarray]) -> Trajectory:
        trajectory = cls()
        trajectory._columns, trajectory._count = columns, len(columns["z"])
        return trajectory

    def state_dict(self) -> dict[str, np.ndarray]:
        return {name: column[: len(self)].copy() for name, column in self._columns.items()}

    @classmethod
    def from_state_dict(cls, state: dict[str, np.ndarray]) -> Trajectory:
        """What `state_dict` gave. Raises ValueError where the columns are of unequal length."""
        columns = {name: np.array(state[name], column.dtype) for name, column in cls()._columns.items()}
        if lengths := {len(column) for column in columns.values()} - {len(columns["z"])}:
            raise ValueError(f"columns of {sorted(lengths)} rows beside {len(columns['z'])} points z")
        return cls._of(columns)

    def to_parquet(self) -> bytes:
        """A parquet file with one row per observation, all columns flat: z0, z1, ... (float32), and `COLUMNS`.

        `raw` stays here: what is shared predicts the score.
        """
        columns = {f"z{i}": column for i, column in enumerate(self.z.T)}
        columns.update({one: getattr(self, many) for one, many in COLUMNS.items()})
        buffer = io.BytesIO()
        pyarrow.parquet.write_table(pyarrow.table(columns), buffer)
        return buffer.getvalue()

    @classmethod
    def from_parquet(cls, content: bytes, num_coordinates: int, max_bytes: int) -> Trajectory:
        """What `to_parquet` wrote, from a source that is not trusted.

        It is read a few rows at a time, as its footer may say what it likes of how many there are: a small file can
        hold billions, as equal numbers are stored once. Of the footer nothing is asked but the columns: some of what
        can stand there ends the process when it is looked at (pyarrow 26, `row_group(i).column(j)`).

        Raises:
            ValueFunctionError: it unpacks to more than `max_bytes`, or is no table of observations in so many
                coordinates.
        """
        expected = [(f"z{i}", pyarrow.float32()) for i in range(num_coordinates)]
        expected += [(one, pyarrow.from_numpy_dtype(DTYPES[many])) for one, many in COLUMNS.items()]
        try:
            file = pyarrow.parquet.ParquetFile(io.BytesIO(content))
            found = [(field.name, field.type) for field in file.schema_arrow]
            if not file.metadata.num_rows:
                return cls()
            if found != expected:
                wrong = next((pair for pair in zip(found, expected, strict=False) if pair[0] != pair[1]), None)
                raise ValueFunctionError(
                    f"the observations are in {len(found)} columns instead of {len(expected)}, or one is another than "
                    f"expected: {brief(wrong)}."
                )
            row_bytes, parts, rows = 8 * len(found), [], 0
            for batch in file.iter_batches(max(1, BATCH_BYTES // row_bytes), use_threads=False):
                rows += len(batch)
                if rows * row_bytes > max_bytes:
                    raise ValueFunctionError(f"the observations unpack to more than {max_bytes} bytes, the most read.")
                parts.append([column.to_numpy(zero_copy_only=False) for column in batch.columns])
            arrays = [np.concatenate(column) for column in zip(*parts, strict=True)]
            state = dict(zip(COLUMNS.values(), arrays[num_coordinates:], strict=True))
            state["z"], state["raw"] = np.stack(arrays[:num_coordinates], axis=1), np.zeros((rows, 0))
            if not all(np.isfinite(state[name]).all() for name in state if name != "variances"):
                raise ValueFunctionError("there are observations that are not finite.")
            if max(np.abs(state["z"]).max(), np.abs(state["scores"]).max()) > LARGEST:
                raise ValueFunctionError(f"there are observations beyond {LARGEST:g}.")
            return cls.from_state_dict(state)
        except ValueFunctionError:
            raise
        except (pyarrow.ArrowException, OSError, TypeError, ValueError, KeyError) as error:
            raise ValueFunctionError(
                f"the observations cannot be read ({type(error).__name__}: {brief(error)})."
            ) from error
