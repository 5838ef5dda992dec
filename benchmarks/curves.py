"""The metric on the selection split along a run: against metric calls, and against seconds."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from metricopt_hf.report import require

from .measure import PLAIN
from .methods import RIVALS
from .problem import Task


def best_so_far(task: Task, row) -> np.ndarray:
    """[seeds, rounds + 1] the best of the selection scores up to each round."""
    sign = 1 if task.greater_is_better else -1
    curves = np.array([run["curve"]["selection"] for _, run in sorted(row.runs.items())], dtype=float)
    return sign * np.maximum.accumulate(sign * curves, axis=1)


def reached(task: Task, rows: dict, ours: str, searchers: tuple[str, ...]) -> tuple[str | None, str]:
    """The searcher that ends best on the selection split, and after how many of its calls ours is as good, of how many.

    Means over the seeds that both were run with.
    """
    sign, ends = (1 if task.greater_is_better else -1), {}
    if (ours, PLAIN) not in rows:
        return None, ""
    for name in searchers:
        if (name, PLAIN) in rows:
            ends[name] = best_so_far(task, rows[name, PLAIN])[:, -1].mean()
    if not ends:
        return None, ""
    best = max(ends, key=lambda name: sign * ends[name])
    theirs, mine = rows[best, PLAIN], rows[ours, PLAIN]
    shared = [i for i, seed in enumerate(sorted(mine.runs)) if seed in theirs.runs]
    curve = best_so_far(task, mine)[shared].mean(0)
    calls = next(iter(mine.runs.values()))["curve"]["calls"]
    total = next(iter(theirs.runs.values()))["curve"]["calls"][-1]
    as_good = np.flatnonzero(sign * (curve - ends[best]) >= 0)
    return best, f"{calls[as_good[0]]} of {total}" if len(as_good) else f"not in {calls[-1]}"


def plot_curves(path: Path, task: Task, rows: dict) -> None:
    """Draw into an SVG file; the same records, the same bytes."""
    require("matplotlib", "plot")
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.hashsalt": task.name, "svg.fonttype": "none", "path.simplify": False}):
        figure = Figure(figsize=(11, 4.2), layout="constrained")
        by_calls, by_seconds = figure.subplots(1, 2, sharey=True)
        for index, (method, rival) in enumerate(RIVALS.items()):
            row = rows.get((method, PLAIN))
            if row is None or not next(iter(row.runs.values()))["curve"]:
                continue
            runs = [run["curve"] for _, run in sorted(row.runs.items())]
            curve = best_so_far(task, row).mean(0)
            calls = np.mean([run["calls"] for run in runs], axis=0)
            seconds = np.mean([run["seconds"] for run in runs], axis=0)
            bold = method in ("loss_only", "metricopt")
            style = {"color": f"C{index % 10}", "linewidth": 2.2 if bold else 1.1}
            by_seconds.plot(seconds, curve, label=rival.title, **style)
            if calls[-1]:
                by_calls.plot(calls, curve, **style)
            else:  # it makes no calls: where it ends
                by_calls.axhline(curve[-1], linestyle=":", **style)
        by_calls.set_xlabel("metric calls to observe (dotted: ends of methods that make none)")
        by_seconds.set_xlabel("seconds")
        by_calls.set_ylabel(f"{task.metric_name}, selection split, best so far")
        by_seconds.legend(fontsize="x-small", framealpha=0.6)
        for axes in (by_calls, by_seconds):
            axes.grid(alpha=0.25)
            axes.spines[["top", "right"]].set_visible(False)
        figure.suptitle(f"{task.title}: {task.metric_name}")
        figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})
