"""docs/results/guides.md: the guides beside each other, where they were run with the same passes and calls."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean

from examples.comparison.report import mean_and_error

from .comparing import OURS, UNGUIDED, Result, Row
from .measure import PLAIN
from .tables import interval, markdown

# method -> name of the guide in a config, and when to take it
GUIDES = {
    OURS: (
        "value_function",
        "The default. It needs nothing but scores, so any metric and any outputs will do, and it sees whatever the "
        "metric sees, such as groups that the model is not given.",
    ),
    "bridge": (
        "bridge",
        "Where outputs and labels are classes or numbers, the metric is a function of these alone, and training "
        "examples are labelled as cleanly as those it is observed on: its gradient is that of a training batch.",
    ),
    "loss_alignment": (
        "loss_alignment",
        "Where a loss of classes, or of pairs, with other weights would do. It is followed only as far as its loss "
        "ranks real scores: see its trust below.",
    ),
}


def shared_rows(result: Result) -> dict[str, Row]:
    """The guides, and the same without guidance, over the seeds that all have; empty of fewer than two."""
    rows = {method: result.rows.get((method, PLAIN)) for method in (UNGUIDED, *GUIDES)}
    if None in rows.values():
        return {}
    seeds = set.intersection(*(set(row.runs) for row in rows.values()))
    if len(seeds) < 2:
        return {}
    return {m: Row(m, PLAIN, {seed: row.runs[seed] for seed in seeds}) for m, row in rows.items()}


def mean_trust(row: Row) -> float:
    """Over all looks of all runs."""
    return mean(value for run in row.runs.values() for value in run["curve"]["trust"] if value is not None)


def guides_section(results: Sequence[Result]) -> list[str]:
    """Parts of the page: what each is for, how often it was best, and the table."""
    shared = [(result.task, rows) for result in results if (rows := shared_rows(result))]
    table, best, told = [], dict.fromkeys(GUIDES, 0), dict.fromkeys(GUIDES, 0)
    for task, rows in shared:
        best[max(GUIDES, key=lambda method: task.sign * mean(rows[method].scores()))] += 1
        for method, row in rows.items():
            score, error = mean_and_error(row.scores())
            difference = row.minus(rows[UNGUIDED], task.sign) if method in GUIDES else None
            if difference is not None:
                told[method] += difference.low > 0
            table.append(
                [
                    f"[{task.name}]({task.name}.md)" if method == UNGUIDED else "",
                    GUIDES[method][0] if method in GUIDES else "none",
                    f"{score:.4f} ± {error:.4f} ({len(row.runs)})",
                    interval(difference),
                    f"{mean_trust(row):.2f}" if method in GUIDES else "",
                    f"{row.seconds:.1f}",
                ]
            )
    when = [
        [f"`{name}`", why, f"{best[method]} of {len(shared)}", f"{told[method]} of {len(shared)}"]
        for method, (name, why) in GUIDES.items()
    ]
    headers = ["task", "guide", "report split (seeds)", "better than without guidance by", "trust", "seconds"]
    return [
        "# Guides",
        "All guides answer the same question, which way the metric improves, and are judged by the same trust. "
        "`MetricOptConfig(guide=...)`, or `--guide` of an example, names one.",
        markdown(["guide", "when to take it", "best mean of the three", "interval above no guidance"], when),
        "Every run has the same start, phi, steps, passes and metric calls. The two that are not the default have its "
        "setting, which was chosen for it and not for them. They were run with few seeds, and all figures here are "
        "over the seeds that all have: 95 % intervals of so few are wide, and the task's page has the default's own "
        "over all of its seeds. Trust is the mean over a run.",
        markdown(headers, table),
    ]
