"""What the metric has cost: calls and seconds by purpose, and the budget that bounds the guidance."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter

PURPOSES = ("check", "observe", "select", "offline", "post-hoc")


class Ledger:
    """Counts metric calls and their seconds by purpose.

    Purposes: "check" (before training, that the metric works), "observe" (what the guidance learns from), "select"
    (choosing the best phi), "offline" and "post-hoc" (before and after training, by the user or a benchmark).

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
        self.seconds = dict.fromkeys(PURPOSES, 0.0)

    @property
    def remaining(self) -> float:
        """Observations that the budget still allows; inf without a budget."""
        return float("inf") if self.budget is None else self.budget - self.calls["observe"]

    @contextmanager
    def charge(self, purpose: str) -> Iterator[None]:
        """Charge one call, and the time spent inside, to `purpose`; a call that fails was made, so it counts."""
        start = perf_counter()
        try:
            yield
        finally:
            self.add(purpose, 1, perf_counter() - start)

    def add(self, purpose: str, calls: int, seconds: float) -> None:
        """Charge `calls` calls that took `seconds` in all, for instance on other ranks."""
        self.calls[purpose] += calls
        self.seconds[purpose] += seconds

    def state_dict(self) -> dict:
        return {"calls": dict(self.calls), "seconds": dict(self.seconds)}

    def load_state_dict(self, state: dict) -> None:
        self.calls.update(state["calls"])
        self.seconds.update(state["seconds"])

    def __repr__(self) -> str:
        spent = ", ".join(f"{p}: {self.calls[p]} calls in {self.seconds[p]:.1f} s" for p in PURPOSES if self.calls[p])
        return f"Ledger({spent or 'nothing spent'}; budget {self.budget})"
