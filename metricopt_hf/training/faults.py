"""Faults of the metric: calls that fail, and answers that cannot be. Nothing of this ends a run."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

logger = logging.getLogger(__name__)

# a score this many times the range of all earlier ones away from them is taken for a fault of the metric
OUTLIER_RANGES = 20
MIN_SCORES_FOR_OUTLIERS = 16


class Faults:
    """Counts failed calls, and tells outliers from scores.

    Args:
        max_in_a_row: failed calls in a row after which `give_up` is called, once for each further one.
        give_up: reason -> whether that changed anything.
    """

    def __init__(self, max_in_a_row: int, give_up: Callable[[str], bool]):
        self.max_in_a_row, self.give_up = max_in_a_row, give_up
        self.total, self.in_a_row = 0, 0
        self.scores: list[float] = []

    def accept(self, scores: Sequence[float]) -> None:
        """Take scores, of either split, for what the metric usually answers."""
        self.scores += scores

    def is_outlier(self, score: float) -> bool:
        """Whether `score` lies so far from all earlier ones that it is taken for a fault."""
        if len(self.scores) < MIN_SCORES_FOR_OUTLIERS or np.ptp(self.scores) == 0:
            return False
        return abs(score - np.median(self.scores)) > OUTLIER_RANGES * np.ptp(self.scores)

    @staticmethod
    def outlier_message(score: float) -> str:
        return f"The metric returned {score}, far outside of everything that it returned so far."

    def add(self, errors: Sequence[str], succeeded: int) -> None:
        """Take in calls that failed, and how many beside them did not."""
        self.total += len(errors)
        self.in_a_row = 0 if succeeded else self.in_a_row + len(errors)
        for error in errors:
            logger.warning(f"{error} The observation is dropped ({self.in_a_row} failed in a row).")
        if self.in_a_row >= self.max_in_a_row:
            reason = f"the metric failed {self.in_a_row} times in a row"
            if self.give_up(reason):
                logger.warning(f"Guidance is switched off: {reason}. Training goes on with the loss alone.")

    def state_dict(self) -> dict[str, Any]:
        return {"total": self.total, "in_a_row": self.in_a_row, "scores": list(self.scores)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.total, self.in_a_row, self.scores = state["total"], state["in_a_row"], list(state["scores"])
