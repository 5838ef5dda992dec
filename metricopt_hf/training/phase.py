"""MetricPhase: the last steps of a run, in which phi goes up the metric.

This is the sentence of the whole library, as `advance` reads it:

    linearise(phi) -> metric calls on outputs + jacobian z -> guide.gradient(z), blended -> a step of phi
        -> a real pass: is it better? -> the selection split
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from transformers import EvalPrediction

from ..errors import MetricError
from ..evaluation.evaluator import Evaluator
from ..evaluation.faults import Faults
from ..evaluation.linearization import Linearization
from ..evaluation.linearizer import Linearizer, NotLinearizable
from ..evaluation.local_metric import BudgetSpent, LocalMetric
from ..evaluation.noise import standard_error
from ..evaluation.ranks import agreed
from ..evaluation.trajectory import Trajectory
from ..guides import Guide, GuideContext
from ..phi import Coordinates
from ..value import ValueNetwork
from .ascent import ascend
from .plan import MOST_MOVED, PREDICTIONS, PhasePlan
from .selection import Selection

logger = logging.getLogger(__name__)

GROWTH, MOST_RATE, SMALLEST_RATE = 1.5, 4.0, 1 / 16  # of a guide's rate, relative to its first
ANNEALED = 0.0
MOST_TAKEN_BACK = 3  # steps in a row, behind which the phase ends
ATTEMPTS = 3  # of the first metric call


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
        coordinates, network: of a value function to start from.
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
        self.make_guides, self.make_optimizer, self.loss_gradients = make_guides, make_optimizer, loss_gradients
        self.observing_scores = observing_scores or plan
        self.coordinates, self.network = coordinates, network
        self.faults, self.trajectory = Faults(), Trajectory()
        self.generator = torch.Generator().manual_seed(plan.seed)
        self.linearizer = Linearizer(evaluator, plan.dim, loss_gradients, self.generator)
        self.guides: dict[str, Guide] = {}
        self.rates: dict[str, float] = {}
        self.start_step = -1
        self.value = float("nan")  # of the metric at the present phi, see `Metric.merit`
        self.last_step = -1  # that was made
        self.taken_back = 0  # steps in a row
        self.ended: str | None = None  # why no further step is made
        self.finished = False
        self.curve: list[dict[str, Any]] = []
        self._linearization: Linearization | None = None  # at the present phi
        self._drawn: Tensor | None = None  # state of the generator before it was made, which may draw rows

    @property
    def started(self) -> bool:
        """Whether the first metric step has begun."""
        return self.start_step >= 0

    def start(self, step: int, trained_seconds: float = 0.0) -> None:
        """Begin where the model is now: what is not phi stands still from here on.

        Args:
            trained_seconds: that the steps before took; a slow metric is called no longer than that.
        """
        self.phi.reset()
        self.start_step = step
        self._freeze()
        since = perf_counter()
        score, prediction = self._first_score()
        pass_seconds = perf_counter() - since
        if self.ended is not None:
            pass
        elif self.plan.observe == PREDICTIONS and prediction is not None:
            try:
                self.coordinates = self.coordinates or self.linearizer.coordinates()
                self._linearise(prediction)
                self.plan = replace(self.plan, scale=self._scale())
            except NotLinearizable as error:
                self._observe_scores(str(error))
        elif self.plan.observe == PREDICTIONS:
            self._observe_scores("the metric is computed batch by batch")
        self._keep_in_time(pass_seconds, trained_seconds)
        if self.coordinates is None:
            self.coordinates = self.linearizer.coordinates(row_by_row=False)
        if not self.plan.calls:
            self._end("metric_call_budget is 0")
        self._start_guides()
        self.selection.start(step)
        logger.info(
            f"Metric phase: steps {step + 1} to {step + self.plan.steps} follow {self.metric.name} ({score:.4f} on the "
            f"observation set at its start). Observed: {self.plan.observe}, in {self.coordinates.dim} coordinates of "
            f"the {self.phi.dim} numbers of phi; guides: {', '.join(self.guides)}."
        )

    def advance(self, step: int, loss_gradient: Callable[[], Tensor] | None = None) -> None:
        """One metric step: every guide goes up from here, and the best of their steps is taken, or none.

        Args:
            loss_gradient: gives the gradient of the loss by phi, [d]; asked for where it is blended in.
        """
        self.last_step = step
        if self.ended is None:
            if self.plan.observe == PREDICTIONS and self._linearization is None:
                self._linearise_again()
            tried = self._tried(step, loss_gradient)
            self._judge(tried, step)
            self.selection.consider(step + 1)
            if (reason := self.faults.reason) is not None:
                self._end(reason)

    def finish(self, step: int) -> None:
        """Choose among all candidates, and put the chosen phi in place."""
        self.finished = True
        self.selection.finish(step, self.evaluator)
        self._linearization = None

    # A step

    def _tried(self, step: int, loss_gradient: Callable[[], Tensor] | None) -> dict[str, tuple[float, Tensor]]:
        """(value, phi) where each guide has gone that is still followed."""
        phi, tried = self.phi.read(), {}
        gradient = None
        if self.plan.blends and loss_gradient is not None:
            gradient = (self.coordinates.basis.T @ loss_gradient()).cpu()
        followed = [name for name in self.guides if self.rates[name] >= SMALLEST_RATE]
        for name in followed:
            steps_left = max(1, self.start_step + self.plan.steps - step)
            local = self._local_metric(step, int(self.ledger.remaining / steps_left / len(followed)))
            share = (step - self.start_step) / self.plan.steps
            rate = self.rates[name] * self.plan.learning_rate(self.coordinates.dim) * (1 - ANNEALED * share)
            z = ascend(
                self.guides[name], local, self.plan.updates, rate, self.make_optimizer, gradient, self.plan.value_weight
            )
            tried[name] = self._scored(phi, z)
        return tried

    def _local_metric(self, step: int, allowance: float = float("inf")) -> LocalMetric:
        """The metric near phi, in coordinates, with a number of calls."""
        return LocalMetric(
            self.evaluator, self.coordinates, self._linearization, self.plan.spread(self.coordinates.dim),
            self.generator, self.faults, self.trajectory, step, self.value, self.plan.on_all_rows, allowance,
        )  # fmt: skip

    def _scored(self, phi: Tensor, z: Tensor) -> tuple[float, Tensor]:
        """(value, phi) with a step z from phi: minus infinity where the metric fails, or nothing has moved."""
        there = phi + self.coordinates.lift(z.to(phi.device))
        if not bool(z.any()):
            return float("-inf"), there
        with self.phi.restored():
            self.phi.write(there)
            try:
                return self.metric.merit(self.evaluator.evaluate("observe")), there
            except MetricError as error:
                self.faults.add([str(error)], succeeded=0)
                return float("-inf"), there

    def _judge(self, tried: dict[str, tuple[float, Tensor]], step: int) -> None:
        """Take the best step, unless its value is worse by more than the metric's standard error."""
        error = self._standard_error()
        best = max(tried, key=lambda name: tried[name][0], default=None)
        taken = best is not None and tried[best][0] >= self.value - error
        for name, (value, _) in tried.items():
            pays = value > self.value
            self.rates[name] = min(MOST_RATE, self.rates[name] * GROWTH) if pays else self.rates[name] / 2
        if taken:
            self.value, phi = tried[best]
            self.phi.write(phi)
            self._linearization = self._drawn = None
        self.taken_back = 0 if taken else self.taken_back + 1
        self.curve.append(
            {
                "step": step,
                "guide": best if taken else None,
                "value": self.value,
                "tried": {name: value for name, (value, _) in tried.items()},
                "standard_error": error,
                "rates": dict(self.rates),
                "calls": self.ledger.calls["observe"],
                "passes": self.ledger.passes["observe"],
            }
        )
        if not tried:
            self._end("no guide is left to follow")
        elif self.taken_back >= MOST_TAKEN_BACK:
            self._end(f"{self.taken_back} steps in a row made the metric worse, and were taken back")

    def _standard_error(self) -> float:
        """Of the metric on the observation set, as far as it is known."""
        if self._linearization is None or self.plan.on_all_rows or self.evaluator.complete is not None:
            return 0.0
        return standard_error(self.evaluator, self._linearization, self.generator)

    def _end(self, reason: str) -> None:
        self.ended = reason
        logger.warning(f"No further metric step is made: {reason}.")

    # The start

    def _first_score(self) -> tuple[float, EvalPrediction | None]:
        """The metric at the start, asked again where it fails; (nan, None) and the end of the phase where it always does."""
        for _ in range(ATTEMPTS):
            try:
                score, prediction = self.evaluator.evaluate_with_predictions("observe")
            except MetricError as error:
                self.faults.add([str(error)], succeeded=0)
                continue
            self.value = self.metric.merit(score)
            return score, prediction
        self._end(f"the metric failed {ATTEMPTS} times at its start")
        return float("nan"), None

    def _keep_in_time(self, pass_seconds: float, trained_seconds: float) -> None:
        """Lower the number of calls for a slow metric; the same on every rank, whose clocks differ."""
        evaluator = self.evaluator
        seconds = evaluator.call_seconds if self.plan.observe == PREDICTIONS else pass_seconds
        before = self.plan.calls
        self.plan = agreed(
            evaluator.rank, evaluator.world_size, lambda: self.plan.in_time(seconds, trained_seconds)
        )
        self.ledger.budget = self.plan.calls
        if self.plan.calls < before:
            logger.info(f"{self.metric.name} takes {seconds:.2g} s: it is called {self.plan.calls} times, not {before}.")

    def _linearise_again(self) -> None:
        """At the phi of the last step; behind a resume, where it was linearised before, in the same way and uncharged."""
        prediction = self.evaluator.predictions()
        if self._drawn is None:
            self._linearise(prediction)
            return
        now = self.generator.get_state()
        self.generator.set_state(self._drawn)
        self._linearization = self.linearizer.linearize(self.coordinates.basis, prediction)
        self.generator.set_state(now)

    def _linearise(self, prediction: EvalPrediction) -> None:
        self._drawn = self.generator.get_state()
        self.ledger.add("observe", 0, 0.0, passes=self.linearizer.passes(prediction))
        self._linearization = self.linearizer.linearize(self.coordinates.basis, prediction)

    def _observe_scores(self, why: str) -> None:
        """From now on every observation is a forward pass."""
        logger.warning(f"The metric's scores are observed, not the model's predictions: {why}.")
        self.plan, self._linearization, self._drawn = self.observing_scores, None, None

    def _scale(self) -> float:
        """By which perturbations must be smaller so as not to move the outputs by more than `MOST_MOVED`."""
        spread = self.plan.spread(self.coordinates.dim)
        moved = [float(leaf.jacobian.square().sum(-1).mean().sqrt()) * spread for leaf in self._linearization.leaves.values()]
        size = [float(leaf.outputs.std(correction=0)) for leaf in self._linearization.leaves.values()]
        ratio = max((m / s for m, s in zip(moved, size, strict=True) if s > 0), default=0.0)
        return min(1.0, MOST_MOVED / ratio) if ratio > 0 else 1.0

    def _start_guides(self) -> None:
        linearised = self.plan.observe == PREDICTIONS
        self.guides = self.make_guides(linearised)
        context = GuideContext(self.coordinates.dim, self.generator, self.network)
        local = self._local_metric(self.start_step)
        for name, guide in list(self.guides.items()):
            guide.start(context)
            if len(self.guides) > 1 and self.ended is None and not _applies(guide, local):
                del self.guides[name]
        self.rates = dict.fromkeys(self.guides, 1.0)

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

    # What is kept

    def log_scalars(self) -> dict[str, float]:
        """What is reported of the guidance beside Trainer's own numbers."""
        if not self.curve:
            return {}
        latest = self.curve[-1]
        scalars = {name: float(latest[name]) for name in ("standard_error", "calls", "passes")}
        scalars["value"] = self.metric.sign * self.value
        scalars |= {f"rate_{name}": rate for name, rate in self.rates.items()}
        if self.selection.latest is not None:
            scalars["selection"] = float(self.selection.latest)
        return {**scalars, "failed_calls": float(self.faults.total)}

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
            "rates": dict(self.rates),
            "guides": {name: guide.state_dict() for name, guide in self.guides.items()},
            "way": self.linearizer.way,
            "generator": self.generator.get_state(),
            "drawn": self._drawn,
            "trajectory": {name: torch.as_tensor(array) for name, array in self.trajectory.state_dict().items()},
            "faults": self.faults.state_dict(),
            "selection": self.selection.state_dict(),
            "curve": self.curve,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on as if nothing had been interrupted; phi is in place already."""
        device = self.phi.read().device
        self.plan = PhasePlan(**state["plan"])
        self.ledger.budget = self.plan.calls
        self.coordinates = Coordinates(
            state["coordinates"]["origin"].to(device), state["coordinates"]["basis"].to(device), state["coordinates"]["kind"]
        )
        self.start_step, self.value = state["start_step"], state["value"]
        self.taken_back, self.ended, self.finished = state["taken_back"], state["ended"], state["finished"]
        self.curve, self.linearizer.way = state["curve"], state["way"]
        self.faults.load_state_dict(state["faults"])
        self.selection.load_state_dict(state["selection"])
        self.trajectory = Trajectory.from_state_dict({n: t.numpy() for n, t in state["trajectory"].items()})
        self.guides = self.make_guides(self.plan.observe == PREDICTIONS)
        context = GuideContext(self.coordinates.dim, self.generator, self.network)
        self.guides = {name: guide for name, guide in self.guides.items() if name in state["guides"]}
        for name, guide in self.guides.items():
            guide.start(context)
            guide.load_state_dict(state["guides"][name])
        self.rates = dict(state["rates"])
        self.generator.set_state(state["generator"])
        self._drawn = state["drawn"]
        if not self.finished:
            self._freeze()


def _applies(guide: Guide, metric: LocalMetric) -> bool:
    try:
        return guide.applies(metric)
    except BudgetSpent:
        return False
