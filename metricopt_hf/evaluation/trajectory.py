"""Trajectory: the observations of a run, in the order in which they were taken."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace

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


class Trajectory(Sequence[Observation]):
    """A growing list of observations, handed over round by round and read as arrays.

    Attributes of n observations in k coordinates: `z` [n, k] float32, `scores` [n], `variances` [n], `steps` [n] int64,
    `costs` [n] float64, `folds` [n] int64.
    """

    def __init__(self, observations: Sequence[Observation] = ()):
        self._observations = list(observations)

    def __len__(self) -> int:
        return len(self._observations)

    def __getitem__(self, index):
        return self._observations[index]

    def __iter__(self) -> Iterator[Observation]:
        return iter(self._observations)

    def extend(self, observations: Sequence[Observation]) -> None:
        self._observations.extend(observations)

    @property
    def last_round(self) -> Trajectory:
        """The observations of the latest step."""
        return Trajectory([o for o in self if o.step == self[-1].step]) if len(self) else Trajectory()

    @property
    def z(self) -> np.ndarray:
        return np.stack([o.z for o in self]) if len(self) else np.zeros((0, 0), np.float32)

    @property
    def scores(self) -> np.ndarray:
        return np.array([o.score for o in self])

    @property
    def variances(self) -> np.ndarray:
        return np.array([o.variance for o in self])

    @property
    def steps(self) -> np.ndarray:
        return np.array([o.step for o in self], dtype=np.int64)

    @property
    def costs(self) -> np.ndarray:
        return np.array([o.cost for o in self])

    @property
    def folds(self) -> np.ndarray:
        return np.array([o.fold for o in self], dtype=np.int64)

    def aligned(self) -> Trajectory:
        """The same with every fold's mean score moved to that of all: one holds harder examples than another."""
        scores, folds = self.scores, self.folds
        if len(np.unique(folds)) < 2:
            return self
        shift = {fold: scores.mean() - scores[folds == fold].mean() for fold in np.unique(folds)}
        return Trajectory([replace(o, score=float(o.score + shift[o.fold])) for o in self])

    def state_dict(self) -> dict[str, np.ndarray]:
        return {"z": self.z, **{name: getattr(self, name) for name in COLUMNS.values()}}

    @classmethod
    def from_state_dict(cls, state: dict[str, np.ndarray]) -> Trajectory:
        rows = zip(state["z"], *(state[name] for name in COLUMNS.values()), strict=True)
        return cls(
            [
                Observation(np.asarray(z, np.float32), float(score), float(variance), int(step), float(cost), int(fold))
                for z, score, variance, step, cost, fold in rows
            ]
        )

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
