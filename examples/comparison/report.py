"""Tables and plots of what runs gave: methods against each other over seeds, and one run along its steps.

Uses public names only, so that it is also an example of what can be read from a trainer after a run.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from scipy.stats import t as student_t

from metricopt_hf import ConfigurationError, MetricOptTrainer
from metricopt_hf.extras import require

BETTER, WORSE, INSIDE_NOISE, ONE_SEED, NO_FIGURE = "better", "worse", "inside noise", "one seed", "no figure"
# A difference of at most so many standard errors is called noise.
NOISE_ERRORS = 2.0

SHOWN_CALLS = ("observe", "select", "post-hoc")


@dataclass
class MethodRun:
    """One method, run with one seed.

    Attributes:
        method: row of the table.
        seed: runs of different methods with the same seed are compared with each other.
        scores: the metric on each split, by the split's name.
        by_group: the metric on each group's examples of the last split, where it is told groups; by the group's number.
        calls: metric calls by purpose (see `Ledger`).
        seconds: what the run took.
        details: whatever else should stand in the results file; see `details_of`.
    """

    method: str
    seed: int
    scores: dict[str, float]
    calls: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    details: dict[str, Any] = field(default_factory=dict)
    by_group: dict[int, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Difference:
    """A paired difference.

    Attributes:
        mean: over the seeds, in units of the metric.
        error: its standard error; nan for one seed.
        verdict: "better", "worse", "inside noise", "one seed", or "no figure".
    """

    mean: float
    error: float
    verdict: str


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error (nan for fewer than two values).

    Example:
        >>> mean_and_error([1.0, 2.0, 3.0])
        (2.0, 0.5773502691896258)
    """
    values = np.asarray(values, dtype=float)
    error = float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else float("nan")
    return float(values.mean()), error


def paired_difference(
    values: Sequence[float], reference: Sequence[float], greater_is_better: bool = True
) -> Difference:
    """`values` minus `reference`, entry by entry, one entry per seed: what the seeds share cancels.

    Example:
        >>> paired_difference([0.75, 0.85, 0.95], [0.5, 0.75, 0.75]).verdict
        'better'
        >>> paired_difference([0.75, 0.5], [0.5, 0.75]).verdict
        'inside noise'
    """
    if len(values) != len(reference) or not len(values):
        raise ConfigurationError(f"Cannot pair {len(values)} values with {len(reference)}: one of each per seed.")
    mean, error = mean_and_error(np.subtract(values, reference))
    if math.isnan(error):
        verdict = ONE_SEED
    elif abs(mean) <= NOISE_ERRORS * error:
        verdict = INSIDE_NOISE
    else:
        verdict = BETTER if (mean > 0) == greater_is_better else WORSE
    return Difference(mean, error, verdict)


def compare(
    runs: Sequence[MethodRun], reference: str, split: str, greater_is_better: bool = True
) -> dict[str, Difference]:
    """For every other method, its paired difference to the method `reference` on `split`.

    Raises:
        ConfigurationError: a method was not run with the same seeds as the reference.
    """
    by_method: dict[str, dict[int, float]] = {}
    for run in runs:
        by_method.setdefault(run.method, {})[run.seed] = run.scores[split]
    base = by_method.get(reference, {})
    differences = {}
    for method, scores in by_method.items():
        if method == reference or not base:
            continue
        if set(scores) != set(base):
            raise ConfigurationError(
                f"{method!r} was run with the seeds {sorted(scores)}, {reference!r} with {sorted(base)}: differences "
                "are paired by seed."
            )
        # without seeds of which a figure is missing, as the metric failed
        seeds = [seed for seed in sorted(base) if math.isfinite(scores[seed] - base[seed])]
        if not seeds:
            differences[method] = Difference(float("nan"), float("nan"), NO_FIGURE)
            continue
        differences[method] = paired_difference([scores[s] for s in seeds], [base[s] for s in seeds], greater_is_better)
    return differences


def comparison_table(
    runs: Sequence[MethodRun],
    reference: str,
    splits: Sequence[str] = ("observation", "selection", "report"),
    greater_is_better: bool = True,
    tablefmt: str = "simple",
) -> str:
    """One row per method: means and standard errors over seeds, the paired difference on the last split, and the costs.

    Args:
        runs: in the order in which their methods shall stand.
        reference: the method that the others are compared with.
        splits: columns; the last one is the one that the comparison is about.
        tablefmt: of `tabulate`: "simple" for a terminal, "github" for Markdown.
    """
    tabulate = require("tabulate", "examples").tabulate
    differences = compare(runs, reference, splits[-1], greater_is_better)
    line = "\n" if tablefmt == "simple" else " "
    calls = f"calls: {SHOWN_CALLS[0]} /{line}{' / '.join(SHOWN_CALLS[1:])}"
    headers = ["method", *splits, f"{splits[-1]} - {reference}", calls, "seconds"]
    rows = []
    for method in dict.fromkeys(run.method for run in runs):
        mine = [run for run in runs if run.method == method]
        difference = differences.get(method)
        rows.append(
            [
                method,
                *(_estimate(*mean_and_error([run.scores[split] for run in mine])) for split in splits),
                difference and f"{_estimate(difference.mean, difference.error, sign='+')} {difference.verdict}",
                " / ".join(_count([run.calls.get(purpose, 0) for run in mine]) for purpose in SHOWN_CALLS),
                f"{np.mean([run.seconds for run in mine]):.1f}",
            ]
        )
    align = ["left"] * (len(headers) - 2) + ["right"] * 2
    return tabulate(rows, headers, tablefmt=tablefmt, colalign=align, disable_numparse=True)


def table_note(num_seeds: int) -> str:
    """What the table's numbers are, and how often chance alone would write "better" or "worse" into it."""
    note = (
        f"Means over {num_seeds} seed{'s' if num_seeds != 1 else ''}, ± standard error; calls and seconds per seed. "
        f'Differences are paired by seed; up to {NOISE_ERRORS:g} standard errors are called "{INSIDE_NOISE}".'
    )
    if num_seeds > 1:
        chance = 2 * student_t.sf(NOISE_ERRORS, num_seeds - 1)
        note += f" With {num_seeds} seeds a mere chance exceeds that in {100 * chance:.0f} % of comparisons."
    return note


def details_of(trainer: MetricOptTrainer) -> dict[str, Any]:
    """The last run of a trainer as JSON values; empty where it has no metric."""
    result = trainer.result
    if result is None:
        return {}
    return {
        "greater_is_better": result.greater_is_better,
        "candidates": [{"kind": c.kind, "step": c.step, "score": c.score} for c in result.candidates],
        "chosen": {"kind": result.chosen.kind, "step": result.chosen.step, "score": result.chosen.score},
        "why": result.why,
        "ended": result.ended,
        "curve": list(result.curve),
        "calls": dict(result.ledger.calls),
        "passes": dict(result.ledger.passes),
        "seconds": dict(result.ledger.seconds),
    }


def save_results(path: str | os.PathLike, runs: Sequence[MethodRun], **more: Any) -> None:
    """Write the runs and `more` as JSON; numbers that are not finite become null."""
    document = _json_value({**more, "runs": [asdict(run) for run in runs]})
    with open(path, "w", encoding="utf-8") as file:
        json.dump(document, file, indent=1, allow_nan=False)
        file.write("\n")


def plot_run(
    path: str | os.PathLike,
    details: dict[str, Any],
    metric_name: str,
    reference: tuple[str, float] | None = None,
    title: str | None = None,
) -> None:
    """Draw the metric phase of a run into an image file: the metric above, the size of each guide's steps below.

    Args:
        details: of `details_of`.
        metric_name: label of the axis.
        reference: name and selection score of a run to compare with.
    """
    require("matplotlib", "plot")
    from matplotlib.figure import Figure  # no pyplot: no windows, no global state

    curve, chosen = details["curve"], details["chosen"]
    sign = 1 if details["greater_is_better"] else -1
    figure = Figure(figsize=(9, 6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    after = [row["step"] + 1 for row in curve]
    above.plot(after, [sign * row["value"] for row in curve], "o-", color="tab:blue", label="observation split")
    for i, candidate in enumerate(details["candidates"]):
        label = f"selection split: {candidate['kind']}"
        above.plot(candidate["step"], candidate["score"], "osD"[i % 3], color="tab:orange", label=label)
    if reference is not None:
        name, score = reference
        above.axhline(score, color="tab:gray", linestyle=":", label=f"selection split: {name}")
    above.plot(chosen["step"], chosen["score"], "*", color="tab:red", markersize=15, label="kept")
    above.set_ylabel(metric_name)
    above.legend(fontsize="small", framealpha=0.6)
    above.set_title(title or "")

    for i, name in enumerate(dict.fromkeys(name for row in curve for name in row["rates"])):
        below.plot(after, [row["rates"].get(name, math.nan) for row in curve], color=f"C{i + 2}", label=name)
        taken = [(step, row["rates"][name]) for step, row in zip(after, curve, strict=True) if row["guide"] == name]
        below.plot(*(zip(*taken, strict=True) if taken else ((), ())), "o", color=f"C{i + 2}")
    below.set_yscale("log", base=2)
    below.set_ylabel("rate of each guide\n(dot: step taken)")
    below.set_xlabel("optimizer step")
    if curve:
        below.legend(fontsize="small", framealpha=0.6)
    for axes in (above, below):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def plot_groups(
    path: str | os.PathLike, runs: Sequence[MethodRun], axis: str, names: Sequence[str] = ()
) -> None:
    """Draw each method's metric in each group, mean and standard error over seeds, into an image file.

    Args:
        axis: its label.
        names: of the groups, by their number.
    """
    require("matplotlib", "plot")
    from matplotlib.figure import Figure  # no pyplot: no windows, no global state

    methods = list(dict.fromkeys(run.method for run in runs))
    groups = sorted({group for run in runs for group in run.by_group})
    figure = Figure(figsize=(max(7, 2 * len(groups)), 4.5), layout="constrained")
    axes, width = figure.subplots(), 0.8 / len(methods)
    for i, method in enumerate(methods):
        estimates = [
            mean_and_error([run.by_group.get(group, float("nan")) for run in runs if run.method == method])
            for group in groups
        ]
        means, errors = zip(*estimates, strict=True)
        places = np.arange(len(groups)) + (i + 0.5) * width - 0.4
        axes.bar(places, means, width, yerr=errors, capsize=2, color=f"C{i}", label=method)
    axes.set_xticks(range(len(groups)), [names[g] if 0 <= g < len(names) else f"group {g}" for g in groups])
    seeds = len({run.seed for run in runs})
    axes.set_ylabel(axis)
    axes.set_xlabel(f"mean over {seeds} seed{'s' * (seeds > 1)} on the report split, with its standard error")
    axes.legend(fontsize="small", framealpha=0.6, ncols=len(methods), loc="upper center", bbox_to_anchor=(0.5, 1.12))
    axes.grid(alpha=0.25, axis="y")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def _estimate(mean: float, error: float, sign: str = "") -> str:
    return f"{mean:{sign}.3f}" + ("" if math.isnan(error) else f"±{error:.3f}")


def _count(values: Sequence[int]) -> str:
    return f"{np.mean(values):.0f}" if np.mean(values) else "-"


def _json_value(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _json_value(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json_value(item) for item in value]
    if isinstance(value, (np.generic, np.ndarray)):
        return _json_value(value.tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value
