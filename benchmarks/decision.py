"""What to use for which metric, as the records say: a table for the README and a page of its own."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from .comparing import Result, groups
from .measure import PLAIN, POST_HOC
from .methods import RIVALS
from .statistics import Paired
from .tables import cost, markdown

# Kind of task -> the metrics and data that are of this kind, as somebody would say who does not know it yet; no cell of
# the table is wider than 60 characters
YOURS = {
    "threshold": ("F1, G-mean, MCC, a cost, the worst class", "the loss orders well, and decides at the wrong place"),
    "beyond threshold": (
        "the worst group, fairness, money, uplift",
        "the metric reads groups, money, treatment, source",
    ),
    "no conflict": ("accuracy, average precision, a correlation", "train is drawn like the data to be judged on"),
}
OURS_PAYS = "**MetricOpt**"
ASK = "what **`diagnose()`** says: MetricOpt, or the loss alone"
THRESHOLD = "**a threshold**, tuned on held-out data"
NOTHING = "**the loss alone**"
BEGIN, END = "<!-- decision table, written by make bench-report -->", "<!-- end of the decision table -->"
COST, END_COST = "<!-- cost, written by make bench-report -->", "<!-- end of the cost -->"


def better(difference: Paired | None) -> bool:
    """Whether the 95 % interval lies above zero."""
    return difference is not None and difference.low > 0


def bias_pays(results: Sequence[Result]) -> tuple[list[str], int]:
    """The tasks where a bias per logit makes the model better as it came, untrained; and how many have one."""
    found = {result.task.name: result.difference(("start", POST_HOC), ("start", PLAIN)) for result in results}
    found = {name: difference for name, difference in found.items() if difference is not None}
    return [name for name, difference in found.items() if better(difference)], len(found)


def ours_pays(results: Sequence[Result]) -> tuple[list[str], int]:
    """The tasks where MetricOpt is better than the best of what is cheap; and how many."""
    found = {result.task.name: result.ours.difference for result in results if result.ours is not None}
    return [name for name, difference in found.items() if better(difference)], len(found)


def advice(pays: int, of: int, bias: int, of_bias: int) -> str:
    """What to use, by what pays on most of the tasks, or, of MetricOpt, on some; "" where nothing was run."""
    if 2 * pays > of:
        return OURS_PAYS
    if 2 * bias > of_bias:
        return THRESHOLD
    if pays:
        return ASK
    return NOTHING if of else ""


def specialists(results: Sequence[Result]) -> str:
    """The methods that may see more than the metric, where their interval lies above the rival."""
    found: dict[str, list[str]] = {}
    for result in results:
        for (method, variant), entry in result.compared.items():
            rival = RIVALS[method]
            special = rival.reads_labels or rival.reads_groups or rival.knows_formula
            if special and variant == PLAIN and better(entry.difference):
                found.setdefault(rival.title, []).append(result.task.name)
    return "; ".join(f"{title} ({_named(names)})" for title, names in found.items())


def table(results: Sequence[Result], to_results: str) -> str:
    """A row per kind of task, and below it a line per kind that names the tasks.

    Args:
        to_results: the way from the page to docs/results/, such as "docs/results/".
    """
    rows, lines = [], []
    for kind, members in groups(results).items():
        (pays, of), (bias, of_bias) = ours_pays(members), bias_pays(members)
        metric, data = YOURS.get(kind, (kind, ""))
        counts = f"{len(pays)} of {of}", f"{len(bias)} of {of_bias}"
        rows.append([metric, data, advice(len(pays), of, len(bias), of_bias), *counts])
        said = [f"MetricOpt is better on {_named(pays, to_results)}"] if pays else []
        if special := specialists(members):
            said.append(f"of the methods that see more, better than the rival are {special}")
        if said:
            lines.append(f"- {metric}: {'; '.join(said)}.")
    headers = ["your metric", "your data", "use", "MetricOpt better on", "a bias alone on"]
    return "\n\n".join([markdown(headers, rows), *(["\n".join(lines)] if lines else [])])


def page(results: Sequence[Result]) -> str:
    return (
        "# What to use\n\n"
        "MetricOpt is for one situation: **your metric reads something that your loss cannot: groups, money, "
        "treatment, source.** For a better F1 or G-mean, take another threshold.\n\n"
        f"{table(results, '')}\n\n"
        "A row is a kind of task, and names what paid on most of its tasks. MetricOpt is compared with the "
        "best of loss only and the model as it came, each with and without a tuned bias per logit; a bias alone, with "
        "the model as it came. Better means that the 95 % interval lies above zero. The lines under the table name "
        "methods that are better than the rival and see more than a metric's answers: they train on the labels of the "
        "observation split, are told its groups, or know the metric's formula. Which row is yours, "
        "`trainer.diagnose()` measures before any training.\n\n"
        "Written by `make bench-report` from the records in `benchmarks/results/`; do not edit.\n"
    )


def write_into(path: Path, results: Sequence[Result]) -> None:
    """Renew the table and the cost between their marks in a page at the project's root, where it has such marks."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    cost_line = f"{cost(results)} [By task](docs/results/harm.md#time)."
    for begin, end, block in ((BEGIN, END, table(results, "docs/results/")), (COST, END_COST, cost_line)):
        text = re.sub(f"{begin}.*?{end}", lambda _: f"{begin}\n{block}\n{end}", text, flags=re.S)  # noqa: B023
    if text:
        path.write_text(text, encoding="utf-8")


def _named(names: Sequence[str], to_results: str | None = None) -> str:
    return ", ".join(name if to_results is None else f"[{name}]({to_results}{name}.md)" for name in names)
