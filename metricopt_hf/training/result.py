"""RunResult: what is known of a guided run afterwards. Reports, benchmarks and cards read this, and nothing private."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from ..evaluation.answer import ConstraintCheck
from ..evaluation.ledger import Ledger
from ..evaluation.trajectory import Trajectory
from ..hub import ValueFunction
from ..phi import Coordinates
from .selection import Candidate


@dataclass(frozen=True, eq=False)
class RunResult:
    """A run whose metric phase has begun; printed, five lines.

    Attributes:
        metric: its name.
        greater_is_better: which way it is better.
        start_step: optimizer steps before the metric phase.
        observed: what was observed, "predictions" or "scores".
        start: the model at the start of the phase, with its score on the selection split.
        chosen: what came out; while the run goes on, the latest candidate.
        why: why that was chosen, in a sentence; empty while the run goes on.
        candidates: all that there were, in order.
        curve: one entry per metric step: step, guide (whose step was taken, or None), value (the metric on the
            observation set, greater is better), tried (by guide), standard_error, rates, calls, passes.
        ended: why the phase ended early; None where it did not.
        constraints: which of the metric's constraints hold for what was chosen, on the selection split.
        trajectory: observations, the latest ones.
        ledger: metric calls, forward passes and seconds by purpose.
        failed_calls: metric calls that failed.
        phi: `PhiSpace.description` of what was tuned.
        coordinates: in which it moved.
    """

    metric: str
    greater_is_better: bool
    start_step: int
    observed: str
    start: Candidate
    chosen: Candidate
    why: str
    candidates: Sequence[Candidate]
    curve: Sequence[dict[str, Any]]
    ended: str | None
    constraints: tuple[ConstraintCheck, ...]
    trajectory: Trajectory
    ledger: Ledger
    failed_calls: int
    phi: dict[str, Any]
    coordinates: Coordinates
    make_value_function: Callable[[], ValueFunction | None]

    @property
    def best_score(self) -> float:
        """Of what was chosen, on the selection split; nan without one."""
        return self.chosen.score

    @property
    def best_phi(self) -> Tensor:
        """[d] of what was chosen."""
        return self.chosen.phi

    @property
    def best_step(self) -> int:
        """Optimizer steps taken before what was chosen."""
        return self.chosen.step

    @cached_property
    def value_function(self) -> ValueFunction | None:
        """V(z) over the run's coordinates, fitted to its observations; None of too few.

        It is fitted when it is first asked for.
        """
        return self.make_value_function()

    def __str__(self) -> str:
        spent = self.ledger
        direction = "greater" if self.greater_is_better else "smaller"
        return (
            f"{self.metric} ({direction} is better) on the selection split: {self.start.score:.4f} at the start of the "
            f"metric phase, {self.chosen.score:.4f} now\n"
            f"kept: {self.chosen.kind}, at step {self.chosen.step}\n"
            f"why: {self.why or 'the run is not over'}\n"
            f"steps taken: {sum(row['guide'] is not None for row in self.curve)} of {len(self.curve)}"
            f"{f'; it ended early: {self.ended}' if self.ended else ''}\n"
            f"cost: {sum(spent.passes.values())} passes, {sum(spent.calls.values())} metric calls "
            f"({self.failed_calls} failed), {sum(spent.seconds.values()):.1f} s"
        )
