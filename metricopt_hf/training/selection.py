"""Selection: which of the candidates of a run becomes the model that comes out, by the metric on a split of its own.

Candidates are the model at the start of the metric phase, phi behind each of its steps, the mean of the last half of
these, and the start with a tuned bias per logit, which is the cheap rival of every method. What has many numbers
to fit may win on the selection split by chance where the cheap ones cannot, so it must be better by a margin.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import MetricError
from ..evaluation.answer import Score, values_of
from ..evaluation.constraints import ConstraintCheck
from ..evaluation.evaluator import Evaluator
from ..evaluation.faults import Faults
from ..evaluation.noise import checked_constraints, paired_error
from ..phi import PhiSpace
from .bias import with_tuned_bias

logger = logging.getLogger(__name__)

START, BIAS, STEP, MEAN = "start", "start, bias tuned", "step", "mean of steps"  # kinds of candidates
CHEAP = (START, BIAS)
MARGIN = 0.5  # standard errors of the paired difference by which an ascent must be better than what is cheap
NEAR = 0.5  # share of a gain by which a second answer may differ from the first


@dataclass(frozen=True, eq=False)  # one is itself alone: its phi cannot be asked whether it is equal
class Candidate:
    """A phi and what it scores.

    Attributes:
        kind: one of START, BIAS, STEP, MEAN.
        phi: [d].
        step: optimizer steps taken before it.
        score: the metric on the selection split; nan where it failed.
        raw: the numbers of the metric's `keys` beside its score.
    """

    kind: str
    phi: Tensor
    step: int
    score: float = float("nan")
    raw: tuple[float, ...] = ()

    @property
    def known(self) -> bool:
        """Whether there is a score."""
        return bool(np.isfinite(self.score))


class Selection:
    """Evaluates candidates, and chooses one.

    Args:
        evaluator: the metric on the selection split; None where there is none: then phi stays where it went last.
        phi: what candidates are of.
        on_all_rows: whether the metric makes sense on all rows only: then no error of a difference is known.
    """

    def __init__(self, evaluator: Evaluator | None, phi: PhiSpace, on_all_rows: bool = False):
        self.evaluator, self.phi, self.on_all_rows = evaluator, phi, on_all_rows
        self.candidates: list[Candidate] = []
        self.chosen: Candidate | None = None
        self.why = ""
        self.constraints: tuple[ConstraintCheck, ...] = ()  # at what was chosen
        self.faults = Faults()

    @property
    def start_candidate(self) -> Candidate:
        """The model at the start of the phase."""
        return self.candidates[0]

    @property
    def latest(self) -> float | None:
        """The last score on the selection split."""
        return self.candidates[-1].score if self.candidates and self.candidates[-1].known else None

    def start(self, step: int) -> None:
        """The present phi is the model at the start of the phase."""
        self.candidates = [self._scored(Candidate(START, self.phi.read(), step))]

    def consider(self, step: int) -> None:
        """The present phi is a candidate, if it is another than the one before."""
        if not torch.equal(self.phi.read(), self.candidates[-1].phi):
            self.candidates.append(self._scored(Candidate(STEP, self.phi.read(), step)))

    def finish(self, step: int, observation: Evaluator) -> None:
        """Choose, and put the chosen phi in place.

        Args:
            step: optimizer steps taken so far.
            observation: the metric on the observation set, on which a bias is tuned.
        """
        steps = [candidate for candidate in self.candidates if candidate.kind == STEP]
        if self.evaluator is None:
            self.chosen, self.why = self.candidates[-1], "there is no selection split"
            return
        if len(steps) > 2:
            mean = torch.stack([candidate.phi for candidate in steps[len(steps) // 2 :]]).mean(0)
            self.candidates.append(self._scored(Candidate(MEAN, mean, step)))
        tuned = with_tuned_bias(observation, self.start_candidate.phi)
        if tuned is not None:
            self.candidates.append(self._scored(Candidate(BIAS, tuned, step)))
        self.chosen = self._choose()
        self.phi.write(self.chosen.phi)
        logger.info(f"Kept: {self.chosen.kind} at step {self.chosen.step}; {self.why}.")
        if self.evaluator.metric.constraints and self.chosen.known:
            self.constraints = checked_constraints(self.evaluator, self.on_all_rows, self.chosen.raw)
            for check in self.constraints:
                logger.log(logging.INFO if check.holds else logging.WARNING, f"On the selection split, {check}.")

    def _choose(self) -> Candidate:
        """The best ascent where it is better than the best cheap candidate by `MARGIN`, else that."""
        merit = self.evaluator.metric.merit
        found: dict[bool, list[Candidate]] = {True: [], False: []}
        for candidate in self.candidates:
            if candidate.known:
                found[candidate.kind in CHEAP].append(candidate)
        cheap, ascents = (
            max(group, key=lambda c: merit(Score(c.score, c.raw)), default=None) for group in (found[True], found[False])
        )
        while ascents is not None and not self._comes_out_again(ascents, cheap):
            found[False].remove(ascents)
            ascents = max(found[False], key=lambda c: merit(Score(c.score, c.raw)), default=None)
        if ascents is None:
            self.why = "no step has a score that comes out again"
            return cheap or self.start_candidate
        if cheap is None:
            self.why = "the start has no score"
            return ascents
        gain = merit(Score(ascents.score, ascents.raw)) - merit(Score(cheap.score, cheap.raw))
        error = self._error(ascents, cheap)
        self.why = f"{ascents.kind} is better than {cheap.kind} by {gain:.4f} ± {error:.4f} on the selection split"
        return ascents if gain > 0 and gain >= MARGIN * error else cheap

    def _comes_out_again(self, candidate: Candidate, other: Candidate | None) -> bool:
        """Whether a second answer confirms a score: what is finite and comes out again is true."""
        if other is None:
            return True
        merit = self.evaluator.metric.merit
        again = self._scored(candidate)
        gain = merit(Score(candidate.score, candidate.raw)) - merit(Score(other.score, other.raw))
        if not again.known:
            return False
        off = merit(Score(candidate.score, candidate.raw)) - merit(Score(again.score, again.raw))
        return off <= max(NEAR * gain, 1e-9 * abs(candidate.score))

    def _error(self, first: Candidate, second: Candidate) -> float:
        """Standard error of the difference of two candidates' scores; 0 where it is not known."""
        if self.on_all_rows or not self.evaluator.metric.of_predictions or self.evaluator.metric.batchwise or self.evaluator.complete is not None:
            return 0.0
        made = []
        with self.phi.restored():
            for candidate in (first, second):
                self.phi.write(candidate.phi)
                self.evaluator.ledger.add("select", 0, 0.0, passes=1)
                made.append(self.evaluator.predictions())
        return paired_error(self.evaluator, *made)

    def _scored(self, candidate: Candidate) -> Candidate:
        if self.evaluator is None:
            return candidate
        with self.phi.restored():
            self.phi.write(candidate.phi)
            try:
                score = self.evaluator.evaluate("select")
            except MetricError as error:
                self.faults.add([str(error)], succeeded=0)
                return candidate
        self.evaluator.metric.merit(score)
        return replace(candidate, score=float(score), raw=values_of(score))

    def state_dict(self) -> dict[str, Any]:
        chosen = None if self.chosen is None else next(i for i, c in enumerate(self.candidates) if c is self.chosen)
        return {
            "candidates": [vars(candidate) for candidate in self.candidates],
            "chosen": chosen, "why": self.why,
            "constraints": [vars(check) for check in self.constraints],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        device = self.phi.read().device
        self.candidates = [Candidate(**{**c, "phi": c["phi"].to(device)}) for c in state["candidates"]]
        self.chosen = None if state["chosen"] is None else self.candidates[state["chosen"]]
        self.why = state["why"]
        self.constraints = tuple(ConstraintCheck(**check) for check in state["constraints"])
