"""What a run does besides its score: whether it harms, whether its spread is calibrated, its time and its calls."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np

from .comparing import LOSS_ONLY, UNGUIDED, Key, Result, Row, common_seeds, reference
from .curves import best_so_far
from .measure import PLAIN
from .problem import Task

ONE_SETTING, BEST, WITHOUT_GUIDANCE = "loss only, one setting", "loss only, at its best", "the same without guidance"
# What a run may be harmed against; "one setting" was chosen over all tasks, "its best" is chosen in each.
AGAINST: dict[str, Callable[[Result], Row | None]] = {
    ONE_SETTING: lambda result: result.rows[LOSS_ONLY[0], PLAIN],
    BEST: lambda result: reference(result.task, result.rows, PLAIN),
    WITHOUT_GUIDANCE: lambda result: result.rows.get((UNGUIDED, PLAIN)),
}


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


def harms(results: Iterable[Result], method: str, against: str) -> tuple[int, int, int]:
    """`harm` summed over tasks, against one of `AGAINST`."""
    counts = [harm(r.task, r.rows.get((method, PLAIN)), AGAINST[against](r)) for r in results]
    return tuple(sum(column) for column in zip(*counts, strict=True)) if counts else (0, 0, 0)


def coverage(row: Row) -> tuple[float, int]:
    """Observations inside the 90 % interval that was predicted for them, and all for which there was one."""
    inside, count = 0.0, 0
    for run in row.runs.values():
        passes, shares = run["curve"]["passes"], run["curve"].get("coverage", [])
        for i, share in enumerate(shares[:-1]):
            if share is not None:
                observed = passes[i + 1] - passes[i]  # a row's passes are those before its round
                inside, count = inside + share * observed, count + observed
    return inside, count


def seconds_ratio(ours: Row | None, other: Row | None) -> float | None:
    """Mean seconds of a run against another method's, over the seeds that both have."""
    seeds = common_seeds(ours, other)
    if not seeds:
        return None
    mine, theirs = (sum(row.runs[seed]["seconds"]["run"] for seed in seeds) for row in (ours, other))
    return mine / theirs


def calls_needed(
    task: Task, rows: dict[Key, Row], ours: str, searchers: tuple[str, ...]
) -> tuple[str | None, int | None, int]:
    """The searcher that ends best on the selection split, after how many passes ours is as good, and how many it spent.

    Means over the seeds that both were run with. None for ours: never; then the passes are all that ours made.
    """
    ends = {s: best_so_far(task, rows[s, PLAIN])[:, -1].mean() for s in searchers if (s, PLAIN) in rows}
    if not ends:
        return None, None, 0
    best = max(ends, key=lambda name: task.sign * ends[name])
    theirs, mine = rows[best, PLAIN], rows[ours, PLAIN]
    shared = [i for i, seed in enumerate(sorted(mine.runs)) if seed in theirs.runs]
    curve = best_so_far(task, mine)[shared].mean(0)
    passes = next(iter(mine.runs.values()))["curve"]["passes"]
    as_good = np.flatnonzero(task.sign * (curve - ends[best]) >= 0)
    if not len(as_good):
        return best, None, passes[-1]
    return best, passes[as_good[0]], next(iter(theirs.runs.values()))["curve"]["passes"][-1]
