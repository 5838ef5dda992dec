"""Trajectory: the observations of a run, in the order in which they were taken."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from .observation import Observation


class Trajectory(Sequence[Observation]):
    """A growing list of observations, handed over round by round and read as arrays.

    Attributes of n observations in k coordinates: `z` [n, k] float32, `scores` [n], `variances` [n], `steps` [n] int64,
    `costs` [n] float64.
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

    def state_dict(self) -> dict[str, np.ndarray]:
        return {
            "z": self.z,
            "scores": self.scores,
            "variances": self.variances,
            "steps": self.steps,
            "costs": self.costs,
        }

    @classmethod
    def from_state_dict(cls, state: dict[str, np.ndarray]) -> Trajectory:
        columns = (state[name] for name in ("z", "scores", "variances", "steps", "costs"))
        return cls(
            [
                Observation(np.asarray(z, dtype=np.float32), float(score), float(variance), int(step), float(cost))
                for z, score, variance, step, cost in zip(*columns, strict=True)
            ]
        )
