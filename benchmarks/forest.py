"""The forest plot: MetricOpt minus the rival in every task."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .comparing import ABOVE, BELOW, LOSS, TIE, WIN, Result, groups
from .curves import png

BETTER, EITHER, WORSE = "#0072b2", "#888888", "#d55e00"  # apart for colour-blind eyes too
COLOURS = {WIN: BETTER, ABOVE: BETTER, TIE: EITHER, BELOW: WORSE, LOSS: WORSE}


def plot_forest(path: Path, results: Sequence[Result]) -> None:
    """A line per task, under its kind.

    A filled mark is a win or a loss, corrected for all comparisons of the task; a hollow one is by the interval alone.
    """
    lines: list[str | Result] = []  # from top to bottom: kinds, and results
    for kind, members in groups(results).items():
        lines += [kind, *members]
    with png(path, (10, 1.2 + 0.28 * len(lines))) as figure:
        axes = figure.subplots()
        axes.axvline(0, color="black", linewidth=0.8)
        for y, line in enumerate(lines):
            entry = None if isinstance(line, str) else line.ours
            if entry is None or entry.difference is None:
                continue
            found, colour = entry.difference, COLOURS[entry.verdict]
            face = colour if entry.verdict in (WIN, LOSS) else "white"
            axes.plot([found.low, found.high], [y, y], color=colour, linewidth=1.6)
            axes.plot(found.mean, y, "o", color=colour, markerfacecolor=face, markersize=5.5)
        axes.set_title("MetricOpt - the best of loss only and no training, each with and without a tuned bias")
        axes.set_xlabel("better by, in units of the metric; 95 % interval")
        axes.locator_params(axis="x", nbins=6)
        axes.grid(axis="x", alpha=0.25)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
        axes.set_yticks(range(len(lines)), [line if isinstance(line, str) else line.name for line in lines])
        axes.set_ylim(len(lines) - 0.4, -0.6)
        for line, label in zip(lines, axes.get_yticklabels(), strict=True):
            label.set_fontweight("bold" if isinstance(line, str) else "normal")
