"""Rounds: what is observed in a metric phase and when, and what the guide is shown of it.

    phi.read -> passes -> Interpolator (metric calls without passes) -> Trajectory -> guide.observe
"""

from __future__ import annotations

import logging
import sys
from typing import Any, Protocol

import numpy as np
import torch

from ..evaluation.evaluator import Evaluator
from ..evaluation.interpolator import NotInterpolable
from ..evaluation.observer import Observed, Observer
from ..evaluation.trajectory import Trajectory
from ..evaluation.virtual_observer import VirtualObserver
from ..guides import Guide, Round
from ..phi import Coordinates
from .faults import Faults
from .plan import FIRST_ROUNDS, PhasePlan

logger = logging.getLogger(__name__)

# the latest observations on interpolated predictions that are kept, and fitted to
MOST_INTERPOLATED = 256
# the same of real observations: more than a run of the default budget has, and older ones are from far away
MOST_REAL = 4096
# an interpolator that was further off where the next one was made (see `Interpolator.error`) was used for too long
LARGE_ERROR = 0.5


class MakePlan(Protocol):
    """The numbers of the phase, by what is observed and, where the metric is slow, by how many calls there is time for.

    By default what the config asks for.
    """

    def __call__(self, observe: str | None = None, calls: int | None = None) -> PhasePlan: ...


class Rounds:
    """Observes predictions, from expansions of the outputs round phi, or scores, where that is asked for or needed.

    Args:
        evaluator: the metric on the observation set.
        guide: is shown what is observed, and judged on what is real of it.
        make_plan: see `MakePlan`.
    """

    def __init__(self, evaluator: Evaluator, guide: Guide, make_plan: MakePlan):
        self.evaluator, self.guide, self.make_plan = evaluator, guide, make_plan
        self.ledger = evaluator.ledger
        self.trajectory, self.interpolated = Trajectory(), Trajectory()
        self.start_step = self.next_expansion = -1
        self.coordinates: Coordinates | None = None
        self.calls: int | None = None  # what there is time for, of a slow metric
        self._follow(make_plan())
        self.faults = Faults(self.plan.max_failures, self._switch_off)

    def _follow(self, plan: PhasePlan) -> None:
        """Go on by `plan`, and within its budgets."""
        self.plan, self.expand_steps = plan, plan.expand_steps
        self.ledger.budget, self.ledger.pass_budget = plan.calls, plan.passes
        self.observer = Observer(self.evaluator, plan.perturbation_std, plan.seed)
        self.virtual = None
        if plan.observe != "scores":
            on_all_rows = plan.observe == "predictions_on_all_rows"
            self.virtual = VirtualObserver(self.evaluator, plan.perturbation_std, on_all_rows, plan.seed)

    def _observe_scores(self, why: str) -> None:
        """From now on scores are observed, and not predictions."""
        logger.warning(f"The metric's scores are observed, not the model's predictions: {why}.")
        self._follow(self.make_plan("scores"))

    def _fit_into_time(self) -> None:
        """Behind the first expansion: fewer metric calls, where they are slow."""
        seconds = self.virtual.pass_seconds, self.virtual.call_seconds
        calls = self.plan.calls_in_time(*seconds)
        if calls < self.plan.calls:
            logger.info(
                f"A metric call takes {seconds[1]:.2g} s, a forward pass {seconds[0]:.2g} s: the guidance makes "
                f"{calls} calls instead of {self.plan.calls}. metric_call_budget sets another number."
            )
            self.calls, self.plan = calls, self.make_plan(self.plan.observe, calls)
            self.ledger.budget, self.expand_steps = self.plan.calls, self.plan.expand_steps

    def start(self, step: int, coordinates: Coordinates) -> None:
        """Begin at `step`, and forget what was observed in other coordinates."""
        self.start_step, self.next_expansion, self.coordinates = step, step, coordinates
        self.trajectory, self.interpolated = Trajectory(), Trajectory()

    def due(self, step: int) -> bool:
        """Whether it is time to observe."""
        return self._expands(step) or self._in_turn(step)

    def _expands(self, step: int) -> bool:
        return self.virtual is not None and step >= self.next_expansion

    def _in_turn(self, step: int) -> bool:
        """Whether a round of metric calls is due, with or without an expansion."""
        return (step - self.start_step) % self.plan.observe_steps == 0

    def observe(self, step: int) -> bool:
        """Take observations, where it is time to, and let the guide learn; whether real ones were taken."""
        if self._expands(step) and self._expand(step):
            return True
        due = self._in_turn(step)
        if self.virtual is not None:
            if self.virtual.interpolator is not None and due:
                self._observe_virtually(step)
            return False
        if not due:
            return False
        count = int(min(self.plan.round_size, self.ledger.remaining, self.ledger.remaining_passes))
        if count > 0:
            self._take(self.observer.observe(self.coordinates, step, count, self.guide.wants_predictions))
        return True

    def _expand(self, step: int) -> bool:
        """Expand the outputs round phi, and let the guide be judged on what was computed; whether that was possible."""
        first, passes = self.virtual.interpolator is None, self.virtual.passes(self.coordinates.dim)
        passes += self.plan.checks * first
        if passes > (left := min(self.ledger.remaining, self.ledger.remaining_passes)):
            self.next_expansion = sys.maxsize
            if first and left > 0:
                self._observe_scores(f"that takes {passes} forward passes to begin with, and the budgets allow {left}")
            return False
        try:
            observed = self.virtual.expand(self.coordinates, step)
        except NotInterpolable as error:
            self._observe_scores(str(error))
            return False
        if first:  # the guide is judged before it is followed
            if self.plan.follows_time:
                self._fit_into_time()
            for _ in range(FIRST_ROUNDS):
                self._observe_virtually(step, reserved=self.plan.checks)
            count = self.plan.checks
            self._take(self.observer.observe(self.coordinates, step, count, self.guide.wants_predictions))
        elif self.virtual.error > LARGE_ERROR:
            self.expand_steps = max(1, self.expand_steps // 2)
        self._take(observed, judges=not first)
        self._observe_virtually(step)
        self.next_expansion = step + self.expand_steps
        return True

    def _observe_virtually(self, step: int, reserved: int = 0) -> None:
        """One round of the metric on interpolated predictions; `reserved` calls of the budget are left."""
        pairs = int(min(self.plan.round_size, (self.ledger.remaining - reserved - 1) // 2))
        if pairs < 1:
            return
        observed = self.virtual.observe(self.coordinates, step, pairs, self.guide.wants_predictions)
        self.faults.add(observed.errors, succeeded=len(observed.observations), same_rows=True)
        if observed.observations and self.guide.off is None:
            self.interpolated.extend(observed.observations)
            self.interpolated = self.interpolated.latest(MOST_INTERPOLATED)
            told, z = (observed.predictions, observed.scores), np.stack([o.z for o in observed.observations])
            self.guide.observe(Round(self.trajectory, self.interpolated, *told, is_real=False, z=z))

    def _take(self, observed: Observed, judges: bool = True) -> None:
        """Take in real observations: faults are left out, the guide is judged by the others and learns from them."""
        fine = [not self.faults.is_outlier(o.score) for o in observed.observations]
        usable = [o for o, good in zip(observed.observations, fine, strict=True) if good]
        outliers = [o for o, good in zip(observed.observations, fine, strict=True) if not good]
        errors = observed.errors + [self.faults.outlier_message(o.score) for o in outliers]
        self.faults.add(errors, succeeded=len(usable))
        if usable and self.guide.off is None:
            self.faults.accept([o.score for o in usable])
            self.trajectory.extend(usable)
            if len(self.trajectory) > MOST_REAL:
                self.trajectory = self.trajectory.latest(MOST_REAL)
            self._forget(revoked := self.faults.revoke())
            predictions = scores = z = None
            if self.guide.wants_predictions:
                kept = [(p, o) for p, o in zip(observed.predictions, observed.observations, strict=True)]
                kept = [pair for pair, good in zip(kept, fine, strict=True) if good and pair[1].score not in revoked]
                predictions, scores = [p for p, _ in kept], np.array([o.score for _, o in kept])
                z = np.array([o.z for _, o in kept])
            self.guide.observe(Round(self.trajectory, self.interpolated, predictions, scores, judges, z))

    def _forget(self, scores: list[float]) -> None:
        """These turned out to be faults of the metric: what was learned from them is learned anew without."""
        kept = self.trajectory.where(~np.isin(self.trajectory.scores, scores))
        if len(kept) < len(self.trajectory):
            self.trajectory = kept
            self.guide.start(self.guide.context)

    def _switch_off(self, reason: str) -> bool:
        if self.guide.off is not None:
            return False
        self.guide.switch_off(reason)
        return True

    def state_dict(self) -> dict[str, Any]:
        """Nested dicts of tensors and JSON values."""
        return {
            "observe": self.plan.observe,
            "calls": self.calls,
            "trajectory": {name: torch.as_tensor(array) for name, array in self.trajectory.state_dict().items()},
            "interpolated": {name: torch.as_tensor(array) for name, array in self.interpolated.state_dict().items()},
            "virtual": None if self.virtual is None else self.virtual.state_dict(),
            "next_expansion": self.next_expansion,
            "expand_steps": self.expand_steps,
            "generator": self.observer.generator.get_state(),
            "faults": self.faults.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """After a `start` at the same step: go on by the plan of the run that was saved, as it had come to be."""
        if state["observe"] == "scores" != self.plan.observe:
            self._observe_scores("they were in the run that is resumed")
        elif state["calls"] is not None:
            self.calls = state["calls"]
            self._follow(self.make_plan(self.plan.observe, self.calls))
        self.trajectory, self.interpolated = (
            Trajectory.from_state_dict({n: t.numpy() for n, t in state[name].items()})
            for name in ("trajectory", "interpolated")
        )
        if self.virtual is not None:
            self.virtual.load_state_dict(state["virtual"], self.coordinates)
        self.next_expansion, self.expand_steps = state["next_expansion"], state["expand_steps"]
        self.observer.generator.set_state(state["generator"].to(torch.uint8))
        self.faults.load_state_dict(state["faults"])
