"""LocalMetric: the exact metric as a function of compact coordinates near phi, which is what a guide learns from."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter

import numpy as np
import torch
from torch import Tensor
from transformers import EvalPrediction

from ..errors import MetricError
from ..phi import Coordinates
from .evaluator import Evaluator, shared_out
from .ledger import Faults
from .linearization import Linearization
from .metric import world_kept
from .trajectory import Observation, Trajectory

PERTURBED = 64  # the leading coordinates, which are perturbed: in more, a few hundred pairs say less of each


class BudgetSpent(Exception):
    """No metric call is left."""


class LocalMetric:
    """Values of the metric near phi; greater is better, whichever way the metric goes.

    Where the predictions are linearised, a call costs no forward pass and sees a random half of the rows, so that what
    holds for some rows only averages away. Else a call is a forward pass with all rows.

    Args:
        evaluator: gives the metric.
        coordinates: of phi.
        linearization: of the predictions at phi; None: every call is a pass.
        spread: standard deviation of a perturbation on each coordinate.
        generator: draws perturbations and rows, the same on every rank.
        faults: counts calls that fail.
        trajectory: takes in every observation.
        step: of the run.
        on_all_rows: whether the metric makes sense on all rows only.
        allowance: the most calls that may be made here.

    Attributes:
        origin: [k] coordinates of phi: z counts from there.
        value: of the metric at phi on all rows, as `Metric.merit`; nan where it is not known.
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
        self.on_all_rows = on_all_rows or evaluator.complete is not None  # what completes knows all rows by their place
        self.phi = evaluator.phi.read()
        self.origin = coordinates.encode(self.phi).cpu()
        self.part = linearization
        self.rows: np.ndarray | None = None  # of the half that is seen; None: all

    @property
    def dim(self) -> int:
        """k."""
        return self.coordinates.dim

    @property
    def remaining(self) -> float:
        """Calls that are still allowed."""
        return min(self.allowance, self.evaluator.ledger.remaining)

    def allow(self, updates: int) -> None:
        """So many updates are left: `share` is what one of them may call."""
        self.share = self.remaining / updates

    def draw(self, count: int) -> Tensor:
        """Random perturbations of the leading coordinates: [count, k]."""
        drawn = torch.zeros(count, self.dim)
        leading = min(PERTURBED, self.dim)
        drawn[:, :leading] = torch.randn(count, leading, generator=self.generator) * self.spread
        return drawn

    def halve(self) -> None:
        """From now on another random half of the rows is seen, where the metric makes sense on a part."""
        if self.linearization is None or self.on_all_rows or self.linearization.unsplittable is not None:
            return
        count = self.linearization.num_rows
        self.rows = np.sort(torch.randperm(count, generator=self.generator)[: max(1, count // 2)].numpy())
        self.part = self.linearization.rows(self.rows)

    def values(self, z: Tensor) -> np.ndarray:
        """The metric at each of z, [n, k], relative to phi: [n], nan where the call failed.

        Raises:
            BudgetSpent: fewer calls are left.
        """
        start = perf_counter()
        if self.linearization is None:
            found = self._observed(z)
        else:
            rank, world_size = self.evaluator.rank, self.evaluator.world_size
            own = self.part.at_each(z[rank::world_size])  # in the order in which they are asked for
            found = self.values_of(lambda i: next(own), len(z))
        seconds = (perf_counter() - start) / max(1, len(z))
        fine = np.isfinite(found)
        # one half of the rows may be harder than another: what is kept is moved to the value of all rows
        shift = 0.0 if self.rows is None or not fine.any() else self.value - found[fine].mean()
        if np.isfinite(shift):
            self.trajectory.extend(
                [
                    Observation((self.origin + z[i]).numpy(), float(found[i] + shift), float("nan"), self.step, seconds)
                    for i in np.flatnonzero(fine)
                ]
            )
        return found

    def values_of(self, make: Callable[[int], EvalPrediction], count: int) -> np.ndarray:
        """The metric of `make(0)`, ..., `make(count - 1)`, predictions of the rows that are seen: [count].

        Raises:
            BudgetSpent: fewer calls are left.
        """
        evaluator = self.evaluator
        self._spend(count)
        start = perf_counter()

        def call(i: int) -> tuple[float, str | None]:
            try:
                return evaluator.metric.merit(evaluator.metric(make(i), evaluator.complete)), None
            except MetricError as error:
                return float("nan"), str(error)

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
                    found.append(evaluator.metric.merit(evaluator.evaluate("observe")))
                except MetricError as error:
                    found.append(float("nan"))
                    errors.append(str(error))
        self.faults.add(errors, succeeded=len(z) - len(errors))
        return np.array(found)
