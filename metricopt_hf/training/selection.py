"""Selection: the best phi so far, by the metric on a split of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..errors import MetricError
from ..evaluation.answer import Score, values_of
from ..evaluation.evaluator import Evaluator
from ..phi import PhiSpace
from .faults import Faults


@dataclass(frozen=True)
class Candidate:
    """A phi that was evaluated on the selection split.

    Attributes:
        phi: [d], or None before there is one.
        score: the metric on the selection split.
        step: optimizer steps taken before it.
        bias_tuned: whether its output bias was tuned, behind the last step.
        raw: the numbers of the metric's `keys` beside its score; where they miss constraints, any that miss them by
            less come first.
    """

    phi: Tensor | None = None
    score: float = float("nan")
    step: int = -1
    bias_tuned: bool = False
    raw: tuple[float, ...] = ()


# so many of the best candidates are kept, in case that the first turns out to be a fault of the metric
KEPT = 3


class Selection:
    """Evaluates candidates and keeps the best.

    Args:
        evaluator: the metric on the selection split; None where there is none (then nothing is ever selected).
        space: what a candidate is made of.
        faults: takes in every call.
    """

    def __init__(self, evaluator: Evaluator | None, space: PhiSpace, faults: Faults):
        self.evaluator, self.space, self.faults = evaluator, space, faults
        self.candidates: list[Candidate] = []  # the best first; of equal ones the earliest

    @property
    def best(self) -> Candidate:
        """The best so far; one without phi before there is any."""
        return self.candidates[0] if self.candidates else Candidate()

    @property
    def phi(self) -> Tensor | None:
        """[d] of the best so far; None before there is any."""
        return self.best.phi

    @property
    def score(self) -> float:
        """Of the best so far, on the selection split; nan before there is any."""
        return self.best.score

    @property
    def step(self) -> int:
        """Optimizer steps taken before the best so far; -1 before there is any."""
        return self.best.step

    def consider(self, step: int, bias_tuned: bool = False) -> float | None:
        """Evaluate the present phi, and keep it if it is among the best so far; None where there is no score."""
        score = self._score()
        if score is None:
            return None
        if self.faults.is_outlier(score):
            self.faults.add([self.faults.outlier_message(score)], succeeded=0)
            return None
        self.faults.accept([score])
        merit = self.evaluator.metric.merit
        place = sum(merit(score) <= merit(Score(other.score, other.raw)) for other in self.candidates)
        if place < KEPT:
            candidate = Candidate(self.space.read(), float(score), step, bias_tuned, values_of(score))
            self.candidates.insert(place, candidate)
            del self.candidates[KEPT:]
        return score

    def confirm(self) -> None:
        """Before the best is put in place: one odd answer does not decide, so the metric is asked for it once more."""
        while self.candidates and self.faults.is_odd(self.best.score):
            with self.space.restored():
                self.space.write(self.best.phi)
                again = self._score()
            if again is not None and self.faults.comes_out_again(self.best.score, again):
                return
            dropped = self.candidates.pop(0)
            if again is not None:
                self.faults.add([self.faults.outlier_message(dropped.score)], succeeded=1)

    def _score(self) -> float | None:
        """The metric at the present phi; None where there is none, or it fails."""
        if self.evaluator is None:
            return None
        try:
            return self.evaluator.evaluate("select")
        except MetricError as error:
            self.faults.add([str(error)], succeeded=0)
            return None

    def state_dict(self) -> dict[str, Any]:
        return {"candidates": [vars(candidate) for candidate in self.candidates]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        device = self.space.read().device
        self.candidates = [
            Candidate(**{**c, "phi": c["phi"].to(device), "raw": tuple(c["raw"])}) for c in state["candidates"]
        ]
