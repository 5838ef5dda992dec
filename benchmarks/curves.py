"""The metric on the selection split along a run: against forward passes, and against seconds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from examples.comparison.report import require

from .comparing import OURS, Key, Row
from .measure import PLAIN
from .methods import RIVALS
from .problem import Task

DOTS = 120  # per inch: legible, and no figure takes more than 60 kB


@contextmanager
def png(path: Path, size: tuple[float, float]) -> Iterator:
    """Yields a figure of `size` inches to draw in, then writes it to `path`; the same drawing gives the same bytes."""
    require("matplotlib", "plot")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=DOTS, layout="constrained")
    yield figure
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    drawn = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    drawn.quantize(255, Image.Quantize.MAXCOVERAGE).save(path, format="png", optimize=True)


def column(runs: Sequence[dict], name: str) -> np.ndarray:
    """[seeds, looks] of the curves; a run with fewer looks stays where its last one was."""
    looks = max(len(run["curve"][name]) for run in runs)
    curves = [run["curve"][name] for run in runs]
    return np.array([curve + curve[-1:] * (looks - len(curve)) for curve in curves], dtype=float)


def best_so_far(task: Task, runs: Sequence[dict]) -> np.ndarray:
    """[seeds, looks] the best of the selection scores up to each look."""
    return task.sign * np.fmax.accumulate(task.sign * column(runs, "selection"), axis=1)


def plot_curves(path: Path, task: Task, rows: dict[Key, Row]) -> None:
    with png(path, (11, 4.2)) as figure:
        by_passes, by_seconds = figure.subplots(1, 2, sharey=True)
        for index, (method, rival) in enumerate(RIVALS.items()):
            row = rows.get((method, PLAIN))
            if row is None or not next(iter(row.runs.values()))["curve"]:
                continue
            runs = [run for _, run in sorted(row.runs.items())]
            curve, passes, seconds = (
                curves.mean(0) for curves in (best_so_far(task, runs), column(runs, "passes"), column(runs, "seconds"))
            )
            bold = method in ("loss_only", OURS)
            style: dict[str, Any] = {"color": f"C{index % 10}", "linewidth": 2.2 if bold else 1.1}
            if "kind" in runs[0]["curve"]:  # a run of which nothing is evaluated before its end
                style |= {"drawstyle": "steps-post", "marker": "o", "markevery": [-1]}
            by_seconds.plot(seconds, curve, label=rival.title, **style)
            if passes[-1]:
                by_passes.plot(passes, curve, **style)
            else:  # it observes nothing: where it ends
                by_passes.axhline(curve[-1], linestyle=":", color=style["color"], linewidth=style["linewidth"])
        by_passes.set_xlabel("forward passes to observe (dotted: ends of methods that make none)")
        by_seconds.set_xlabel("seconds")
        by_passes.set_ylabel(f"{task.metric_name}\nselection split, best so far")
        by_seconds.legend(fontsize="x-small", framealpha=0.6)
        for axes in (by_passes, by_seconds):
            axes.grid(alpha=0.25)
            axes.spines[["top", "right"]].set_visible(False)
        figure.suptitle(f"{task.title}: {task.metric_name}")
