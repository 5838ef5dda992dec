"""MetricPhase: one metric phase; it observes, learns, blends and selects.

This is the sentence of the whole library, as `advance` and `correct` read it:

    phi.read -> passes -> Interpolator (metric calls without passes) -> Trajectory
        -> guide.observe -> guide.direction (with trust) -> blend
"""

from __future__ import annotations

import copy
import logging
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import EvalPrediction

from ..evaluation.answer import Score
from ..evaluation.constraints import ConstraintCheck
from ..evaluation.evaluator import Evaluator
from ..evaluation.interpolator import NotInterpolable
from ..evaluation.noise import checked_constraints
from ..evaluation.observer import Observed, Observer
from ..evaluation.trajectory import Trajectory
from ..evaluation.virtual_observer import VirtualObserver
from ..guides import Direction, Guide, GuideContext, Round, blend
from ..hub import ValueFunction
from ..phi import Coordinates, PhiSpace
from ..value import Signature
from .faults import Faults
from .plan import FIRST_ROUNDS, PhasePlan
from .polish import polish
from .result import RunResult
from .selection import Selection

logger = logging.getLogger(__name__)

UNGUIDED_BRANCH = "the unguided branch"
# the latest observations on interpolated predictions that are kept, and fitted to
MOST_INTERPOLATED = 256
# an interpolator that was further off where the next one was made (see `Interpolator.error`) was used for too long
LARGE_ERROR = 0.5


class MetricPhase:
    """State and work of one metric phase.

    Args:
        phi: tuned here.
        moving: what moves, and so what is selected: phi, or more of the model where the guide's `scope` is "all".
        observer: takes the real observations.
        selector: the metric on the selection split; None where there is none (then the last phi stays).
        guide: follows or does not.
        make_coordinates: computes Q at the start of the phase.
        plans: the numbers; those of "scores" serve where predictions cannot be interpolated.
        on_all_rows: whether the metric makes sense on all rows of the observation set only.
    """

    def __init__(
        self,
        phi: PhiSpace,
        moving: PhiSpace,
        observer: Observer,
        selector: Evaluator | None,
        guide: Guide,
        make_coordinates: Callable[[], Coordinates],
        plans: Sequence[PhasePlan],
        on_all_rows: bool = False,
    ):
        self.phi, self.moving, self.observer, self.guide = phi, moving, observer, guide
        self.make_coordinates, (self.plan, *self._other_plans) = make_coordinates, plans
        plan, self.evaluator = self.plan, observer.evaluator
        self.virtual = None
        if plan.observe == "predictions":
            self.virtual = VirtualObserver(self.evaluator, plan.perturbation_std, on_all_rows, plan.seed)
        self.metric, self.ledger = self.evaluator.metric, self.evaluator.ledger
        self.faults = Faults(plan.max_failures, self._switch_off)
        self.selection = Selection(selector, moving, self.faults)
        self.trajectory, self.interpolated = Trajectory(), Trajectory()
        self.next_expansion, self.expand_steps = 0, plan.expand_steps
        self.coordinates: Coordinates | None = None
        self.start_step = -1
        self.before = False  # whether this is still the run's first phase, in which everything is trained
        self.start_phi: Tensor | None = None
        self.unguided_step: int | None = None  # from here on the loss alone is followed
        self.last_phi: Tensor | None = None  # where guided training ended, whichever phi was selected
        self.direction: Direction | None = None  # of the last update
        self.constraints: tuple[ConstraintCheck, ...] = ()  # at the best phi on the selection split
        self.on_all_rows = on_all_rows
        self.curve: list[dict[str, Any]] = []  # one entry per round, for plots and logs

    @property
    def started(self) -> bool:
        return self.coordinates is not None

    @property
    def guides(self) -> bool:
        """Whether it has begun, and phi does not yet follow the loss alone."""
        return self.started and self.unguided_step is None

    @property
    def _branch(self) -> str:
        return "guided" if self.unguided_step is None else "unguided"

    def start(self, step: int, coordinates: Coordinates | None = None, before: bool = False) -> None:
        """Begin, and forget what was observed in other coordinates: what does not move stands still from here on.

        Args:
            step: optimizer steps taken so far.
            coordinates: those of an interrupted run.
            before: begin with the run's first phase, in which all of the model moves: nothing is selected there.
        """
        self.start_step, self.start_phi, self.before = step, self.moving.read(), before
        self.trajectory, self.interpolated = Trajectory(), Trajectory()
        self.next_expansion = step
        self.coordinates = coordinates or self.make_coordinates()
        self.phi_description = self.phi.description  # of what merging takes out nothing could be said later
        self._start_guide()
        if self.moving is self.phi and not before:
            for evaluator in (self.evaluator, self.selection.evaluator):
                if evaluator is not None:
                    evaluator.freeze(lambda: self.observer.moved(self.coordinates))

    def rehearse(self, coordinates: Coordinates) -> dict[str, Any]:
        """What `state_dict` would be right behind a `start`; the guide is started, the phase is not."""
        begun = copy.copy(self)
        begun.coordinates, begun.start_phi = coordinates, self.moving.read()
        begun._start_guide()
        return begun.state_dict()

    def advance(self, step: int) -> None:
        """Before the update of `step`: select, observe and learn, where it is time to."""
        if step == self.unguided_step:  # phi is where the phase began, and was evaluated then
            return
        since = step - self.start_step
        selects = since % self.plan.select_steps == 0 and not self.before
        score = self.selection.consider(step, self._branch) if selects else None
        observes = self.guides and self.guide.off is None and self._observe(step)
        if selects or observes:
            self._record(step, score)

    def correct(self) -> None:
        """Add the guide's direction, if it has one, to the task gradient at phi."""
        if self.plan.value_weight == 0 or not self.guides:
            return
        self.direction = self.guide.direction(self.phi.read())
        if self.direction is not None and self.direction.trust > 0:
            task_grad = self.phi.read_grad()
            self.phi.add_grad(
                blend.correction(task_grad, self.direction.vector, self.direction.trust, self.plan.value_weight)
            )

    def loss(self, inputs: dict[str, Any], outputs: Any, task_loss: Tensor) -> Tensor:
        """The task's loss, or, as far as the guide is trusted, the guide's instead of it; both means over the batch."""
        trust, _ = self.guide.standing if self.guides else (0.0, UNGUIDED_BRANCH)
        if trust == 0:
            return task_loss
        loss = self.guide.loss(inputs, outputs, task_loss)
        return task_loss if loss is None else task_loss + trust * (loss - task_loss)

    def begin_unguided(self, step: int) -> None:
        """Before the forward pass of `step`: back to where the phase began, to go on by the loss alone.

        The last guided phi is a candidate, and so are all that follow.
        """
        self.last_phi = self.moving.read()
        self._record(step, self.selection.consider(step))
        self.moving.write(self.start_phi)
        self.unguided_step = step

    def finish(self, step: int) -> None:
        """The last phi is a candidate too; then the best is put in place, or `last_phi` where there is none."""
        if self.guides:
            self.last_phi = self.moving.read()
        self._record(step, self.selection.consider(step, self._branch))
        if self.plan.tune_bias and self.moving is self.phi and self.evaluator.of_predictions:
            polish(self.evaluator, self.selection, self.start_phi, step)
        self.selection.confirm()
        best = self.selection.best
        if best.phi is None:
            self.moving.write(self.last_phi)
        else:
            self.moving.write(best.phi)
            branches = {"guided": "", "unguided": f", in {UNGUIDED_BRANCH}", "bias": ", with its output bias tuned"}
            of = branches[best.branch]
            logger.info(
                f"Best {self.metric.name} on the selection split: {best.score:.4f} at step {best.step}{of}; this phi "
                "is kept."
            )
        if self.metric.constraints and best.phi is not None:
            self.constraints = checked_constraints(self.selection.evaluator, self.on_all_rows, best.raw)
            for check in self.constraints:
                logger.log(logging.INFO if check.holds else logging.WARNING, f"On the selection split, {check}.")

    def result(self) -> RunResult:
        """What can be told of the phase by now; it must have begun."""
        best, trust = self.selection.best, self.guide.trust
        return RunResult(
            metric=self.metric.name,
            greater_is_better=self.metric.greater_is_better,
            start_step=self.start_step,
            best_phi=best.phi,
            best_score=best.score,
            best_step=best.step,
            kept_branch=best.branch,
            last_phi=self.last_phi,
            unguided_step=self.unguided_step,
            curve=self.curve,
            constraints=self.constraints,
            keys=self.metric.keys,
            trajectory=self.trajectory,
            ledger=self.ledger,
            failed_calls=self.faults.total,
            phi=self.phi_description,
            coordinates=self.coordinates,
            trust=trust.value()[0],
            rank_correlation=trust.correlation,
            value_function=self.value_function,
        )

    @property
    def value_function(self) -> ValueFunction | None:
        """A copy of what the guide has fitted, with all that others need to use it; None where there is nothing."""
        network = self.guide.network if self.started else None
        if network is None:
            return None
        coordinates = self.coordinates
        signature = Signature(
            type(self.phi.model).__name__,
            self.phi_description,
            coordinates.kind,
            self.metric.name,
            self.metric.greater_is_better,
            coordinates.origin.cpu(),
            None if coordinates.basis is None else coordinates.basis.cpu(),
        )
        return ValueFunction.of(network, signature, self.trajectory.joined(self.interpolated))

    def log_scalars(self) -> dict[str, float]:
        """What is reported of the guidance beside Trainer's own numbers."""
        if not self.curve:
            return {}
        latest = self.curve[-1]
        names = (
            "selection",
            "trust",
            "gradient_agreement",
            "rank_correlation",
            "observation_mean",
            "coverage",
            "calls",
            "passes",
            "interpolation_error",
        )
        scalars = {name: float(latest[name]) for name in names if latest.get(name) is not None}
        scalars["failed_calls"] = float(self.faults.total)
        return {name: value for name, value in scalars.items() if np.isfinite(value)}

    def state_dict(self) -> dict[str, Any]:
        """Nested dicts and lists of tensors and JSON values."""
        return {
            "start_step": self.start_step,
            "before": self.before,
            "start_phi": self.start_phi,
            "last_phi": self.last_phi,
            "unguided_step": self.unguided_step,
            "origin": self.coordinates.origin,
            "basis": self.coordinates.basis,
            "coordinates": self.coordinates.kind,
            "trajectory": {name: torch.as_tensor(array) for name, array in self.trajectory.state_dict().items()},
            "guide": self.guide.state_dict(),
            "interpolated": {name: torch.as_tensor(array) for name, array in self.interpolated.state_dict().items()},
            "virtual": None if self.virtual is None else self.virtual.state_dict(),
            "next_expansion": self.next_expansion,
            "expand_steps": self.expand_steps,
            "generator": self.observer.generator.get_state(),
            "selection": self.selection.state_dict(),
            "faults": self.faults.state_dict(),
            "curve": self.curve,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        device = self.phi.read().device

        def here(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device)

        coordinates = Coordinates(here(state["origin"]), here(state["basis"]), state["coordinates"])
        self.start(state["start_step"], coordinates, state["before"])
        self.start_phi, self.last_phi = here(state["start_phi"]), here(state["last_phi"])
        self.unguided_step = state["unguided_step"]
        self.trajectory, self.interpolated = (
            Trajectory.from_state_dict({n: t.numpy() for n, t in state[name].items()})
            for name in ("trajectory", "interpolated")
        )
        if state["virtual"] is None and self.virtual is not None:
            self._observe_scores("they were in the run that is resumed")
        elif self.virtual is not None:
            self.virtual.load_state_dict(state["virtual"], coordinates)
        self.next_expansion, self.expand_steps = state["next_expansion"], state["expand_steps"]
        self.guide.load_state_dict(state["guide"])
        self.observer.generator.set_state(state["generator"].to(torch.uint8))
        self.selection.load_state_dict(state["selection"])
        self.faults.load_state_dict(state["faults"])
        self.curve = state["curve"]

    def _start_guide(self) -> None:
        self.guide.start(
            GuideContext(
                self.coordinates,
                self.metric.greater_is_better,
                torch.Generator().manual_seed(self.plan.seed),
                self._call_metric,
            )
        )

    def _observe(self, step: int) -> bool:
        """Take observations, where it is time to, and let the guide learn; whether real ones were taken."""
        if self.virtual is not None and step >= self.next_expansion and self._expand(step):
            return True
        since = step - self.start_step
        if self.virtual is not None:
            if self.virtual.interpolator is not None and since % self.plan.observe_steps == 0:
                self._observe_virtually(step, self.plan.round_size)
            return False
        if since % self.plan.observe_steps:
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
            for _ in range(FIRST_ROUNDS):
                self._observe_virtually(step, self.plan.round_size)
            self._take(self.observer.observe(self.coordinates, step, self.plan.checks, self.guide.wants_predictions))
        elif self.virtual.error > LARGE_ERROR:
            self.expand_steps = max(1, self.expand_steps // 2)
        self._take(observed, judges=not first)
        self._observe_virtually(step, self.plan.round_size)
        self.next_expansion = step + self.expand_steps
        return True

    def _observe_scores(self, why: str) -> None:
        """From now on scores are observed, and not predictions."""
        logger.warning(f"The metric's scores are observed, not the model's predictions: {why}.")
        self.virtual, self.next_expansion = None, sys.maxsize
        if self._other_plans:
            self.plan = self._other_plans[0]
            self.observer.perturbation_std = self.plan.perturbation_std
            self.ledger.budget, self.ledger.pass_budget = self.plan.calls, self.plan.passes

    def _observe_virtually(self, step: int, pairs: int) -> None:
        pairs = int(min(pairs, (self.ledger.remaining - 1) // 2))
        if pairs < 1:
            return
        observed = self.virtual.observe(self.coordinates, step, pairs)
        self.faults.add(observed.errors, succeeded=len(observed.observations), same_rows=True)
        if observed.observations and self.guide.off is None:
            self.interpolated.extend(observed.observations)
            self.interpolated = self.interpolated.latest(MOST_INTERPOLATED)
            self.guide.observe(Round(self.trajectory, self.interpolated, is_real=False))

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
            self._forget(self.faults.revoke())
            predictions = observed.predictions if self.guide.wants_predictions else None
            if predictions is not None:
                predictions = [p for p, good in zip(predictions, fine, strict=True) if good]
            self.guide.observe(Round(self.trajectory, self.interpolated, predictions, judges))

    def _forget(self, scores: list[float]) -> None:
        """These turned out to be faults of the metric: what was learned from them is learned anew without."""
        kept = self.trajectory.where(~np.isin(self.trajectory.scores, scores))
        if len(kept) < len(self.trajectory):
            self.trajectory = kept
            self.guide.start(self.guide.context)

    def _call_metric(self, prediction: EvalPrediction) -> Score:
        with self.ledger.charge("observe"):
            return self.metric(prediction)

    def _switch_off(self, reason: str) -> bool:
        if self.guide.off is not None:
            return False
        self.guide.switch_off(reason)
        return True

    def _record(self, step: int, selection: Score | None) -> None:
        """One more entry of the curve; `selection`: the score on that split, where it was evaluated."""
        trust, reason = self.guide.standing if self.guides else (0.0, UNGUIDED_BRANCH)
        network = self.guide.network if self.guides else None
        predicted = None
        if network is not None:
            predicted = [float(x) for x in network.predict(self.coordinates.encode(self.phi.read()).cpu())]
        self.curve.append(
            {
                "step": step,
                "selection": None if selection is None else float(selection),
                "constraints": None if selection is None else list(selection.values),
                "trust": trust,
                "reason": reason,
                "gradient_agreement": self.guide.gradient_agreement(self.phi.read()) if trust > 0 else None,
                "rank_correlation": self.guide.trust.correlation,
                "observation_mean": float(np.mean(self.trajectory.last_round.scores)) if len(self.trajectory) else None,
                "predicted": predicted,
                "coverage": self.guide.coverage,
                "calls": self.ledger.calls["observe"],
                "passes": self.ledger.passes["observe"],
                "interpolation_error": None if self.virtual is None else self.virtual.error,
            }
        )
