"""What the metric has cost: calls, forward passes and seconds by purpose, and the budgets that bound the guidance."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter

PURPOSES = ("check", "observe", "noise", "select", "offline", "post-hoc")


class Ledger:
    """Counts metric calls, forward passes over a whole set, and their seconds, by purpose.

    Purposes: "check" (before training, that the metric works), "observe" (what the guidance learns from), "noise" (how far
    the metric is off by the choice of rows), "select"
    (choosing the best phi), "offline" and "post-hoc" (before and after training, by the user or a benchmark).

    Args:
        budget: the most calls of purpose "observe" that a run may make; None for no bound.
        pass_budget: the same for forward passes.

    Example:
        >>> ledger = Ledger(budget=2)
        >>> with ledger.charge("observe"):
        ...     pass
        >>> ledger.calls["observe"], ledger.remaining
        (1, 1)
    """

    def __init__(self, budget: int | None = None, pass_budget: int | None = None):
        self.budget, self.pass_budget = budget, pass_budget
        self.calls = dict.fromkeys(PURPOSES, 0)
        self.passes = dict.fromkeys(PURPOSES, 0)
        self.seconds = dict.fromkeys(PURPOSES, 0.0)

    @property
    def remaining(self) -> float:
        """Calls to observe that the budget still allows; inf without a budget."""
        return float("inf") if self.budget is None else self.budget - self.calls["observe"]

    @property
    def remaining_passes(self) -> float:
        """Forward passes to observe that the budget still allows; inf without a budget."""
        return float("inf") if self.pass_budget is None else self.pass_budget - self.passes["observe"]

    @contextmanager
    def charge(self, purpose: str, passes: int = 0) -> Iterator[None]:
        """Charge one call, the passes it took, and the time spent inside. A call that fails counts too."""
        start = perf_counter()
        try:
            yield
        finally:
            self.add(purpose, 1, perf_counter() - start, passes)

    def add(self, purpose: str, calls: int, seconds: float, passes: int = 0) -> None:
        """Charge `calls` calls and `passes` passes that took `seconds` in all, for instance on other ranks."""
        self.calls[purpose] += calls
        self.passes[purpose] += passes
        self.seconds[purpose] += seconds

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
        return f"Ledger({spent or 'nothing spent'}; budget {self.budget} calls, {self.pass_budget} passes)"
