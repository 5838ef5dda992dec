"""Faults of the metric: calls that fail or answer nothing usable. None of these ends a run."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from typing import Any

logger = logging.getLogger(__name__)

MOST_IN_A_ROW = 8  # failed calls, after which the metric is not asked any more


class Faults:
    """Counts failed calls, and says when to give up.

    Attributes:
        total: failed calls.
        in_a_row: the same since the last call that did not fail.
    """

    def __init__(self) -> None:
        self.total, self.in_a_row = 0, 0

    @property
    def reason(self) -> str | None:
        """Why the metric should not be asked any more; None where it should."""
        return f"the metric failed {self.in_a_row} times in a row" if self.in_a_row >= MOST_IN_A_ROW else None

    def add(self, errors: Sequence[str], succeeded: int, same_rows: bool = False) -> None:
        """Count calls that failed, and those beside them that did not.

        Args:
            same_rows: whether all were made on one random half of the rows, of which a class may be missing: then they
                count as one failure in a row.
        """
        self.total += len(errors)
        self.in_a_row = 0 if succeeded else self.in_a_row + (min(1, len(errors)) if same_rows else len(errors))
        for error, times in Counter(errors).items():
            dropped = "The observation is dropped" if times == 1 else f"{times} observations are dropped"
            logger.warning(f"{error.rstrip('.')}. {dropped} ({self.in_a_row} failed in a row).")

    def state_dict(self) -> dict[str, Any]:
        return {"total": self.total, "in_a_row": self.in_a_row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.total, self.in_a_row = state["total"], state["in_a_row"]
