"""Selection: which candidate of a run becomes the model that comes out, by the metric on a split of its own.

There are three: the model at the start of the metric phase, the same with a tuned bias per logit, which is the cheap
rival of every method, and the mean of phi over the last half of the steps that were taken. A mean has less to fit by
chance than the best of many steps, and so few candidates leave the selection split little to be fooled by.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import EvalPrediction

from ..errors import MetricError
from ..evaluation.evaluator import Evaluator
from ..evaluation.ledger import Faults
from ..linear.noise import paired_error
from ..phi import PhiSpace
from ..phi.space import whole
from ..posthoc import with_tuned_bias

logger = logging.getLogger(__name__)

START, BIAS, MEAN = "start", "start, bias tuned", "mean of the last steps"  # kinds of candidates
MARGIN = 0.75  # standard errors of the difference by which the steps must beat the cheap candidates
SEEN = 0.2  # weight of the same difference on the observation split, which the steps were fitted to, beside that
SHARE = 0.5  # of a gain: the most by which a second call of the metric may differ from the first


@dataclass(frozen=True, eq=False)  # one is itself alone: its phi cannot be asked whether it is equal
class Candidate:
    """A phi and its score.

    Attributes:
        kind: one of START, BIAS, MEAN.
        phi: [d].
        step: optimizer steps taken before it.
        score: the metric on the selection split; nan where it failed.
    """

    kind: str
    phi: Tensor
    step: int
    score: float = float("nan")

    @property
    def known(self) -> bool:
        """Whether there is a score."""
        return bool(np.isfinite(self.score))


class Selection:
    """Evaluates candidates, and chooses one.

    Args:
        evaluator: the metric on the selection split; None where there is none: then nothing is held against the steps.
        phi: what candidates are of.
        on_all_rows: whether the metric makes sense on all rows only: then no error of a difference is known.
    """

    def __init__(self, evaluator: Evaluator | None, phi: PhiSpace, on_all_rows: bool = False):
        self.evaluator, self.phi, self.on_all_rows = evaluator, phi, on_all_rows
        self.candidates: list[Candidate] = []
        self.steps: list[Tensor] = []  # phi behind each step that was taken
        self.chosen: Candidate | None = None
        self.why = ""
        self.weights: list[Tensor] = []  # the parameters at the chosen phi
        self.faults = Faults()
        self._predictions: dict[str, EvalPrediction | None] = {}  # by kind of candidate

    def start(self, step: int) -> None:
        """The present phi is the model at the start of the phase."""
        self.candidates = [self._scored(Candidate(START, self.phi.read(), step))]

    def visit(self) -> None:
        """A step was taken to the present phi."""
        self.steps.append(self.phi.read())

    def finish(self, step: int, observation: Evaluator) -> None:
        """Choose, and put the chosen phi in place.

        Args:
            step: optimizer steps taken so far.
            observation: the metric on the observation set, on which a bias is tuned.
        """
        start = self.candidates[0]
        if (tuned := with_tuned_bias(observation, start.phi)) is not None:
            self.candidates.append(self._scored(Candidate(BIAS, tuned, step)))
        if self.steps:
            mean = torch.stack(self.steps[len(self.steps) // 2 :]).mean(0)
            self.candidates.append(self._scored(Candidate(MEAN, mean, step)))
        self.chosen = self._choose(observation)
        self.phi.write(self.chosen.phi)
        self.weights = [whole(parameter.detach()).clone() for parameter in self.phi.parameters]
        self._predictions.clear()
        logger.info(f"Kept: {self.chosen.kind}; {self.why}.")

    def _choose(self, observation: Evaluator) -> Candidate:
        """The steps, if they are better by `MARGIN` and their score comes out again; else the better of the others."""
        ascent = next((candidate for candidate in self.candidates if candidate.kind == MEAN), None)
        if ascent is None:
            self.why = "no step was taken"
        elif self.evaluator is None:
            self.why = "there is no selection split that could say otherwise"
            return ascent
        known = [candidate for candidate in self.candidates if candidate.known]
        cheap = max((c for c in known if c is not ascent), key=self._value, default=self.candidates[0])
        if ascent is None:
            return cheap
        if not ascent.known:
            self.why = "the metric fails behind the steps"
            return cheap
        if not cheap.known:
            self.why = "the metric fails at the start"
            return ascent
        gain = self._value(ascent) - self._value(cheap)
        error = self._error(ascent, cheap)
        evidence = gain + SEEN * self._gain_on(observation, ascent, cheap)
        pays = evidence > 0 and not evidence < MARGIN * error
        verdict = "better" if pays else "not clearly better"
        self.why = f"the steps are {verdict} than {cheap.kind}: {gain:+.4g} ± {error:.2g}"
        if pays and not self._comes_out_again(ascent, abs(gain)):
            self.why += ", which does not come out again when the metric is asked again"
            pays = False
        return ascent if pays else cheap

    def _value(self, candidate: Candidate) -> float:
        """The score, greater is better."""
        return candidate.score if self.evaluator is None else self.evaluator.metric.sign * candidate.score

    def _gain_on(self, observation: Evaluator, first: Candidate, second: Candidate) -> float:
        """By how much one candidate is better than another on the observation split; 0 where the metric fails."""
        values = []
        with self.phi.restored():
            for candidate in (first, second):
                self.phi.write(candidate.phi)
                try:
                    values.append(observation.metric.sign * observation.evaluate("select"))
                except MetricError as error:
                    self.faults.add([str(error)], succeeded=0)
                    return 0.0
        return values[0] - values[1]

    def _comes_out_again(self, candidate: Candidate, gain: float) -> bool:
        """Whether a second call of the metric confirms a score."""
        again = self._scored(candidate)
        return again.known and self._value(candidate) - self._value(again) <= SHARE * gain

    def _error(self, first: Candidate, second: Candidate) -> float:
        """Standard error of the difference of two candidates' scores; nan where it is not known."""
        one, other, evaluator = self._prediction_of(first), self._prediction_of(second), self.evaluator
        if one is None or other is None or evaluator is None or self.on_all_rows or evaluator.complete is not None:
            return float("nan")
        return paired_error(evaluator, one, other)

    def _prediction_of(self, candidate: Candidate) -> EvalPrediction | None:
        """The model's predictions there, made again after a resume; None if the metric takes none of all rows."""
        kept, evaluator = candidate.kind in self._predictions, self.evaluator
        if evaluator is not None and not kept and evaluator.metric.of_predictions and not evaluator.metric.batchwise:
            with self.phi.restored():
                self.phi.write(candidate.phi)
                self._predictions[candidate.kind] = evaluator.predictions()
        return self._predictions.get(candidate.kind)

    def _scored(self, candidate: Candidate) -> Candidate:
        if self.evaluator is None:
            return candidate
        with self.phi.restored():
            self.phi.write(candidate.phi)
            try:
                score, self._predictions[candidate.kind] = self.evaluator.evaluate_with_predictions("select")
            except MetricError as error:
                self.faults.add([str(error)], succeeded=0)
                return candidate
        return replace(candidate, score=float(score))

    def state_dict(self) -> dict[str, Any]:
        return {
            "candidates": [vars(candidate) for candidate in self.candidates],
            "steps": self.steps,
            "chosen": None if self.chosen is None else self.candidates.index(self.chosen),
            "why": self.why,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        device = self.phi.read().device
        self.candidates = [Candidate(**{**c, "phi": c["phi"].to(device)}) for c in state["candidates"]]
        self.steps = [phi.to(device) for phi in state["steps"]]
        self.chosen = None if state["chosen"] is None else self.candidates[state["chosen"]]
        self.why = state["why"]
