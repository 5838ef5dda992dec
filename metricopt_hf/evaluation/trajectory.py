"""Trajectory: the observations of a run, in the order in which they were taken."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow
import pyarrow.compute
import pyarrow.parquet

from ..errors import ValueFunctionError
from .observation import Observation

# what an `Observation` takes in memory, beside its numbers
ROW_BYTES = 512
# column of a parquet file -> attribute, beside z
COLUMNS = {"score": "scores", "variance": "variances", "step": "steps", "cost": "costs", "fold": "folds"}
# attribute -> what its numbers are, in the order of an Observation's fields
DTYPES = {"z": np.float32, "scores": float, "variances": float, "steps": np.int64, "costs": float, "folds": np.int64}
# aligned scores that differ by less than this, times the largest of them, are equal
EQUAL = 2.0**-40


class Trajectory(Sequence[Observation]):
    """A growing list of observations, handed over round by round and read as arrays.

    Attributes of n observations in k coordinates: `z` [n, k] float32, `scores` [n], `variances` [n], `steps` [n] int64,
    `costs` [n] float64, `folds` [n] int64. They are views: not to be written to.
    """

    def __init__(self, observations: Sequence[Observation] = ()):
        self._count, self._columns = 0, {name: np.zeros(0, dtype) for name, dtype in DTYPES.items()}
        self._columns["z"] = np.zeros((0, 0), np.float32)
        self.extend(observations)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        index = range(len(self))[index]
        z, score, variance, step, cost, fold = (column[index] for column in self._columns.values())
        return Observation(z.copy(), float(score), float(variance), int(step), float(cost), int(fold))

    def __iter__(self) -> Iterator[Observation]:
        return (self[i] for i in range(len(self)))

    def extend(self, observations: Sequence[Observation]) -> None:
        """Append; takes the same time whatever is there already, but for a doubling of the memory now and then."""
        if not len(observations):
            return
        rows = [(o.z, o.score, o.variance, o.step, o.cost, o.fold) for o in observations]
        start, self._count = self._count, self._count + len(rows)
        for (name, column), values in zip(self._columns.items(), zip(*rows, strict=True), strict=True):
            values = np.array(values, column.dtype)
            if len(column) < self._count:
                grown = np.zeros((max(self._count, 2 * len(column)), *values.shape[1:]), column.dtype)
                grown[:start] = column[:start].reshape(-1, *values.shape[1:])
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
    def folds(self) -> np.ndarray:
        return self._columns["folds"][: len(self)]

    @property
    def last_round(self) -> Trajectory:
        """The observations of the latest step."""
        return self.where(self.steps == self.steps[-1]) if len(self) else Trajectory()

    def where(self, wanted: np.ndarray) -> Trajectory:
        """Those of [n] bool that are wanted, as a trajectory of their own."""
        return self._of({name: column[: len(self)][wanted] for name, column in self._columns.items()})

    def aligned(self) -> Trajectory:
        """The same with every fold's mean score moved to that of all: one holds harder examples than another.

        What is equal then is equal to the last bit: rounding must not rank what the metric does not.
        """
        scores, folds = self.scores, self.folds
        present, fold = np.unique(folds, return_inverse=True)
        if len(present) < 2:
            return self
        means = np.bincount(fold, scores) / np.bincount(fold)
        moved = scores + (scores.mean() - means)[fold]
        grain = EQUAL * 2.0 ** np.ceil(np.log2(max(np.abs(scores).max(), 1e-250)))
        rows = {name: column[: len(self)] for name, column in self._columns.items()}
        return self._of({**rows, "scores": np.round(moved / grain) * grain})

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
        """A parquet file with one row per observation: z (list of float32), and `COLUMNS`."""
        state = self.state_dict()
        columns = {
            "z": pyarrow.array(list(state["z"]), pyarrow.list_(pyarrow.float32())),
            **{one: pyarrow.array(state[many]) for one, many in COLUMNS.items()},
        }
        buffer = io.BytesIO()
        pyarrow.parquet.write_table(pyarrow.table(columns), buffer)
        return buffer.getvalue()

    @classmethod
    def from_parquet(cls, path: str | os.PathLike, num_coordinates: int, max_bytes: int) -> Trajectory:
        """What `to_parquet` wrote, from a source that is not trusted.

        Raises:
            ValueFunctionError: it unpacks to more than `max_bytes`, or is no table of observations in so many
                coordinates.
        """
        try:
            file = pyarrow.parquet.ParquetFile(path)
            types = [file.schema_arrow.field(name).type for name in ("z", *COLUMNS)]
            types = [t.value_type if pyarrow.types.is_list(t) else t for t in types]
            if not all(pyarrow.types.is_floating(t) or pyarrow.types.is_integer(t) for t in types):
                raise TypeError("not all columns are numbers")
            unpacked = _unpacked_bytes(file.metadata)
            if unpacked > max_bytes:
                raise ValueFunctionError(f"the observations unpack to {unpacked} bytes; at most {max_bytes} are read.")
            table = file.read(columns=["z", *COLUMNS])
            if lengths := set(pyarrow.compute.list_value_length(table["z"]).to_pylist()) - {num_coordinates}:
                raise ValueFunctionError(f"observations have {lengths} coordinates instead of {num_coordinates}.")
            state = {many: table[one].to_numpy() for one, many in COLUMNS.items()}
            state["z"] = pyarrow.compute.list_flatten(table["z"]).to_numpy().reshape(len(table), num_coordinates)
            if not (np.isfinite(state["z"]).all() and np.isfinite(state["scores"]).all()):
                raise ValueFunctionError("there are observations that are not finite.")
            return cls.from_state_dict(state)
        except ValueFunctionError:
            raise
        except (pyarrow.ArrowException, TypeError, ValueError, KeyError) as error:
            raise ValueFunctionError(f"the observations cannot be read ({type(error).__name__}: {error}).") from error


def _unpacked_bytes(metadata: pyarrow.parquet.FileMetaData) -> int:
    """What a table of numbers takes in memory; the file itself may be tiny, as equal numbers are stored once."""
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    values = sum(group.column(i).num_values for group in groups for i in range(group.num_columns))
    stored = sum(group.total_byte_size for group in groups)
    return max(stored, 8 * values + ROW_BYTES * metadata.num_rows)
