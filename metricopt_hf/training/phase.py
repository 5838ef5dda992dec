"""MetricPhase: one metric phase; it observes, learns, blends and selects.

This is the sentence of the whole library, as `advance` and `correct` read it:

    Rounds (phi.read -> passes -> Interpolator -> metric calls -> Trajectory -> guide.observe)
        -> guide.direction (with trust) -> blend
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import EvalPrediction

from ..evaluation.answer import values_of
from ..evaluation.constraints import ConstraintCheck
from ..evaluation.evaluator import Evaluator
from ..evaluation.noise import checked_constraints
from ..guides import Direction, Guide, GuideContext, blend
from ..hub import ValueFunction
from ..phi import Coordinates, PhiSpace
from ..phi.space import model_class
from ..value import BehaviourSignature, Signature
from .plan import PhasePlan
from .polish import polish
from .result import RunResult
from .rounds import MakePlan, Rounds
from .selection import Selection

logger = logging.getLogger(__name__)

# entries of the curve, of which every second goes when there are more
MOST_ENTRIES = 4096


class MetricPhase:
    """State and work of one metric phase.

    Args:
        phi: tuned here.
        moving: what moves, and so what is selected: phi, or more of the model where the guide's `scope` is "all".
        evaluator: the metric on the observation set.
        selector: the metric on the selection split; None where there is none (then the last phi stays).
        guide: follows or does not.
        make_coordinates: computes Q at the start of the phase.
        make_plan: makes the numbers.
    """

    def __init__(
        self,
        phi: PhiSpace,
        moving: PhiSpace,
        evaluator: Evaluator,
        selector: Evaluator | None,
        guide: Guide,
        make_coordinates: Callable[[], Coordinates],
        make_plan: MakePlan,
    ):
        self.phi, self.moving, self.evaluator, self.guide = phi, moving, evaluator, guide
        self.make_coordinates = make_coordinates
        self.metric, self.ledger = evaluator.metric, evaluator.ledger
        self.rounds = Rounds(evaluator, guide, make_plan)
        self.faults = self.rounds.faults
        self.selection = Selection(selector, moving, self.faults)
        self.coordinates: Coordinates | None = None
        self.start_step = -1
        self.before = False  # whether this is still the run's first phase, in which everything is trained
        self.start_phi: Tensor | None = None
        self.last_phi: Tensor | None = None  # where training ended, whichever phi was selected
        self.direction: Direction | None = None  # of the last update
        self.constraints: tuple[ConstraintCheck, ...] = ()  # at the best phi on the selection split
        self.curve: list[dict[str, Any]] = []  # one entry per round, for plots and logs

    @property
    def started(self) -> bool:
        return self.coordinates is not None

    @property
    def plan(self) -> PhasePlan:
        """The numbers, as they have come to be."""
        return self.rounds.plan

    @property
    def failures(self) -> int:
        """Metric calls that failed or gave an impossible answer."""
        return self.faults.total

    def start(self, step: int, coordinates: Coordinates | None = None, before: bool = False) -> None:
        """Begin, and forget what was observed in other coordinates: what does not move stands still from here on.

        Args:
            step: optimizer steps taken so far.
            coordinates: those of an interrupted run.
            before: begin with the run's first phase, in which all of the model moves: nothing is selected there.
        """
        self.start_step, self.start_phi, self.before = step, self.moving.read(), before
        self.coordinates = coordinates or self.make_coordinates()
        self.rounds.start(step, self.coordinates)
        self.phi_description = self.phi.description  # of what merging takes out nothing could be said later
        self._start_guide()
        if self.moving is self.phi and not before:
            for evaluator in (self.evaluator, self.selection.evaluator):
                if evaluator is not None:
                    evaluator.freeze(lambda: self.rounds.observer.moved(self.coordinates))

    def rehearse(self, coordinates: Coordinates) -> dict[str, Any]:
        """What `state_dict` would be right behind a `start`; the guide is started, the phase is not."""
        begun = copy.copy(self)
        begun.coordinates, begun.start_phi = coordinates, self.moving.read()
        begun._start_guide()
        return begun.state_dict()

    def due(self, step: int) -> bool:
        """Whether `advance` has something to do."""
        return self._selects(step) or self.guide.off is None and self.rounds.due(step)

    def _selects(self, step: int) -> bool:
        return (step - self.start_step) % self.plan.select_steps == 0 and not self.before

    def advance(self, step: int) -> None:
        """Before the update of `step`: select, observe and learn, where it is time to."""
        selects = self._selects(step)
        score = self.selection.consider(step) if selects else None
        observes = self.guide.off is None and self.rounds.observe(step)
        if selects or observes:
            self._record(step, score)

    def correct(self) -> None:
        """Add the guide's direction, if it has one, to the task gradient at phi."""
        if self.plan.value_weight == 0:
            return
        self.direction = self.guide.direction(self.phi.read())
        if self.direction is None:
            return
        trust = self.direction.trust
        if isinstance(trust, Tensor) or trust > 0:  # a tensor is not asked: that would wait for the device
            task_grad = self.phi.read_grad()
            self.phi.add_grad(
                blend.correction(task_grad, self.direction.vector, trust, self.plan.value_weight)
            )

    def loss(self, inputs: dict[str, Any], outputs: Any, task_loss: Tensor) -> Tensor:
        """The task's loss, or, as far as the guide is trusted, the guide's instead of it; both means over the batch."""
        trust, _ = self.guide.standing
        if trust == 0:
            return task_loss
        loss = self.guide.loss(inputs, outputs, task_loss)
        return task_loss if loss is None else task_loss + trust * (loss - task_loss)

    def finish(self, step: int) -> None:
        """The last phi is a candidate too; then the best is put in place, or `last_phi` where there is none."""
        self.last_phi = self.moving.read()
        self._record(step, self.selection.consider(step))
        if self.plan.tune_bias and self.moving is self.phi and self.metric.of_predictions:
            polish(self.evaluator, self.selection, self.start_phi, step)
        self.selection.confirm()
        best = self.selection.best
        if best.phi is None:
            self.moving.write(self.last_phi)
        else:
            self.moving.write(best.phi)
            tuned = ", with its output bias tuned" * best.bias_tuned
            logger.info(
                f"Best {self.metric.name} on the selection split: {best.score:.4f} at step {best.step}{tuned}; this "
                "phi is kept."
            )
        if self.metric.constraints and best.phi is not None:
            on_all_rows = self.plan.observe == "predictions_on_all_rows"
            self.constraints = checked_constraints(self.selection.evaluator, on_all_rows, best.raw)
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
            bias_tuned=best.bias_tuned,
            last_phi=self.last_phi,
            curve=self.curve,
            constraints=self.constraints,
            keys=self.metric.keys,
            trajectory=self.rounds.trajectory,
            ledger=self.ledger,
            failed_calls=self.failures,
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
        coordinates, model = self.coordinates, model_class(self.phi.model)
        metric = self.metric.name, self.metric.greater_is_better
        if self.guide.behaviour is not None:
            behaviour, seen = self.guide.behaviour
            return ValueFunction.of(network, BehaviourSignature(model, behaviour, *metric), seen)
        signature = Signature(
            model,
            self.phi_description,
            coordinates.kind,
            *metric,
            coordinates.origin.cpu(),
            None if coordinates.basis is None else coordinates.basis.cpu(),
        )
        return ValueFunction.of(network, signature, self.rounds.trajectory.joined(self.rounds.interpolated))

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
        scalars["failed_calls"] = float(self.failures)
        return {name: value for name, value in scalars.items() if np.isfinite(value)}

    def state_dict(self) -> dict[str, Any]:
        """Nested dicts and lists of tensors and JSON values."""
        return {
            "start_step": self.start_step,
            "before": self.before,
            "start_phi": self.start_phi,
            "origin": self.coordinates.origin,
            "basis": self.coordinates.basis,
            "coordinates": self.coordinates.kind,
            "rounds": self.rounds.state_dict(),
            "guide": self.guide.state_dict(),
            "selection": self.selection.state_dict(),
            "curve": self.curve,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        device = self.phi.read().device

        def here(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device)

        coordinates = Coordinates(here(state["origin"]), here(state["basis"]), state["coordinates"])
        self.start(state["start_step"], coordinates, state["before"])
        self.start_phi = here(state["start_phi"])
        self.rounds.load_state_dict(state["rounds"])
        self.guide.load_state_dict(state["guide"])
        self.selection.load_state_dict(state["selection"])
        self.curve = state["curve"]

    def _start_guide(self) -> None:
        self.guide.start(
            GuideContext(
                self.coordinates,
                self.metric.greater_is_better,
                torch.Generator().manual_seed(self.plan.seed),
                self._call_metric,
                self.plan.value_weight,
            )
        )

    def _call_metric(self, prediction: EvalPrediction) -> float:
        with self.ledger.charge("observe"):
            return self.metric(prediction)

    def _record(self, step: int, selection: float | None) -> None:
        """One more entry of the curve; `selection`: the score on that split, where it was evaluated."""
        trust, reason = self.guide.standing
        latest, virtual = self.rounds.trajectory.last_round, self.rounds.virtual
        predicted = self.guide.expect(self.phi.read())
        self.curve.append(
            {
                "step": step,
                "selection": None if selection is None else float(selection),
                "constraints": None if selection is None else list(values_of(selection)),
                "trust": trust,
                "reason": reason,
                "gradient_agreement": self.guide.gradient_agreement(self.phi.read()) if trust > 0 else None,
                "rank_correlation": self.guide.trust.correlation,
                "observation_mean": float(np.mean(latest.scores)) if len(latest) else None,
                "predicted": None if predicted is None else list(predicted),
                "coverage": self.guide.coverage,
                "calls": self.ledger.calls["observe"],
                "passes": self.ledger.passes["observe"],
                "interpolation_error": None if virtual is None else virtual.error,
            }
        )
        if len(self.curve) > MOST_ENTRIES:
            del self.curve[1::2]
