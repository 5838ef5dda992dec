"""What a run does besides its score: whether it harms, and its time."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from .comparing import Result, Row, common_seeds
from .measure import PLAIN
from .problem import Task


def harm(task: Task, ours: Row | None, other: Row | None) -> tuple[int, int, int]:
    """Runs that end below the other by more than two standard errors of the paired difference (over items).

    Returns:
        How many; how many of them were at least as good on the selection split, so that nobody could know; and all.
    """
    seeds = common_seeds(ours, other)
    worse = unseen = 0
    for seed in seeds:
        a, b = ours.of(seed), other.of(seed)
        error = float(np.subtract(a["items"], b["items"]).std(ddof=1))
        if task.sign * (a["scores"]["report"] - b["scores"]["report"]) < -2 * error:
            worse += 1
            unseen += task.sign * (a["scores"]["selection"] - b["scores"]["selection"]) >= 0
    return worse, unseen, len(seeds)


def harms(results: Iterable[Result], method: str) -> tuple[int, int, int]:
    """`harm` against the rival, summed over tasks."""
    counts = [harm(result.task, result.rows.get((method, PLAIN)), result.rival) for result in results]
    return tuple(sum(column) for column in zip(*counts, strict=True)) if counts else (0, 0, 0)


def loss_seconds(ours: Row) -> float | None:
    """Mean seconds of as many steps by the loss as a run has in all, by those that our runs have made themselves.

    So both are measured in one run, and what else the machine does slows both.
    """
    found = []
    for run in ours.runs.values():
        if settings := run["config"].get("by_loss"):
            budget = run["budget"]
            steps = len(settings) * (budget["steps"] - budget["metric_steps"])
            found.append(run["curve"]["seconds"][0] / steps * budget["steps"])  # where the metric steps begin
    return float(np.mean(found)) if found else None
