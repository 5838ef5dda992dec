"""Trajectory: the observations of a run, in the order in which they were made."""

from __future__ import annotations

import torch
from torch import Tensor


class Trajectory:
    """A growing table of n observations: the points where the metric was called, and its values.

    It is kept as one tensor `rows`, [n, k + 3] float32: k coordinates z, the score, the optimizer step, and the
    seconds that the call took.

    Args:
        rows: see above; default: no observation.

    Example:
        >>> trajectory = Trajectory()
        >>> trajectory.extend(torch.zeros(2, 3), torch.tensor([0.5, 0.6]), step=7, seconds=0.1)
        >>> len(trajectory), trajectory.z.shape, trajectory.steps
        (2, torch.Size([2, 3]), tensor([7., 7.]))
    """

    def __init__(self, rows: Tensor | None = None):
        self._parts = [] if rows is None or not len(rows) else [rows]

    def extend(self, z: Tensor, scores: Tensor, step: int, seconds: float) -> None:
        """Append observations of one step.

        Args:
            z: [m, k] coordinates.
            scores: [m] of the metric, in its own unit.
            seconds: duration of each call.
        """
        same = torch.tensor([step, seconds]).expand(len(z), 2)
        self._parts.append(torch.cat([z.float(), scores.float()[:, None], same], 1))

    @property
    def rows(self) -> Tensor:
        """The whole table, [n, k + 3] float32."""
        if len(self._parts) > 1:
            self._parts = [torch.cat(self._parts)]
        return self._parts[0] if self._parts else torch.zeros(0, 3)

    @property
    def z(self) -> Tensor:
        """[n, k] coordinates."""
        return self.rows[:, :-3]

    @property
    def scores(self) -> Tensor:
        """[n] scores."""
        return self.rows[:, -3]

    @property
    def steps(self) -> Tensor:
        """[n] optimizer steps."""
        return self.rows[:, -2]

    @property
    def seconds(self) -> Tensor:
        """[n] seconds of a call."""
        return self.rows[:, -1]

    def __len__(self) -> int:
        return len(self.rows)
