"""MetricPhase: one metric phase; it observes, learns, blends and selects.

This is the sentence of the whole library, as `advance` and `correct` read it:

    phi.read -> Observer.observe -> Trajectory -> guide.observe -> guide.direction (with trust) -> blend
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import EvalPrediction

from ..evaluation.evaluator import Evaluator
from ..evaluation.observer import Observer
from ..evaluation.trajectory import Trajectory
from ..guides import Direction, Guide, GuideContext, Round, blend
from ..hub import ValueFunction
from ..phi import Coordinates, PhiSpace
from ..value import Signature
from .faults import Faults
from .result import RunResult
from .selection import Selection

logger = logging.getLogger(__name__)

UNGUIDED_BRANCH = "the unguided branch"


@dataclass(frozen=True)
class PhasePlan:
    """The numbers of a metric phase.

    Attributes:
        value_weight: lambda in `blend`.
        select_steps: optimizer steps from one evaluation on the selection split to the next.
        observe_steps: the same from one round of observations to the next.
        observations_per_step: metric calls in a round.
        max_failures: metric calls failed in a row after which guidance is switched off.
        seed: of the guide.
    """

    value_weight: float
    select_steps: int
    observe_steps: int
    observations_per_step: int
    max_failures: int
    seed: int


class MetricPhase:
    """State and work of one metric phase.

    Args:
        phi: tuned here.
        moving: what moves, and so what is selected: phi, or more of the model where the guide's `scope` is "all".
        observer: takes the observations.
        selector: the metric on the selection split; None where there is none (then the last phi stays).
        guide: follows or does not.
        make_coordinates: computes Q at the start of the phase.
        plan: the numbers.
    """

    def __init__(
        self,
        phi: PhiSpace,
        moving: PhiSpace,
        observer: Observer,
        selector: Evaluator | None,
        guide: Guide,
        make_coordinates: Callable[[], Coordinates],
        plan: PhasePlan,
    ):
        self.phi, self.moving, self.observer, self.guide = phi, moving, observer, guide
        self.make_coordinates, self.plan = make_coordinates, plan
        self.evaluator = observer.evaluator
        self.metric, self.ledger = self.evaluator.metric, self.evaluator.ledger
        self.faults = Faults(plan.max_failures, self._switch_off)
        self.selection = Selection(selector, moving, self.faults)
        self.trajectory = Trajectory()
        self.coordinates: Coordinates | None = None
        self.start_step = -1
        self.before = False  # whether this is still the run's first phase, in which everything is trained
        self.start_phi: Tensor | None = None
        self.unguided_step: int | None = None  # from here on the loss alone is followed
        self.last_phi: Tensor | None = None  # where guided training ended, whichever phi was selected
        self.direction: Direction | None = None  # of the last update
        self.curve: list[dict[str, Any]] = []  # one entry per round, for plots and logs

    @property
    def started(self) -> bool:
        return self.coordinates is not None

    @property
    def guides(self) -> bool:
        """Whether it has begun, and phi does not yet follow the loss alone."""
        return self.started and self.unguided_step is None

    def start(self, step: int, coordinates: Coordinates | None = None, before: bool = False) -> None:
        """Begin, and forget what was observed in other coordinates: what does not move stands still from here on.

        Args:
            step: optimizer steps taken so far.
            coordinates: those of an interrupted run.
            before: begin with the run's first phase, in which all of the model moves: nothing is selected there.
        """
        self.start_step, self.start_phi, self.before = step, self.moving.read(), before
        self.trajectory = Trajectory()
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
        selects, observes = since % self.plan.select_steps == 0, since % self.plan.observe_steps == 0
        selects &= not self.before
        score = self.selection.consider(step) if selects else None
        if observes and self.guides:
            count = int(min(self.plan.observations_per_step, self.ledger.remaining))
            if count > 0 and self.guide.off is None:
                self._observe(step, count)
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
        self._record(step, self.selection.consider(step))
        self.selection.confirm()
        best = self.selection.best
        if best.phi is None:
            self.moving.write(self.last_phi)
        else:
            self.moving.write(best.phi)
            of = "" if self.kept_branch == "guided" else f", in {UNGUIDED_BRANCH}"
            logger.info(
                f"Best {self.metric.name} on the selection split: {best.score:.4f} at step {best.step}{of}; this phi "
                "is kept."
            )

    @property
    def kept_branch(self) -> str:
        """Of which branch the best phi so far is."""
        guided = self.unguided_step is None or self.selection.best.step <= self.unguided_step
        return "guided" if guided else "unguided"

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
            kept_branch=self.kept_branch,
            last_phi=self.last_phi,
            unguided_step=self.unguided_step,
            curve=self.curve,
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
        return ValueFunction.of(network, signature, self.trajectory)

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
        self.trajectory = Trajectory.from_state_dict({n: t.numpy() for n, t in state["trajectory"].items()})
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

    def _observe(self, step: int, count: int) -> None:
        observed = self.observer.observe(self.coordinates, step, count, self.guide.wants_predictions)
        fine = [not self.faults.is_outlier(o.score) for o in observed.observations]
        usable = [o for o, good in zip(observed.observations, fine, strict=True) if good]
        outliers = [o for o, good in zip(observed.observations, fine, strict=True) if not good]
        errors = observed.errors + [self.faults.outlier_message(o.score) for o in outliers]
        self.faults.add(errors, succeeded=len(usable))
        if usable and self.guide.off is None:
            self.faults.accept([o.score for o in usable])
            self.trajectory.extend(usable)
            self._forget(self.faults.revoke())
            predictions = observed.predictions
            if predictions is not None:
                predictions = [p for p, good in zip(predictions, fine, strict=True) if good]
            self.guide.observe(Round(self.trajectory, predictions))

    def _forget(self, scores: list[float]) -> None:
        """These turned out to be faults of the metric: what was learned from them is learned anew without."""
        kept = self.trajectory.where(~np.isin(self.trajectory.scores, scores))
        if len(kept) < len(self.trajectory):
            self.trajectory = kept
            self.guide.start(self.guide.context)

    def _call_metric(self, prediction: EvalPrediction) -> float:
        with self.ledger.charge("observe"):
            return self.metric(prediction)

    def _switch_off(self, reason: str) -> bool:
        if self.guide.off is not None:
            return False
        self.guide.switch_off(reason)
        return True

    def _record(self, step: int, selection: float | None) -> None:
        """One more entry of the curve; `selection`: the score on that split, where it was evaluated."""
        trust, reason = self.guide.standing if self.guides else (0.0, UNGUIDED_BRANCH)
        network = self.guide.network if self.guides else None
        predicted = None
        if network is not None:
            predicted = [float(x) for x in network.predict(self.coordinates.encode(self.phi.read()).cpu())]
        self.curve.append(
            {
                "step": step,
                "selection": selection,
                "trust": trust,
                "reason": reason,
                "gradient_agreement": self.guide.gradient_agreement(self.phi.read()) if trust > 0 else None,
                "rank_correlation": self.guide.trust.correlation,
                "observation_mean": float(np.mean(self.trajectory.last_round.scores)) if len(self.trajectory) else None,
                "predicted": predicted,
                "coverage": self.guide.coverage,
                "calls": self.ledger.calls["observe"],
            }
        )
