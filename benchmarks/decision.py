"""What to use for which metric, as the records say: a table for the README and a page of its own."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from .comparing import ABOVE, LOSS_ONLY, OURS, WIN, Key, Result, groups
from .measure import PLAIN, POST_HOC
from .methods import RIVALS
from .tables import markdown

# Kind of task -> the metrics and data that are of this kind, as somebody would say who does not know it yet
YOURS = {
    "threshold": ("F1, G-mean, MCC, a cost, the worst class", "the loss is right about the order, not where to decide"),
    "beyond threshold": (
        "the worst group, fairness, recall at a precision",
        "groups, cameras or sources differ, or the model ranks poorly at the top: no one threshold is right for all",
    ),
    "no conflict": ("accuracy, average precision, a correlation", "train is drawn like the data to be judged on"),
}
OURS_PAYS = "**MetricOpt**"
THRESHOLD = "**a threshold**: `posthoc.tune_bias` on held-out data"
NOTHING = "**the loss alone**: nothing to gain"
BEGIN, END = "<!-- decision table, written by make bench-report -->", "<!-- end of the decision table -->"


def better(results: Sequence[Result], ours: Key, theirs: Key) -> tuple[list[str], int]:
    """The tasks where the interval of `ours - theirs` lies above zero, and how many have both."""
    found = {result.task.name: result.difference(ours, theirs) for result in results}
    found = {name: difference for name, difference in found.items() if difference is not None}
    return [name for name, difference in found.items() if difference.low > 0], len(found)


def ours_pays(results: Sequence[Result]) -> tuple[list[str], int]:
    """The tasks where MetricOpt is better than loss only, with a bias tuned on both sides; and how many were run."""
    verdicts = {r.task.name: r.compared[OURS, POST_HOC].verdict for r in results if (OURS, POST_HOC) in r.compared}
    if not verdicts:  # numbers are not tuned post hoc
        verdicts = {r.task.name: r.compared[OURS, PLAIN].verdict for r in results if (OURS, PLAIN) in r.compared}
    return [name for name, verdict in verdicts.items() if verdict in (WIN, ABOVE)], len(verdicts)


def advice(pays: int, of: int, bias: int, of_bias: int) -> str:
    """What to use, by what pays on at least half of the tasks; "" where nothing was run."""
    if of and 2 * pays >= of:
        return OURS_PAYS
    if of_bias and 2 * bias >= of_bias:
        return THRESHOLD
    return NOTHING if of else ""


def specialists(results: Sequence[Result]) -> str:
    """The methods that may see more than the metric, where their interval lies above that of their reference."""
    found: dict[str, list[str]] = {}
    for result in results:
        for (method, variant), entry in result.compared.items():
            rival = RIVALS[method]
            special = rival.reads_labels or rival.reads_groups or rival.knows_formula
            if special and variant == PLAIN and entry.difference is not None and entry.difference.low > 0:
                found.setdefault(rival.title, []).append(result.task.name)
    return "; ".join(f"{title} ({_named(names)})" for title, names in found.items())


def table(results: Sequence[Result], to_results: str) -> str:
    """A row per kind of task. `to_results`: the way from the page to docs/results/, such as "docs/results/"."""
    rows = []
    for kind, members in groups(results).items():
        (pays, of), (bias, of_bias) = ours_pays(members), better(
            members, (LOSS_ONLY[0], POST_HOC), (LOSS_ONLY[0], PLAIN)
        )
        metric, data = YOURS.get(kind, (kind, ""))
        measured = [
            f"MetricOpt better on {len(pays)} of {of}" + (f" ({_named(pays, to_results)})" if pays else ""),
            f"a bias alone on {len(bias)} of {of_bias}",
        ]
        special = specialists(members)
        rows.append([metric, data, advice(len(pays), of, len(bias), of_bias), "; ".join(measured), special])
    headers = ["your metric", "your data", "use", "measured", "or, with observation labels, groups or the formula"]
    return markdown(headers, rows)


def page(results: Sequence[Result]) -> str:
    return (
        "# What to use\n\n"
        f"{table(results, '')}\n\n"
        "A row is a kind of task, and says what paid on at least half of its tasks. MetricOpt counts as better where "
        "its interval lies above that of loss only at its best, with a bias per logit tuned on both sides; a bias "
        "where loss only is better with it than without. The last column names methods that are better than loss "
        "only and see more than a metric's answers: they train on the labels of the observation split, are told its "
        "groups, or know the metric's formula. Which row is yours, `trainer.diagnose()` measures.\n\n"
        "Written by `make bench-report` from the records in `benchmarks/results/`; do not edit.\n"
    )


def write_into(path: Path, results: Sequence[Result]) -> None:
    """Renew the table between its marks in a page at the project's root, where it has such marks."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    if BEGIN not in text:
        return
    block = f"{BEGIN}\n{table(results, 'docs/results/')}\n{END}"
    path.write_text(re.sub(f"{BEGIN}.*?{END}", lambda _: block, text, flags=re.S), encoding="utf-8")


def _named(names: Sequence[str], to_results: str | None = None) -> str:
    return ", ".join(name if to_results is None else f"[{name}]({to_results}{name}.md)" for name in names)
