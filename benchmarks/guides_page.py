"""docs/results/guides.md: the guides beside each other, where they were run with the same passes and calls."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean

from metricopt_hf.comparison.report import mean_and_error

from .comparing import OURS, UNGUIDED, Result
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


def mean_trust(result: Result, method: str) -> float:
    """Over all looks of all runs."""
    curves = [run["curve"]["trust"] for run in result.rows[method, PLAIN].runs.values()]
    return mean(value for curve in curves for value in curve if value is not None)


def guides_section(results: Sequence[Result]) -> list[str]:
    """Parts of the page: what each is for, how often it was best, and the table."""
    shared = [result for result in results if all((method, PLAIN) in result.rows for method in (*GUIDES, UNGUIDED))]
    table, best = [], dict.fromkeys(GUIDES, 0)
    for result in shared:
        seeds = sorted(set.intersection(*(set(result.rows[m, PLAIN].runs) for m in (*GUIDES, UNGUIDED))))
        scores = {
            method: [result.rows[method, PLAIN].of(seed)["scores"]["report"] for seed in seeds]
            for method in (UNGUIDED, *GUIDES)
        }
        best[max(GUIDES, key=lambda method: result.task.sign * mean(scores[method]))] += 1
        for method, values in scores.items():
            score, error = mean_and_error(values)
            difference = result.difference((method, PLAIN), (UNGUIDED, PLAIN)) if method in GUIDES else None
            table.append(
                [
                    f"[{result.task.name}]({result.task.name}.md)" if method == UNGUIDED else "",
                    GUIDES[method][0] if method in GUIDES else "none",
                    f"{score:.4f} ± {error:.4f} ({len(seeds)})",
                    interval(difference),
                    f"{mean_trust(result, method):.2f}" if method in GUIDES else "",
                    f"{result.rows[method, PLAIN].seconds:.1f}",
                ]
            )
    when = [[f"`{name}`", why, f"{best[method]} of {len(shared)}"] for method, (name, why) in GUIDES.items()]
    headers = ["task", "guide", "report split (seeds)", "better than without guidance by", "trust", "seconds"]
    return [
        "# Guides",
        "All guides answer the same question, which way the metric improves, and are judged by the same trust. "
        "`MetricOptConfig(guide=...)`, or `--guide` of an example, names one.",
        markdown(["guide", "when to take it", "best of the three"], when),
        "Every run has the same start, phi, steps, passes and metric calls. The two that are not the default have its "
        "setting, which was chosen for it and not for them, and they were run with fewer seeds; scores are over the "
        "seeds that all have, differences and seconds over those that both have. The smaller score is the better one "
        "where the task's page says so.",
        markdown(headers, table),
    ]
