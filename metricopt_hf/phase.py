"""MetricPhase: the part of a run in which phi is tuned for the metric. It observes, learns, blends and selects.

This is the sentence of the whole library, as `advance` and `correct` read it:

    phi.read -> Observer.observe -> Observation -> Trajectory -> guide.learn -> guide.direction (with trust) -> blend
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import blend
from .errors import MetricError
from .evaluator import Evaluator
from .guide import Direction, Guide
from .metric import Metric
from .observer import Observer, on_main
from .phi import Coordinates, PhiSpace
from .trajectory import Trajectory
from .value import Domain, ValueFunction

logger = logging.getLogger(__name__)

# a score this many times the range of all earlier ones away from them is taken for a fault of the metric
OUTLIER_RANGES = 20
MIN_SCORES_FOR_OUTLIERS = 16
OUTLIER = "The metric returned {}, far outside of everything that it returned so far."
LOSS_ALONE = "the loss alone"


@dataclass(frozen=True)
class Selection:
    """The best phi so far by the selection split.

    Attributes:
        phi: [d], or None before the first candidate.
        score: the metric on the selection split.
        step: optimizer steps taken before it.
    """

    phi: Tensor | None = None
    score: float = float("nan")
    step: int = -1


class MetricPhase:
    """State and work of one metric phase.

    Args:
        phi: tuned here.
        metric: says which way is better.
        observer: takes the observations.
        selector: the metric on the selection split; None where there is none (then the last phi stays).
        guide: follows or does not.
        make_coordinates: computes Q at the start of the phase.
        value_weight: lambda in `blend`.
        select_steps: optimizer steps from one look at the selection split to the next.
        observe_steps: the same from one round of observations to the next.
        observations_per_step: metric calls in a round.
        max_failures: metric calls failed in a row after which guidance is switched off.
        seed: of the guide.
    """

    def __init__(
        self,
        phi: PhiSpace,
        metric: Metric,
        observer: Observer,
        selector: Evaluator | None,
        guide: Guide,
        make_coordinates: Callable[[], Coordinates],
        value_weight: float,
        select_steps: int,
        observe_steps: int,
        observations_per_step: int,
        max_failures: int,
        seed: int,
    ):
        self.phi, self.metric, self.observer, self.selector, self.guide = phi, metric, observer, selector, guide
        self.make_coordinates, self.value_weight = make_coordinates, value_weight
        self.select_steps, self.observe_steps = select_steps, observe_steps
        self.observations_per_step = observations_per_step
        self.max_failures, self.seed = max_failures, seed
        self.ledger = observer.evaluators[0].ledger
        self.trajectory = Trajectory()
        self.selection = Selection()
        self.coordinates: Coordinates | None = None
        self.start_step = -1
        self.start_phi: Tensor | None = None
        self.alone_step: int | None = None  # from here on the loss alone is followed
        self.failures, self.failures_in_a_row = 0, 0
        self.last_phi: Tensor | None = None  # where guided training ended, whichever phi was selected
        self.direction: Direction | None = None  # of the last update
        self.curve: list[dict[str, Any]] = []  # one entry per round, for plots and logs

    @property
    def started(self) -> bool:
        return self.coordinates is not None

    @property
    def guides(self) -> bool:
        """Whether it has begun, and phi does not yet follow the loss alone."""
        return self.started and self.alone_step is None

    @property
    def guidance_is_kept(self) -> bool:
        """Whether the best phi by the selection split, so far, is of the guided steps and not of the loss alone."""
        return self.alone_step is None or self.selection.step <= self.alone_step

    @property
    def value_function(self) -> ValueFunction | None:
        """The guide's value function, if it has one, with all that others need to use it."""
        value_function = getattr(self.guide, "value_function", None)
        if value_function is not None and self.started:
            coordinates = self.coordinates
            value_function.domain = Domain(
                type(self.phi.model).__name__,
                self.phi_description,
                coordinates.kind,
                self.metric.name,
                self.metric.greater_is_better,
                coordinates.origin.cpu(),
                None if coordinates.basis is None else coordinates.basis.cpu(),
            )
            value_function.observations = self.trajectory
        return value_function

    def start(self, step: int, coordinates: Coordinates | None = None) -> None:
        """Begin: everything outside phi stands still from here on."""
        self.start_step, self.start_phi = step, self.phi.read()
        self.coordinates = coordinates or self.make_coordinates()
        self.phi_description = self.phi.description  # of what folding takes out nothing could be said later
        self.guide.start(self.coordinates, self.metric.greater_is_better, self.seed)
        for evaluator in (*self.observer.evaluators, self.selector):
            if evaluator is not None:
                evaluator.freeze(self.phi.names, lambda: self.observer.moved(self.coordinates))

    def advance(self, step: int) -> None:
        """Before the update of `step`: select, observe and learn, where it is time to."""
        if step == self.alone_step:  # phi is where the phase began, and was looked at then
            return
        since = step - self.start_step
        selects, observes = since % self.select_steps == 0, since % self.observe_steps == 0
        score = self.select(step) if selects else None
        if observes and self.guides:
            count = int(min(self.observations_per_step, self.ledger.remaining))
            if count > 0 and self.guide.off is None:
                self._observe(step, count)
        if selects or observes:
            self._record(step, score)

    def correct(self) -> None:
        """Add the value gradient to the task gradient at phi."""
        if self.value_weight == 0 or not self.guides:
            return
        self.direction = self.guide.direction(self.phi.read())
        if self.direction.trust > 0:
            task_grad = self.phi.read_grad()
            self.phi.add_grad(
                blend.correction(task_grad, self.direction.vector, self.direction.trust, self.value_weight)
            )

    def begin_loss_alone(self, step: int) -> None:
        """Before the forward pass of `step`: back to where the phase began, to go on by the loss alone.

        The last guided phi is a candidate, and so are all that follow.
        """
        self.last_phi = self.phi.read()
        self._record(step, self.select(step))
        self.phi.write(self.start_phi)
        self.alone_step = step

    def select(self, step: int) -> float | None:
        """Measure the present phi on the selection split, and remember it if it is the best; None if that failed."""
        if self.selector is None:
            return None
        try:
            score = on_main(self.selector, "select", self.observer.rank, self.observer.world_size)
            if self._outlier(score):
                raise MetricError(OUTLIER.format(score))
        except MetricError as error:
            self._failed([str(error)], succeeded=0)
            return None
        if self.selection.phi is None or self.metric.sign * (score - self.selection.score) > 0:
            self.selection = Selection(self.phi.read(), score, step)
        return score

    def finish(self, step: int) -> None:
        """The last phi is a candidate too; then the best is put in place, or `last_phi` where there is none."""
        if self.guides:
            self.last_phi = self.phi.read()
        self._record(step, self.select(step))
        if self.selection.phi is None:
            self.phi.write(self.last_phi)
        else:
            self.phi.write(self.selection.phi)
            logger.info(
                f"Best {self.metric.name} on the selection split: {self.selection.score:.4f} at step "
                f"{self.selection.step}{'' if self.guidance_is_kept else f', by {LOSS_ALONE}'}; this phi is kept."
            )

    def log_scalars(self) -> dict[str, float]:
        """What is reported of the guidance beside Trainer's own numbers."""
        if not self.curve:
            return {}
        latest = self.curve[-1]
        names = ("selection", "trust", "certainty", "rank_correlation", "observation_mean", "coverage", "calls")
        scalars = {name: float(latest[name]) for name in names if latest.get(name) is not None}
        scalars["failed_calls"] = float(self.failures)
        return {name: value for name, value in scalars.items() if np.isfinite(value)}

    def state_dict(self) -> dict[str, Any]:
        """Nested dict of tensors and JSON values."""
        return {
            "start_step": self.start_step,
            "start_phi": self.start_phi,
            "alone_step": self.alone_step,
            "origin": self.coordinates.origin,
            "basis": self.coordinates.basis,
            "coordinates": self.coordinates.kind,
            "trajectory": {name: torch.as_tensor(array) for name, array in self.trajectory.state_dict().items()},
            "guide": self.guide.state_dict(),
            "generator": self.observer.generator.get_state(),
            "selection": {"phi": self.selection.phi, "score": self.selection.score, "step": self.selection.step},
            "failures": [self.failures, self.failures_in_a_row],
            "curve": self.curve,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        device = self.phi.read().device
        basis = state["basis"]
        basis = None if basis is None else basis.to(device)
        coordinates = Coordinates(state["origin"].to(device), basis, state["coordinates"])
        self.start(state["start_step"], coordinates)
        self.start_phi, self.alone_step = state["start_phi"].to(device), state["alone_step"]
        self.trajectory = Trajectory.from_state_dict({n: t.numpy() for n, t in state["trajectory"].items()})
        self.guide.load_state_dict(state["guide"])
        self.observer.generator.set_state(state["generator"].to(torch.uint8))
        phi = state["selection"]["phi"]
        self.selection = Selection(**{**state["selection"], "phi": None if phi is None else phi.to(device)})
        self.failures, self.failures_in_a_row = state["failures"]
        self.curve = state["curve"]

    def _observe(self, step: int, count: int) -> None:
        observations, errors = self.observer.observe(self.coordinates, step, count)
        usable = [o for o in observations if not self._outlier(o.score)]
        errors += [OUTLIER.format(o.score) for o in observations if self._outlier(o.score)]
        self._failed(errors, succeeded=len(usable))
        if usable and self.guide.off is None:
            self.trajectory.extend(usable)
            self.guide.learn(self.trajectory)

    def _record(self, step: int, selection: float | None) -> None:
        """One more entry of the curve; `selection`: the score on that split, where it was looked at."""
        trust, reason = self.guide.standing if self.guides else (0.0, LOSS_ALONE)
        self.curve.append(
            {
                "step": step,
                "selection": selection,
                "trust": trust,
                "reason": reason,
                "certainty": self.guide.certainty(self.phi.read()) if trust > 0 else None,
                "rank_correlation": self.guide.trust.correlation,
                "observation_mean": float(np.mean(self.trajectory.last_round.scores)) if len(self.trajectory) else None,
                "predicted": self._predicted() if self.guides else None,
                "coverage": self.guide.coverage,
                "calls": self.ledger.calls["observe"],
            }
        )

    def _outlier(self, score: float) -> bool:
        """Whether `score` lies so far from all earlier ones, on either split, that it is taken for a fault."""
        selections = [entry["selection"] for entry in self.curve if entry["selection"] is not None]
        scores = np.append(self.trajectory.scores, selections)
        if len(scores) < MIN_SCORES_FOR_OUTLIERS or np.ptp(scores) == 0:
            return False
        return abs(score - np.median(scores)) > OUTLIER_RANGES * np.ptp(scores)

    def _failed(self, errors: list[str], succeeded: int) -> None:
        """Count failed calls; a run goes on without guidance rather than end."""
        self.failures += len(errors)
        self.failures_in_a_row = 0 if succeeded else self.failures_in_a_row + len(errors)
        for error in errors:
            logger.warning(f"{error} The observation is dropped ({self.failures_in_a_row} failed in a row).")
        if self.failures_in_a_row >= self.max_failures and self.guide.off is None:
            self.guide.switch_off(f"the metric failed {self.failures_in_a_row} times in a row")
            logger.warning(f"Guidance is {self.guide.off}. Training goes on with the loss alone.")

    def _predicted(self) -> list[float] | None:
        """Mean and standard deviation that the guide's value function, if it has one, expects at the present phi."""
        value_function = getattr(self.guide, "value_function", None)
        if value_function is None or not self.guide.fitted:
            return None
        return [float(x) for x in value_function.predict(self.coordinates.encode(self.phi.read()).cpu())]
