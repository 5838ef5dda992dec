"""RunResult: what is known of a guided run afterwards. Reports, benchmarks and cards read this, and nothing private."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..evaluation.constraints import ConstraintCheck
from ..evaluation.ledger import Ledger
from ..evaluation.trajectory import Trajectory
from ..hub import ValueFunction
from ..phi import Coordinates


@dataclass(frozen=True)
class RunResult:
    """A run whose metric phase has begun.

    Attributes:
        metric: its name.
        greater_is_better: which way it is better.
        start_step: optimizer steps before the metric phase.
        best_phi: [d] the phi that the selection split preferred; None where nothing could be selected.
        best_score: its score on the selection split; nan without one.
        best_step: optimizer steps taken before it; -1 without one.
        bias_tuned: whether the best phi has got its output bias tuned behind the last step.
        last_phi: [d] where training ended, whichever phi was selected; None before its end.
        curve: one entry per round or selection: step, selection (or None), trust, reason, gradient_agreement,
            rank_correlation, observation_mean, predicted (mean and standard deviation, or None), coverage, calls.
            Of a run with more than some thousand of them, every second of the earlier ones.
        constraints: which of the metric's constraints hold at the best phi on the selection split; empty without any.
        keys: of the numbers in `trajectory.raw`.
        trajectory: the real observations, the latest 4,096.
        ledger: metric calls and seconds by purpose.
        failed_calls: metric calls that failed or gave an impossible answer.
        phi: `PhiSpace.description` of what was tuned.
        coordinates: in which the guide saw it.
        trust: how far the guide was followed at the end, in [0, 1].
        rank_correlation: of its predictions with the scores that it did not know; nan without evidence.
        value_function: what the guide learned and can be shared; None without such a thing.
    """

    metric: str
    greater_is_better: bool
    start_step: int
    best_phi: Tensor | None
    best_score: float
    best_step: int
    bias_tuned: bool
    last_phi: Tensor | None
    curve: list[dict[str, Any]]
    constraints: tuple[ConstraintCheck, ...]
    keys: tuple[str, ...]
    trajectory: Trajectory
    ledger: Ledger
    failed_calls: int
    phi: dict[str, Any]
    coordinates: Coordinates
    trust: float
    rank_correlation: float
    value_function: ValueFunction | None
