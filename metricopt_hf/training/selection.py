"""Selection: the best phi so far, by the metric on a split of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..errors import MetricError
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
    """

    phi: Tensor | None = None
    score: float = float("nan")
    step: int = -1


class Selection:
    """Evaluates candidates and keeps the best.

    Args:
        evaluator: the metric on the selection split; None where there is none (then nothing is ever selected).
        space: what a candidate is made of.
        faults: told of every call.
    """

    def __init__(self, evaluator: Evaluator | None, space: PhiSpace, faults: Faults):
        self.evaluator, self.space, self.faults = evaluator, space, faults
        self.best = Candidate()

    def consider(self, step: int) -> float | None:
        """Evaluate the present phi, and keep it if it is the best so far; None where there is no score."""
        if self.evaluator is None:
            return None
        try:
            score = self.evaluator.evaluate("select")
        except MetricError as error:
            self.faults.add([str(error)], succeeded=0)
            return None
        if self.faults.is_outlier(score):
            self.faults.add([self.faults.outlier_message(score)], succeeded=0)
            return None
        self.faults.accept([score])
        sign = self.evaluator.metric.sign
        if self.best.phi is None or sign * (score - self.best.score) > 0:
            self.best = Candidate(self.space.read(), score, step)
        return score

    def state_dict(self) -> dict[str, Any]:
        return {"phi": self.best.phi, "score": self.best.score, "step": self.best.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        phi = state["phi"]
        phi = None if phi is None else phi.to(self.space.read().device)
        self.best = Candidate(phi, state["score"], state["step"])
