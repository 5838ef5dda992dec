"""The cost of the metric (calls, forward passes and seconds by purpose), and its failures."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from time import perf_counter
from typing import Any

from tqdm.auto import tqdm

logger = logging.getLogger(__name__)

PURPOSES = ("check", "observe", "noise", "select", "offline", "post-hoc")

MOST_IN_A_ROW = 8  # failed calls, after which the metric is not asked any more
MOST_WARNINGS = 20  # of errors that differ; a metric that fails now and then would else fill the log


class Ledger:
    """Counts metric calls, forward passes over a whole set, and their seconds, by purpose.

    Purposes: "check" (before training: does the metric work?), "observe" (the guides learn from these), "noise" (the
    metric's standard error by the choice of rows), "select" (the choice among candidates), "offline" and "post-hoc"
    (before and after training, by the user or a benchmark).

    Args:
        budget: the most calls of purpose "observe" that a run may make; None for no bound.

    Example:
        >>> ledger = Ledger(budget=2)
        >>> with ledger.charge("observe"):
        ...     pass
        >>> ledger.calls["observe"], ledger.remaining
        (1, 1)
    """

    def __init__(self, budget: int | None = None):
        self.budget = budget
        self.calls = dict.fromkeys(PURPOSES, 0)
        self.passes = dict.fromkeys(PURPOSES, 0)
        self.seconds = dict.fromkeys(PURPOSES, 0.0)
        self._bar: Any = None
        self._batches = 0  # that the model has run under the bar

    @property
    def remaining(self) -> float:
        """Calls to observe that the budget still allows; inf without a budget."""
        return float("inf") if self.budget is None else self.budget - self.calls["observe"]

    @contextmanager
    def charge(self, purpose: str, passes: int = 0) -> Iterator[None]:
        """Charge one call, the passes it took, and the time spent inside. A call that fails counts too."""
        start = perf_counter()
        try:
            yield
        finally:
            self.add(purpose, 1, perf_counter() - start, passes)
            self.move_bar(calls=1)

    def add(self, purpose: str, calls: int, seconds: float, passes: int = 0) -> None:
        """Charge `calls` calls and `passes` passes that took `seconds` in all, for instance on other ranks."""
        self.calls[purpose] += calls
        self.passes[purpose] += passes
        self.seconds[purpose] += seconds

    @contextmanager
    def shown(self, what: str, calls: float | None, silent: bool) -> Iterator[None]:
        """Inside, a progress bar if that takes over a second: metric calls, about `calls` in all, and batches run."""
        options = {"total": calls, "unit": " calls", "miniters": 0, "delay": 1, "leave": False, "disable": silent}
        self._batches = 0
        with tqdm(desc=what, **options) as self._bar:
            try:
                yield
            finally:
                self._bar = None

    def move_bar(self, calls: int = 0, batches: int = 0) -> None:
        """Show further calls and batches, if there is a bar."""
        if self._bar is not None:
            self._batches += batches
            self._bar.set_postfix_str(f"{self._batches} batches", refresh=False)
            self._bar.total = self._bar.total and max(self._bar.total, self._bar.n + calls)
            self._bar.update(calls)

    def state_dict(self) -> dict:
        return {"calls": dict(self.calls), "passes": dict(self.passes), "seconds": dict(self.seconds)}

    def load_state_dict(self, state: dict) -> None:
        self.calls.update(state["calls"])
        self.passes.update(state["passes"])
        self.seconds.update(state["seconds"])

    def __repr__(self) -> str:
        spent = ", ".join(
            f"{p}: {self.calls[p]} calls, {self.passes[p]} passes in {self.seconds[p]:.1f} s"
            for p in PURPOSES
            if self.calls[p]
        )
        return f"Ledger({spent or 'nothing spent'}; budget {self.budget} calls)"


class Faults:
    """Counts failed calls, and says when to give the metric up. No failed call ends a run.

    Attributes:
        total: failed calls.
        in_a_row: failed calls since the last call that succeeded.
    """

    def __init__(self) -> None:
        self.total, self.in_a_row = 0, 0
        self._warned: set[str] = set()  # errors

    @property
    def reason(self) -> str | None:
        """Why the metric should not be asked any more; None where it should."""
        return f"the metric failed {self.in_a_row} times in a row" if self.in_a_row >= MOST_IN_A_ROW else None

    def add(self, errors: Sequence[str], succeeded: int, same_rows: bool = False) -> None:
        """Count calls that failed, and those beside them that did not.

        Args:
            same_rows: whether all calls saw the same random half of the rows, which may lack a class: then they count
                as one failure in a row.
        """
        self.total += len(errors)
        self.in_a_row = 0 if succeeded else self.in_a_row + (min(1, len(errors)) if same_rows else len(errors))
        for error, times in Counter(errors).items():
            dropped = "The observation is dropped" if times == 1 else f"{times} observations are dropped"
            new = error not in self._warned and len(self._warned) < MOST_WARNINGS
            self._warned |= {error} if new else set()
            logger.log(
                logging.WARNING if new else logging.DEBUG,
                f"{error.rstrip('.')}. {dropped} ({self.in_a_row} failed in a row). More of these are only counted.",
            )

    def state_dict(self) -> dict[str, Any]:
        return {"total": self.total, "in_a_row": self.in_a_row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.total, self.in_a_row = state["total"], state["in_a_row"]
