"""LocalMetric: the exact metric as a function of compact coordinates near phi, from which a guide learns."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter

import numpy as np
import torch
from torch import Tensor
from transformers import EvalPrediction

from ..errors import MetricError
from ..evaluation.evaluator import Evaluator, shared_out
from ..evaluation.ledger import Faults
from ..evaluation.metric import world_kept
from ..phi import Coordinates
from ..value import Trajectory
from .linearization import Linearization
from .rows import groups_of, half_of

PERTURBED = 64  # leading coordinates that are perturbed: in more, a few hundred pairs tell less about each


class BudgetSpent(Exception):
    """No metric call is left."""


class LocalMetric:
    """Values of the metric near phi; greater is better, whichever way the metric goes.

    Where the predictions are linearised, a call costs no forward pass and sees a random half of the rows, so that
    effects of a few rows average away. Else a call is a forward pass with all rows.

    Args:
        evaluator: predictions and the metric on the observation set.
        coordinates: those of phi.
        linearization: the predictions near phi; None: every call is a pass.
        spread: standard deviation of a perturbation on each coordinate.
        generator: draws perturbations and rows, the same on every rank.
        faults: counts calls that fail.
        trajectory: takes in every observation.
        step: present optimizer step.
        on_all_rows: whether the metric makes sense on all rows only.
        allowance: the most calls that may be made here.

    Attributes:
        origin: [k] coordinates of phi: z counts from there.
        value: the metric at phi on all rows, greater is better; nan if unknown.
        share: how many calls an update should make.
    """

    def __init__(
        self,
        evaluator: Evaluator,
        coordinates: Coordinates,
        linearization: Linearization | None,
        spread: float,
        generator: torch.Generator,
        faults: Faults,
        trajectory: Trajectory,
        step: int,
        value: float,
        on_all_rows: bool = False,
        allowance: float = float("inf"),
    ):
        self.evaluator, self.coordinates, self.linearization = evaluator, coordinates, linearization
        self.spread, self.generator, self.faults = spread, generator, faults
        self.trajectory, self.step, self.value = trajectory, step, value
        self.allowance, self.share = allowance, allowance
        self.on_all_rows = on_all_rows or evaluator.complete is not None  # which knows rows by their place
        self.phi = evaluator.phi.read()
        self.origin = coordinates.encode(self.phi).cpu()
        self.part = linearization
        self.rows: np.ndarray | None = None  # rows of the present half; None: all

    @property
    def dim(self) -> int:
        """k."""
        return self.coordinates.dim

    @property
    def remaining(self) -> float:
        """Calls that are still allowed."""
        return min(self.allowance, self.evaluator.ledger.remaining)

    def allow(self, updates: int) -> None:
        """Set `share` for this number of updates that are left."""
        self.share = self.remaining / updates

    def draw(self, count: int) -> Tensor:
        """Random perturbations of the leading coordinates: [count, k]."""
        drawn = torch.zeros(count, self.dim)
        leading = min(PERTURBED, self.dim)
        drawn[:, :leading] = torch.randn(count, leading, generator=self.generator) * self.spread
        return drawn

    def halve(self) -> None:
        """Draw another random half of the rows for the calls to come, where the metric makes sense on a part."""
        if self.linearization is None or self.on_all_rows or self.linearization.unsplittable is not None:
            return
        linear = self.linearization
        groups = groups_of(linear.centre, self.evaluator.row_groups, linear.concat, linear.batch_sizes)
        self.rows = half_of(groups, self.generator)
        self.part = self.linearization.rows(self.rows)

    def values(self, z: Tensor) -> np.ndarray:
        """The metric at each of z, [n, k], relative to phi: [n], nan where the call failed.

        Raises:
            BudgetSpent: fewer calls are left.
        """
        start = perf_counter()
        if self.part is None:
            found = self._observed(z)
        else:
            rank, world_size = self.evaluator.rank, self.evaluator.world_size
            own = self.part.at_each(z[rank::world_size])  # in the order in which they are asked for
            found = self.values_of(lambda i: next(own), len(z))
        seconds = (perf_counter() - start) / max(1, len(z))
        fine = np.isfinite(found)
        # one half of the rows may be harder than another: shift its scores to the value on all rows
        shift = 0.0 if self.rows is None or not fine.any() else self.value - found[fine].mean()
        if np.isfinite(shift):
            points = self.origin + z[torch.as_tensor(fine)]
            self.trajectory.extend(points, torch.as_tensor(found[fine] + shift), self.step, seconds)
        return found

    def values_of(self, make: Callable[[int], EvalPrediction], count: int) -> np.ndarray:
        """The metric of `make(0)`, ..., `make(count - 1)`, predictions of the present half of the rows: [count].

        Raises:
            BudgetSpent: fewer calls are left.
        """
        evaluator = self.evaluator
        self._spend(count)
        start, sign = perf_counter(), evaluator.metric.sign

        def call(i: int) -> tuple[float, str | None]:
            try:
                return sign * evaluator.metric(make(i), evaluator.complete), None
            except MetricError as error:
                return float("nan"), str(error)
            finally:
                evaluator.ledger.move_bar(calls=evaluator.world_size)

        with world_kept():  # once for all of them
            taken = shared_out(evaluator.rank, evaluator.world_size, count, call)
        evaluator.ledger.add("observe", count, perf_counter() - start)
        errors = [error for _, error in taken if error is not None]
        self.faults.add(errors, succeeded=count - len(errors), same_rows=self.rows is not None)
        return np.array([value for value, _ in taken])

    def _spend(self, count: int) -> None:
        if count > self.remaining:
            raise BudgetSpent
        self.allowance -= count

    def _observed(self, z: Tensor) -> np.ndarray:
        """A forward pass and a call for each of z."""
        self._spend(len(z))
        evaluator, found, errors = self.evaluator, [], []
        with evaluator.phi.restored():
            for point in z:
                evaluator.phi.write(self.phi + self.coordinates.lift(point.to(self.phi.device)))
                try:
                    found.append(evaluator.metric.sign * evaluator.evaluate("observe"))
                except MetricError as error:
                    found.append(float("nan"))
                    errors.append(str(error))
        self.faults.add(errors, succeeded=len(z) - len(errors))
        return np.array(found)
