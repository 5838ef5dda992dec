"""The report's tables: of all tasks, of a task's methods (a few to read, all as CSV), of controls and of harm."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from statistics import mean

from examples.comparison.report import mean_and_error, require

from .comparing import CHEAP, CONTROLS, EQUAL_CALLS, OURS, WAYS, Compared, Result, Row, groups
from .conduct import harms, loss_seconds
from .measure import PLAIN
from .methods import RIVALS
from .statistics import Paired

SHOWN_CALLS = ("observe", "select", "post-hoc")


def markdown(headers: Sequence[str], table: Sequence[Sequence]) -> str:
    return require("tabulate", "report").tabulate(table, headers, tablefmt="github", disable_numparse=True)


def interval(difference: Paired | None, digits: int = 4) -> str:
    if difference is None:
        return ""
    return f"{difference.mean:+.{digits}f} [{difference.low:+.{digits}f}, {difference.high:+.{digits}f}]"


def judged(entry: Compared | None, digits: int = 4) -> str:
    return "" if entry is None else f"{interval(entry.difference, digits)} {entry.verdict}".strip()


def calls(row: Row, purpose: str) -> str:
    count = row.calls(purpose)
    return f"{count:.0f}" if count else "-"


def overview(results: Iterable[Result]) -> str:
    """A row per task, by kind; the difference comes third, and no cell is wide."""
    table = []
    for kind, members in groups(results).items():
        for result in members:
            task, ours, labels = result.task, result.ours, result.best_with_labels
            link = f"[{task.name}](docs/results/{task.name}.md){' *' * task.headline}"
            scores = f"{mean(result.rival.scores()):.3f}"
            if ours is not None:
                scores = f"{mean(ours.row.scores()):.3f} against {scores}"
            sees_more = "" if labels is None else f"{RIVALS[labels.row.method].title} {short(labels)}"
            table.append([link, kind, judged(ours, 3), scores, result.rival.title, sees_more])
    headers = ["task", "kind", "MetricOpt - rival", "scores", "rival", "reads labels - rival"]
    return markdown(headers, table)


def short(entry: Compared | None) -> str:
    """A difference without its interval."""
    return "" if entry is None or entry.difference is None else f"{entry.difference.mean:+.3f}"


def methods_table(result: Result) -> str:
    """The methods that a reader wants first."""
    table, rival = [], result.rival
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
                "rival" if row is rival else entry.verdict,
                f"{row.passes:.0f}",
                " / ".join(calls(row, purpose) for purpose in SHOWN_CALLS),
                f"{row.seconds:.1f}",
            ]
        )
    scores = ["report split", "better than the rival by", "p, Holm", ""]
    headers = ["method", "seeds", *scores, "passes", "calls", "seconds"]
    return markdown(headers, table)


def methods_csv(result: Result) -> str:
    """All methods and variants, all columns; a cell is empty where there is nothing to say."""
    file, rival = io.StringIO(), result.rival
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
                int(RIVALS[method].reads_labels),
                int(RIVALS[method].knows_formula),
                len(row.runs),
                f"{mean(row.scores('selection')):.4f}",
                *(f"{number:.4f}" for number in mean_and_error(row.scores())),
                *([f"{x:+.4f}" for x in (found.mean, found.low, found.high)] if found else [""] * 3),
                *([f"{p:.3f}" for p in (found.p, entry.corrected)] if found else [""] * 2),
                "rival" if row is rival else entry.verdict,
                f"{row.passes:.0f}",
                *(f"{row.calls(purpose):.0f}" for purpose in SHOWN_CALLS),
                f"{row.seconds:.1f}",
            ]
        )
    return file.getvalue()


def controls_table(results: Iterable[Result]) -> str:
    """Guides that know nothing, against the rival, and MetricOpt against the first of them; of the tasks that have
    any."""
    table = [
        [
            result.name,
            interval(result.difference((OURS, PLAIN), (CONTROLS[0], PLAIN))),
            *(judged(result.compared.get((control, PLAIN))) for control in CONTROLS),
        ]
        for result in results
    ]
    headers = ["task", f"MetricOpt - {CONTROLS[0]}", *(f"{name} - rival" for name in CONTROLS)]
    return markdown(headers, _measured(table))


def ways_table(results: Iterable[Result]) -> str:
    """Each of MetricOpt's two ways alone, against both together, over the seeds that both have."""
    table = [
        [result.name, *(interval(result.difference((way, PLAIN), (OURS, PLAIN))) for way in WAYS)] for result in results
    ]
    return markdown(["task", *(f"{way} alone - MetricOpt" for way in WAYS)], _measured(table))


def searched_table(results: Iterable[Result]) -> str:
    """MetricOpt against CMA-ES at equal calls, over the seeds that both have."""
    table = [[result.name, interval(result.searched)] for result in results]
    return markdown(["task", f"MetricOpt - {RIVALS[EQUAL_CALLS].title}"], _measured(table))


def _measured(table: Iterable[Sequence[str]]) -> list[Sequence[str]]:
    """The rows that say something behind the task's name."""
    return [row for row in table if any(row[1:])]


def share(count: int, of: int) -> str:
    return f"{count} of {of} ({count / of:.1%})" if of else ""


def harm_table(results: Sequence[Result]) -> str:
    """Over all tasks."""
    table = []
    for method in (OURS, *CONTROLS, *CHEAP):
        worse, unseen, runs = harms(results, method)
        table.append([RIVALS[method].title, share(worse, runs), share(unseen, runs)])
    return markdown(["method", "below the rival", "and yet preferred by selection"], table)


def harm_by_task(results: Iterable[Result]) -> str:
    table = []
    for result in results:
        counts = [harms([result], method) for method in (OURS, *CONTROLS)]
        table.append([result.name, *(f"{worse} of {runs}" if runs else "" for worse, _, runs in counts)])
    return markdown(["task", *(RIVALS[method].title for method in (OURS, *CONTROLS))], table)


def costs(results: Iterable[Result]) -> list[tuple[Result, Row, float | None]]:
    """MetricOpt's runs, and the processor seconds of 200 steps by the loss."""
    rows = [(result, result.rows.get((OURS, PLAIN))) for result in results]
    return [(result, ours, loss_seconds(ours)) for result, ours in rows if ours]


def cost(results: Iterable[Result]) -> str:
    """What a run costs, as a sentence; "" where none was run."""
    found = costs(results)
    numbers = (
        [ours.passes for _, ours, _ in found],
        [ours.calls("observe") for _, ours, _ in found],
        [ours.seconds / alone for _, ours, alone in found if alone is not None],
    )
    if not all(numbers):
        return ""
    passes, made, ratios = ((min(values), max(values)) for values in numbers)
    return (
        f"A run takes {passes[0]:.0f} to {passes[1]:.0f} passes over the observation rows, {made[0]:,.0f} to "
        f"{made[1]:,.0f} metric calls, and {ratios[0]:.1f} to {ratios[1]:.1f} times the processor time of 200 steps by "
        "the loss."
    )


def cost_table(results: Iterable[Result]) -> str:
    """Processor time, passes and calls of MetricOpt's runs."""
    table = []
    for result, ours, alone in costs(results):
        cells = [ours.seconds, alone, ours.seconds / alone] if alone else [ours.seconds, None, None]
        cells = ["" if number is None else f"{number:.1f}" for number in cells]
        table.append([result.name, *cells, f"{ours.passes:.0f}", calls(ours, "observe"), calls(ours, "select")])
    headers = ["task", "seconds", "of 200 by loss", "ratio", "passes", "calls to observe", "to select"]
    return markdown(headers, table)
