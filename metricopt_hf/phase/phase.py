"""MetricPhase: the last steps of a run, in which phi goes up the metric.

This is the sentence of the whole library, as `advance` reads it:

    linearise(phi) -> metric calls on outputs + jacobian z -> guide.gradient(z), blended -> a step of phi
        -> a real pass: is it better?
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from time import perf_counter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer
from transformers import EvalPrediction

from ..errors import MetricError
from ..evaluation.evaluator import Evaluator, agreed
from ..evaluation.ledger import Faults
from ..guides import Guide, GuideContext
from ..linear.linearization import Linearization
from ..linear.linearizer import Linearizer, NotLinearizable
from ..linear.local_metric import LocalMetric
from ..linear.noise import standard_error
from ..phi import Coordinates
from ..value import Trajectory, ValueNetwork
from .ascent import ascend
from .plan import FEW_CALLS, MOST_MOVED, PREDICTIONS, PhasePlan
from .selection import Selection
from .trust import Trust

logger = logging.getLogger(__name__)

FIRST_SHARE = 2 / 3  # of a step's metric calls, for the first of two guides; the next has the rest
ANNEALED = 0.5  # share of a guide's rate that is gone at the last step
MOST_TAKEN_BACK = 3  # steps in a row, behind which the phase ends
ATTEMPTS = 3  # at the first metric call


class Step(NamedTuple):
    """A step that a guide has made.

    Attributes:
        value: the metric behind it, greater is better.
        phi: [d] behind it.
        prediction: the model's predictions there.
    """

    value: float
    phi: Tensor
    prediction: EvalPrediction | None = None


class MetricPhase:
    """State and work of one metric phase.

    Args:
        evaluator: phi, and the metric on the observation set.
        selection: chooses among candidates.
        plan: the numbers.
        make_guides: whether predictions are linearised -> the guides, by name. Each goes up from the same
            linearization, and the step behind which the model scores best is taken.
        make_optimizer: (parameter, learning rate) -> an optimizer of the user's class over it.
        loss_gradients: count -> [count, d], gradients of the loss by phi on as many mini-batches.
        observing_scores: the plan where predictions cannot be linearised.
        coordinates, network: those of a value function to start from.
    """

    def __init__(
        self,
        evaluator: Evaluator,
        selection: Selection,
        plan: PhasePlan,
        make_guides: Callable[[bool], dict[str, Guide]],
        make_optimizer: Callable[[Tensor, float], Optimizer],
        loss_gradients: Callable[[int], Tensor] | None = None,
        observing_scores: PhasePlan | None = None,
        coordinates: Coordinates | None = None,
        network: ValueNetwork | None = None,
    ):
        self.evaluator, self.selection, self.plan = evaluator, selection, plan
        self.phi, self.metric, self.ledger = evaluator.phi, evaluator.metric, evaluator.ledger
        self.trust, self.make_optimizer = Trust(make_guides), make_optimizer
        self.observing_scores = observing_scores or plan
        self.coordinates: Coordinates  # from the start of the phase on
        self.given, self.network = coordinates, network
        self.faults, self.trajectory = Faults(), Trajectory()
        self.generator = torch.Generator().manual_seed(plan.seed)
        self.linearizer = Linearizer(evaluator, plan.dim, loss_gradients, self.generator)
        self.value = float("nan")  # the metric at the present phi, greater is better
        self.start_step = self.last_step = -1  # the first metric step, the latest one
        self.taken_back = 0  # steps in a row
        self.ended: str | None = None  # why no further step is made
        self.finished = False
        self.value_function: Any = None  # fitted to the observations, see `reporting.value_function_of`
        self.curve: list[dict[str, Any]] = []
        self._linearization: Linearization | None = None  # at the present phi
        self._prediction: EvalPrediction | None = None  # there

    @property
    def started(self) -> bool:
        """Whether the first metric step has begun."""
        return self.start_step >= 0

    def start(self, step: int, trained_seconds: float = 0.0) -> None:
        """Begin at the present model: all but phi is frozen from here on.

        Args:
            trained_seconds: duration of the steps before; the calls of a slow metric take no longer.
        """
        self.phi.reset()
        self.start_step = step
        self._freeze()
        since, coordinates = perf_counter(), self.given
        score, prediction = self._first_score()
        pass_seconds = perf_counter() - since
        if self.ended is None and self.plan.observe == PREDICTIONS and prediction is not None:
            try:
                self.coordinates = coordinates = coordinates or self.linearizer.coordinates(prediction)
                linear = self._linearise(prediction)
                self.plan = self.plan.for_outputs(linear)
                self.plan = replace(self.plan, scale=self._scale(linear))
            except NotLinearizable as error:
                self._observe_scores(str(error))
        elif self.ended is None and self.plan.observe == PREDICTIONS:
            self._observe_scores("the metric is computed batch by batch")
        self._keep_in_time(pass_seconds, trained_seconds)
        self.coordinates = coordinates or self.linearizer.coordinates(None)
        if not self.plan.calls:
            self._end("metric_call_budget is 0")
        context = GuideContext(self.coordinates.dim, self.generator, self.network)
        asked = self._local_metric(step) if self.ended is None else None
        self.trust.start(self.plan.observe == PREDICTIONS, context, asked)
        if self.ended is None and not self.trust.guides:
            self._end("the guide has nothing to say of this metric (row moves are for metrics of decisions)")
        self.selection.start(step)
        logger.info(
            f"Metric phase: steps {step + 1} to {step + self.plan.steps} follow {self.metric.name} ({score:.4f} on the "
            f"observation set at its start). Observed: {self.plan.observe}, in {self.coordinates.dim} coordinates of "
            f"the {self.phi.dim} numbers of phi; guides: {', '.join(self.trust.guides)}."
        )

    def advance(self, step: int, loss_gradient: Callable[[], Tensor] | None = None) -> None:
        """One metric step: every guide goes up from here, and the best of their steps is taken, or none.

        Args:
            loss_gradient: gives the gradient of the loss by phi, [d]; asked for where it is blended in.
        """
        self.last_step = step
        if self.ended is None:
            if self.plan.observe == PREDICTIONS and self._linearization is None:
                self._linearise(self._prediction or self.evaluator.predictions())
            tried = self._tried(step, loss_gradient)
            self._judge(tried, step)
            if (reason := self.faults.reason) is not None:
                self._end(reason)

    def finish(self, step: int) -> None:
        """Choose among all candidates, and put the chosen phi in place."""
        self.finished = True
        self.selection.finish(step, self.evaluator)
        self._linearization = None

    # A step

    def _tried(self, step: int, loss_gradient: Callable[[], Tensor] | None) -> dict[str, Step]:
        """The step of each guide that is still followed."""
        phi, tried, gradient, followed = self.phi.read(), {}, None, self.trust.followed
        if self.plan.blends and loss_gradient is not None:
            gradient = (self.coordinates.basis.T @ loss_gradient()).cpu()
        left = self.ledger.remaining / max(1, self.start_step + self.plan.steps - step)  # calls of this step
        for i, name in enumerate(followed):
            before = self.ledger.calls["observe"]
            share_of_left = 1.0 if i == len(followed) - 1 else FIRST_SHARE
            to_come = len(followed) - i  # real passes: one is charged behind each guide's step
            local = self._local_metric(step, max(0, int(min(share_of_left * left, self.ledger.remaining - to_come))))
            share = (step - self.start_step) / self.plan.steps
            rate = self.trust.rates[name] * self.plan.learning_rate(self.coordinates.dim) * (1 - ANNEALED * share)
            guide = self.trust.guides[name]
            z = ascend(guide, local, self.plan.updates, rate, self.make_optimizer, gradient, self.plan.value_weight)
            left -= self.ledger.calls["observe"] - before
            tried[name] = self._scored(phi, z)
        return tried

    def _local_metric(self, step: int, allowance: float = float("inf")) -> LocalMetric:
        """The metric near phi, in coordinates, with a number of calls."""
        spread, kept = self.plan.spread(self.coordinates.dim), (self.generator, self.faults, self.trajectory)
        parts = self.evaluator, self.coordinates, self._linearization, spread
        return LocalMetric(*parts, *kept, step, self.value, self.plan.on_all_rows, allowance)

    def _scored(self, phi: Tensor, z: Tensor) -> Step:
        """A step z from phi; its value is minus infinity where the metric fails, or nothing has moved."""
        there = phi + self.coordinates.lift(z.to(phi.device))
        if not bool(z.any()):
            return Step(float("-inf"), there)
        with self.phi.restored():
            self.phi.write(there)
            try:
                score, prediction = self.evaluator.evaluate_with_predictions("observe")
                return Step(self.metric.sign * score, there, prediction)
            except MetricError as error:
                self.faults.add([str(error)], succeeded=0)
                return Step(float("-inf"), there)

    def _judge(self, tried: dict[str, Step], step: int) -> None:
        """Take the best step, unless its value is worse by more than the metric's standard error."""
        error, before = self._standard_error(), self.value
        best = max(tried, key=lambda name: tried[name].value, default="")
        taken = bool(tried) and tried[best].value >= self.value - error
        self.trust.judge({name: made.value for name, made in tried.items()}, self.value)
        if taken:
            self.value, self._prediction = tried[best].value, tried[best].prediction
            self.phi.write(tried[best].phi)
            self.selection.visit()
        self._linearization = None
        self.taken_back = 0 if taken else self.taken_back + 1
        self.curve.append(
            {
                "step": step,
                "guide": best if taken else None,
                "before": before,
                "value": self.value,
                "tried": {name: made.value for name, made in tried.items()},
                "standard_error": error,
                "rates": dict(self.trust.rates),
                "calls": self.ledger.calls["observe"],
                "passes": self.ledger.passes["observe"],
            }
        )
        if not tried:
            self._end("no guide is left to follow")
        elif self.taken_back >= MOST_TAKEN_BACK:
            self._end(f"{self.taken_back} steps in a row made the metric worse, and were taken back")

    def _standard_error(self) -> float:
        """Standard error of the metric on the observation set, of few calls the first step's; 0: it is not known."""
        if self.curve and self.plan.calls < FEW_CALLS * self.plan.steps:
            return self.curve[-1]["standard_error"]
        if self._linearization is None or self.plan.on_all_rows or self.evaluator.complete is not None:
            return 0.0
        return standard_error(self.evaluator, self._linearization, self.generator)

    def _end(self, reason: str) -> None:
        self.ended = reason
        logger.warning(f"No further metric step is made: {reason}.")

    # The start

    def _first_score(self) -> tuple[float, EvalPrediction | None]:
        """The metric at the start, asked again where it fails; where it always does, the phase ends."""
        for _ in range(ATTEMPTS):
            try:
                score, self._prediction = self.evaluator.evaluate_with_predictions("observe")
            except MetricError as error:
                self.faults.add([str(error)], succeeded=0)
                continue
            self.value = self.metric.sign * score
            return score, self._prediction
        self._end(f"the metric failed {ATTEMPTS} times at its start")
        return float("nan"), None

    def _keep_in_time(self, pass_seconds: float, trained_seconds: float) -> None:
        """Lower the number of calls for a slow metric; the same on every rank, whose clocks differ."""
        evaluator, before = self.evaluator, self.plan.calls
        seconds = evaluator.call_seconds if self.plan.observe == PREDICTIONS else pass_seconds
        in_time = agreed(evaluator.rank, evaluator.world_size, lambda: self.plan.in_time(seconds, trained_seconds))
        self.plan, self.ledger.budget = in_time, in_time.calls
        if in_time.calls < before:
            logger.info(f"{self.metric.name} takes {seconds:.2g} s: it is called {in_time.calls} times, not {before}.")

    def _linearise(self, prediction: EvalPrediction) -> Linearization:
        self._linearization = linear = self.linearizer.linearize(self.coordinates.basis, prediction)
        self.ledger.add("observe", 0, 0.0, passes=self.linearizer.cost(prediction, self.coordinates.dim).passes)
        return linear

    def _observe_scores(self, why: str) -> None:
        """Observe scores, a forward pass each, from now on."""
        logger.warning(f"The metric's scores are observed, not the model's predictions: {why}.")
        self.plan, self._linearization = self.observing_scores, None
        self.ledger.budget = self.plan.calls

    def _scale(self, linear: Linearization) -> float:
        """Factor on perturbations that keeps them from moving the outputs by more than `MOST_MOVED`."""
        ratio = linear.movement(self.plan.spread(self.coordinates.dim))
        return min(1.0, MOST_MOVED / ratio) if ratio > 0 else 1.0

    @contextmanager
    def _moved(self):
        with self.phi.restored():
            noise = torch.randn(self.phi.dim, generator=torch.Generator().manual_seed(0))
            self.phi.write(self.phi.read() + 0.1 * noise.to(self.phi.read().device))
            yield

    def _freeze(self) -> None:
        for evaluator in (self.evaluator, self.selection.evaluator):
            if evaluator is not None:
                evaluator.freeze(self._moved)

    # Logs and checkpoints

    def log_scalars(self) -> dict[str, float]:
        """The numbers of the phase for Trainer's log."""
        if not self.curve:
            return {}
        scalars = {name: float(self.curve[-1][name]) for name in ("standard_error", "calls", "passes")}
        scalars |= {"value": self.metric.sign * self.value, "failed_calls": float(self.faults.total)}
        return scalars | {f"rate_{name}": rate for name, rate in self.trust.rates.items()}

    def state_dict(self) -> dict[str, Any]:
        """Nested dicts and lists of tensors and plain values."""
        return {
            "start_step": self.start_step,
            "plan": vars(self.plan),
            "coordinates": vars(self.coordinates),
            "value": self.value,
            "taken_back": self.taken_back,
            "ended": self.ended,
            "finished": self.finished,
            "trust": self.trust.state_dict(),
            "way": self.linearizer.way,
            "generator": self.generator.get_state(),
            "trajectory": self.trajectory.rows,
            "faults": self.faults.state_dict(),
            "selection": self.selection.state_dict(),
            "curve": self.curve,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on as if nothing had been interrupted; phi is in place already."""
        device, saved = self.phi.read().device, state["coordinates"]
        self.plan = PhasePlan(**state["plan"])
        self.ledger.budget = self.plan.calls
        self.coordinates = Coordinates(saved["origin"].to(device), saved["basis"].to(device), saved["kind"])
        self.start_step, self.value = state["start_step"], state["value"]
        self.taken_back, self.ended, self.finished = state["taken_back"], state["ended"], state["finished"]
        self.curve, self.linearizer.way = state["curve"], state["way"]
        self.faults.load_state_dict(state["faults"])
        self.selection.load_state_dict(state["selection"])
        self.trajectory = Trajectory(state["trajectory"])
        context = GuideContext(self.coordinates.dim, self.generator, self.network)
        self.trust.load_state_dict(state["trust"], self.plan.observe == PREDICTIONS, context)
        self.generator.set_state(state["generator"])
        if not self.finished:
            self._freeze()
