"""Faults of the metric: calls that fail, and impossible answers. None of these ends a run."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

logger = logging.getLogger(__name__)

# a score this many times the range of all others away from them is taken for a fault of the metric
OUTLIER_RANGES = 20
MIN_SCORES_FOR_OUTLIERS = 16
# one so many times as far from their median as most others is asked for again, before it decides
ODD_RANGES = 6
# the first scores, up to so many, cannot be judged at once: all are judged again as more come in
EARLY_SCORES = 4 * MIN_SCORES_FOR_OUTLIERS
# accepted scores that are kept, the latest ones
MOST_SCORES = 4096
# the largest share of the first scores that may be faults
OUTLIER_SHARE = 1 / 8


class Faults:
    """Counts failed calls, and separates outliers from scores.

    Args:
        max_in_a_row: failed calls in a row after which `give_up` is called, once for each further one.
        give_up: reason -> whether that changed anything.
    """

    def __init__(self, max_in_a_row: int, give_up: Callable[[str], bool]):
        self.max_in_a_row, self.give_up = max_in_a_row, give_up
        self.total, self.in_a_row = 0, 0
        self.scores: list[float] = []
        self._lowest, self._highest = float("inf"), float("-inf")

    def accept(self, scores: Sequence[float]) -> None:
        """Take scores, of either split, for what the metric usually answers."""
        self.scores = [*self.scores, *scores][-MOST_SCORES:]
        self._lowest, self._highest = min([self._lowest, *scores]), max([self._highest, *scores])

    def is_outlier(self, score: float) -> bool:
        """Whether `score` lies so far from all earlier ones that it is taken for a fault."""
        extent = self._highest - self._lowest
        if len(self.scores) < MIN_SCORES_FOR_OUTLIERS or extent == 0 or self._lowest <= score <= self._highest:
            return False
        return abs(score - np.median(self.scores)) > OUTLIER_RANGES * extent

    def revoke(self) -> list[float]:
        """Those of the first scores that turn out to be faults, now that there are others; they are not kept here.

        A fault among the first sixteen could not be recognised when it came. So each stays only if it is none against
        all others but those near it (at most an eighth).
        """
        if not MIN_SCORES_FOR_OUTLIERS < len(self.scores) <= EARLY_SCORES:
            return []
        scores = np.array(self.scores)
        distance = np.abs(scores - np.median(scores))
        order = np.argsort(distance, kind="stable")
        extent = np.maximum.accumulate(scores[order]) - np.minimum.accumulate(scores[order])
        for i in range(max(MIN_SCORES_FOR_OUTLIERS, int(len(scores) * (1 - OUTLIER_SHARE))), len(scores)):
            if extent[i - 1] > 0 and distance[order[i]] > OUTLIER_RANGES * extent[i - 1]:
                faults = scores[order[i:]].tolist()
                self._keep(scores[np.sort(order[:i])].tolist())
                self.add([self.outlier_message(score) for score in faults], succeeded=1)
                return faults
        return []

    def is_odd(self, score: float) -> bool:
        """Whether `score`, one of those accepted, lies so far from the rest that it should be asked for again."""
        others = np.array(self.scores)
        others = np.delete(others, np.flatnonzero(others == score)[:1])
        if len(others) < 2:
            return False
        distance = np.sort(np.abs(others - np.median(others)))
        usual = distance[: max(1, int(len(others) * (1 - OUTLIER_SHARE)))].max()
        return abs(score - np.median(others)) > ODD_RANGES * usual

    def comes_out_again(self, score: float, again: float) -> bool:
        """Whether a second answer confirms `score`: it is nearer to `score` than to the usual scores."""
        return abs(again - score) <= abs(again - np.median([s for s in self.scores if s != score] or [score]))

    @staticmethod
    def outlier_message(score: float) -> str:
        return f"The metric returned {score}, far outside of everything that it returned so far."

    def add(self, errors: Sequence[str], succeeded: int, same_rows: bool = False) -> None:
        """Count calls that failed, and those of the same round that did not.

        Args:
            same_rows: whether all were made on one random half of the rows, of which a class may be missing: then they
                count as one failure in a row.
        """
        self.total += len(errors)
        self.in_a_row = 0 if succeeded else self.in_a_row + (min(1, len(errors)) if same_rows else len(errors))
        for error, times in Counter(errors).items():
            dropped = "The observation is dropped" if times == 1 else f"{times} observations are dropped"
            logger.warning(f"{error.rstrip('.')}. {dropped} ({self.in_a_row} failed in a row).")
        if self.in_a_row >= self.max_in_a_row:
            reason = f"the metric failed {self.in_a_row} times in a row"
            if self.give_up(reason):
                logger.warning(
                    f"Guidance is switched off: {reason}. Training goes on with the loss alone. Mend what the warnings "
                    "above name."
                )

    def state_dict(self) -> dict[str, Any]:
        return {
            "total": self.total,
            "in_a_row": self.in_a_row,
            "scores": list(self.scores),
            "extremes": [self._lowest, self._highest],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.total, self.in_a_row = state["total"], state["in_a_row"]
        self.scores, (self._lowest, self._highest) = list(state["scores"]), state["extremes"]

    def _keep(self, scores: Sequence[float]) -> None:
        self.scores, self._lowest, self._highest = [], float("inf"), float("-inf")
        self.accept(scores)
