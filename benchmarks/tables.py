"""The report's tables: of all tasks, of a task's methods (a few to read, all as CSV), of controls and of harm."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from statistics import mean

from examples.comparison.report import mean_and_error, require

from .comparing import (
    BLACK_BOX,
    CONTROLS,
    LOSS_ONLY,
    NEGATED,
    OURS,
    UNGUIDED,
    Compared,
    Result,
    Row,
    groups,
    reference,
)
from .conduct import AGAINST, BEST, ONE_SETTING, WITHOUT_GUIDANCE, calls_needed, coverage, harms, seconds_ratio
from .measure import PLAIN, POST_HOC
from .methods import RIVALS
from .problem import KINDS
from .statistics import Paired

SHOWN_CALLS = ("observe", "select", "post-hoc")


def markdown(headers: Sequence[str], table: Sequence[Sequence]) -> str:
    return require("tabulate", "report").tabulate(table, headers, tablefmt="github", disable_numparse=True)


def interval(difference: Paired | None) -> str:
    if difference is None:
        return ""
    return f"{difference.mean:+.4f} [{difference.low:+.4f}, {difference.high:+.4f}]"


def judged(entry: Compared | None) -> str:
    return "" if entry is None else f"{interval(entry.difference)} {entry.verdict}".strip()


def calls(row: Row, purpose: str) -> str:
    count = row.calls(purpose)
    return f"{count:.0f}" if count else "-"


def overview(results: Iterable[Result]) -> str:
    """A row per task, by kind."""
    table = []
    for kind, members in groups(results).items():
        table.append([f"**{kind}**", KINDS.get(kind, ""), "", "", "", ""])
        for result in members:
            task, cells = result.task, []
            for variant in (PLAIN, POST_HOC):
                ours = result.compared.get((OURS, variant))
                pair = [reference(task, result.rows, variant), ours and ours.row]
                cells.append(" → ".join(f"{mean(row.scores()):.4f}" for row in pair) if all(pair) else "")
                cells.append(judged(ours))
            link = f"[{task.name}](docs/results/{task.name}.md){' *' * task.headline}"
            table.append([link, f"{task.title}: {task.metric_name}", *cells])
    return markdown(
        ["task", "", "loss only → MetricOpt", "better by", "both with post-hoc tuning", "better by"],
        table,
    )


def methods_table(result: Result) -> str:
    """The methods that a reader wants first."""
    references = [reference(result.task, result.rows, variant) for variant in (PLAIN, POST_HOC)]
    table = []
    for entry in result.shown():
        row = entry.row
        score, error = mean_and_error(row.scores())
        table.append(
            [
                row.title,
                len(row.runs),
                f"{score:.4f} ± {error:.4f}",
                interval(entry.difference),
                "" if entry.difference is None else f"{entry.corrected:.3f}",
                "reference" if row in references else entry.verdict,
                f"{row.passes:.0f}",
                " / ".join(calls(row, purpose) for purpose in SHOWN_CALLS),
                f"{row.seconds:.1f}",
            ]
        )
    scores = ["report split", "better than the reference by", "p, Holm", ""]
    headers = ["method", "seeds", *scores, "passes", "calls", "seconds"]
    return markdown(headers, table)


def methods_csv(result: Result) -> str:
    """All methods and variants, all columns; a cell is empty where there is nothing to say."""
    references = [reference(result.task, result.rows, variant) for variant in (PLAIN, POST_HOC)]
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(
        "method,variant,title,reads_labels,knows_formula,seeds,selection,report,report_error,better_by,low,high,p,"
        "p_holm,verdict,passes,calls_observe,calls_select,calls_post_hoc,seconds".split(",")
    )
    for (method, variant), entry in result.compared.items():
        row, found = entry.row, entry.difference
        writer.writerow(
            [
                method,
                variant,
                row.title,
                int(row.reads_labels),
                int(RIVALS[method].knows_formula),
                len(row.runs),
                f"{mean(row.scores('selection')):.4f}",
                *(f"{number:.4f}" for number in mean_and_error(row.scores())),
                *([f"{x:+.4f}" for x in (found.mean, found.low, found.high)] if found else [""] * 3),
                *([f"{p:.3f}" for p in (found.p, entry.corrected)] if found else [""] * 2),
                "reference" if row in references else entry.verdict,
                f"{row.passes:.0f}",
                *(f"{row.calls(purpose):.0f}" for purpose in SHOWN_CALLS),
                f"{row.seconds:.1f}",
            ]
        )
    return file.getvalue()


def controls_table(results: Iterable[Result]) -> str:
    """What the guidance alone is worth, and what it is worth when it knows nothing."""
    table = [
        [
            result.name,
            interval(result.difference((OURS, PLAIN), (UNGUIDED, PLAIN))),
            *(judged(result.compared.get((control, PLAIN))) for control in CONTROLS),
        ]
        for result in results
    ]
    headers = ["task", "MetricOpt - the same without guidance", *(f"{name} - loss only" for name in CONTROLS)]
    return markdown(headers, table)


def one_setting_table(results: Iterable[Result]) -> str:
    """Against loss only at the setting that was chosen for it over all tasks."""
    pairs = [((OURS, variant), (LOSS_ONLY[0], variant)) for variant in (PLAIN, POST_HOC)]
    table = [[result.name, *(interval(result.difference(*pair)) for pair in pairs)] for result in results]
    return markdown(["task", "MetricOpt - loss only, one setting", "both with post-hoc tuning"], table)


def share(count: int, of: int) -> str:
    return f"{count} of {of} ({count / of:.1%})" if of else ""


def harm_table(results: Sequence[Result]) -> str:
    """Over all tasks."""
    table = []
    for method in (OURS, NEGATED, *LOSS_ONLY):
        cells = []
        for against in AGAINST:
            itself = (method, against) in ((LOSS_ONLY[0], ONE_SETTING), (UNGUIDED, WITHOUT_GUIDANCE))
            worse, _, runs = harms(results, method, against)
            cells.append("" if itself else share(worse, runs))
        _, unseen, runs = harms(results, method, BEST)
        table.append([RIVALS[method].title, *cells, share(unseen, runs)])
    headers = ["method", *(f"against {name}" for name in AGAINST), f"against {BEST}, and yet preferred by selection"]
    return markdown(headers, table)


def harm_by_task(results: Iterable[Result]) -> str:
    pairs = [(method, against) for method in (OURS, NEGATED) for against in (BEST, WITHOUT_GUIDANCE)]
    table = []
    for result in results:
        counts = [harms([result], *pair) for pair in pairs]
        table.append([result.name, *(f"{worse} of {runs}" if runs else "" for worse, _, runs in counts)])
    return markdown(["task", *(f"{RIVALS[method].title}: {against}" for method, against in pairs)], table)


def cost_table(results: Iterable[Result]) -> str:
    """Calibration, time and calls of MetricOpt's runs."""
    table = []
    for result in results:
        ours = result.rows.get((OURS, PLAIN))
        if ours is None:
            continue
        inside, observations = coverage(ours)
        times = seconds_ratio(ours, result.rows.get((UNGUIDED, PLAIN)))
        searcher, needed, spent = calls_needed(result.task, result.rows, OURS, BLACK_BOX)
        table.append(
            [
                result.name,
                f"{inside / observations:.1%}" if observations else "",
                "" if times is None else f"{times:.1f}",
                searcher and RIVALS[searcher].title,
                searcher and ("not in" if needed is None else f"{needed} of") + f" {spent}",
            ]
        )
    headers = ["task", "in 90 % intervals", "time / without guidance", "best black-box searcher", "calls to its end"]
    return markdown(headers, table)
