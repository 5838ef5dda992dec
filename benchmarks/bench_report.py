"""Writes BENCHMARKS.md, and the curves beside it, from the committed records alone: the same records, the same bytes.

python -m benchmarks.bench_report            (make bench-report)
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean

import numpy as np
from transformers import HfArgumentParser

from metricopt_hf.comparison.report import mean_and_error, require

from . import protocol
from .conduct import calls_needed, common_seeds, coverage, harm, seconds_ratio
from .curves import plot_curves
from .measure import PLAIN, POST_HOC
from .methods import RIVALS
from .problem import Task
from .provenance import PUBLISHED, made_by, protocol_text
from .records import RESULTS, read
from .statistics import Paired, holm, paired
from .tasks import tasks

ROOT = Path(__file__).resolve().parents[1]
OURS, UNGUIDED, CONTROLS, NEGATED, TWICE = "metricopt", "unguided", ("shuffled", "random"), "negated", "twice"
LOSS_ONLY = ("loss_only", "loss_small", UNGUIDED)  # at the setting chosen for it, in small steps, and in both
BLACK_BOX = ("cma", "cma_flat", "spsa", "evolution")
FEW = 5  # of a searcher's calls, that part
SIGNIFICANT = 0.05
SHOWN_CALLS = ("observe", "select", "post-hoc")
WIN, ABOVE, TIE, BELOW, LOSS = "win", "above", "tie", "below", "**loss**"


@dataclass
class ReportArguments:
    """From where to where."""

    results: str = field(default=str(RESULTS), metadata={"help": "Folder of the records."})
    output: str = field(default=str(ROOT / "BENCHMARKS.md"), metadata={"help": "File to write."})


@dataclass(frozen=True)
class Row:
    """A method, as it is or with what costs no training, over its seeds.

    Attributes:
        runs: seed -> record.
    """

    method: str
    variant: str
    runs: dict[int, dict]

    @property
    def title(self) -> str:
        rival = RIVALS[self.method]
        marks = "†" * self.reads_labels + "‡" * rival.knows_formula
        return rival.title + ("" if self.variant == PLAIN else f" + {self.variant}") + (f" {marks}" if marks else "")

    @property
    def reads_labels(self) -> bool:
        return RIVALS[self.method].reads_labels or POST_HOC in self.variant

    def of(self, seed: int) -> dict:
        return self.runs[seed]["variants"][self.variant]

    def scores(self, split: str = "report") -> list[float]:
        return [self.of(seed)["scores"][split] for seed in sorted(self.runs)]

    def calls(self, purpose: str) -> str:
        counts = [r["calls"].get(purpose, 0) + self.of(s)["calls"].get(purpose, 0) for s, r in self.runs.items()]
        return f"{mean(counts):.0f}" if any(counts) else "-"

    def minus(self, other: Row, sign: int) -> Paired | None:
        """On the report split, over the seeds that both have."""
        seeds = common_seeds(self, other)
        if len(seeds) < 2:
            return None
        pairs = [(self.of(s), other.of(s)) for s in seeds]
        scores = [a["scores"]["report"] - b["scores"]["report"] for a, b in pairs]
        return paired(scores, np.array([np.subtract(a["items"], b["items"]) for a, b in pairs]), sign)


def rows_of(records: list[dict]) -> dict[tuple[str, str], Row]:
    """Rows of a task by method and variant, in the order of `RIVALS`."""
    runs: dict[str, dict[int, dict]] = {method: {} for method in RIVALS}
    for record in sorted(records, key=lambda r: r["seed"]):
        runs[record["method"]][record["seed"]] = record
    return {
        (method, variant): Row(method, variant, by_seed)
        for method, by_seed in runs.items()
        for variant in dict.fromkeys(v for record in by_seed.values() for v in record["variants"])
    }


@dataclass(frozen=True)
class Compared:
    """A row and its difference to the reference that may see as much as it does.

    Attributes:
        difference: to loss only, or, where the row reads observation labels, to loss only with post-hoc tuning. None:
            the reference itself.
        corrected: its p-value, Holm-corrected over the task's table.
    """

    row: Row
    difference: Paired | None = None
    corrected: float = float("nan")

    @property
    def verdict(self) -> str:
        if self.difference is None:
            return ""
        if self.corrected < SIGNIFICANT:
            return WIN if self.difference.mean > 0 else LOSS
        if self.difference.low > 0:
            return ABOVE
        return BELOW if self.difference.high < 0 else TIE


def reference(task: Task, rows: dict[tuple[str, str], Row], variant: str) -> Row | None:
    """Loss only at its best: of `LOSS_ONLY`, the one that is better on the selection split."""
    found = [rows[method, variant] for method in LOSS_ONLY if (method, variant) in rows]
    return max(found, key=lambda row: task.sign * mean(row.scores("selection")), default=None)


def compare(task: Task, rows: dict[tuple[str, str], Row]) -> dict[tuple[str, str], Compared]:
    plain = reference(task, rows, PLAIN)
    tuned = reference(task, rows, POST_HOC) or plain  # numbers are not tuned post hoc
    differences = {}
    for key, row in rows.items():
        if row is not plain and row is not tuned and row.method != "start":
            differences[key] = row.minus(tuned if row.reads_labels else plain, task.sign)
    tested = [key for key, difference in differences.items() if difference is not None]
    corrected = dict(zip(tested, holm([differences[key].p for key in tested]), strict=True))
    return {k: Compared(row, differences.get(k), corrected.get(k, float("nan"))) for k, row in rows.items()}


def interval(difference: Paired | None) -> str:
    if difference is None:
        return ""
    return f"{difference.mean:+.4f} [{difference.low:+.4f}, {difference.high:+.4f}]"


def task_section(task: Task, rows: dict, compared: dict, plot: str) -> Iterator[str]:
    tabulate = require("tabulate", "report").tabulate
    direction = "greater" if task.greater_is_better else "smaller"
    a_run = next(iter(next(iter(rows.values())).runs.values()))
    sizes = ", ".join(f"{name} {split['size']:,}" for name, split in a_run["splits"].items())
    yield f"### {task.title}: {task.metric_name}{' *' if task.headline else ''}"
    yield f"`{task.name}`; {direction} is better. Examples: {sizes}. {task.note}".rstrip()
    references = [reference(task, rows, variant) for variant in (PLAIN, POST_HOC)]
    table = []
    for entry in compared.values():
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
                " / ".join(row.calls(purpose) for purpose in SHOWN_CALLS),
                f"{mean(r['seconds']['run'] for r in row.runs.values()):.1f}",
            ]
        )
    headers = ["method", "seeds", "report split", "better than the reference by", "p, Holm", "", "calls", "seconds"]
    yield tabulate(table, headers, tablefmt="github", disable_numparse=True)
    yield f"![{task.title}, {task.metric_name}: curves]({plot})"


def overview(all_rows: dict[str, dict], all_compared: dict[str, dict], known: dict[str, Task]) -> Iterator[str]:
    tabulate = require("tabulate", "report").tabulate
    table = []
    for name, compared in all_compared.items():
        task, rows = known[name], all_rows[name]

        def cell(key, compared=compared) -> str:
            entry = compared.get(key)
            return "" if entry is None else f"{interval(entry.difference)} {entry.verdict}".strip()

        pair = rows.get((OURS, PLAIN)), rows.get((UNGUIDED, PLAIN))
        table.append(
            [
                f"{task.title}: {task.metric_name}{' *' if task.headline else ''}",
                cell((OURS, PLAIN)),
                interval(pair[0].minus(pair[1], task.sign)) if all(pair) else "",
                cell((OURS, POST_HOC)),
                *(cell((control, PLAIN)) for control in CONTROLS),
            ]
        )
    headers = [
        "task",
        "MetricOpt - loss only",
        "MetricOpt - the same without guidance",
        "MetricOpt - loss only, both + post-hoc",
        "shuffled - loss only",
        "random - loss only",
    ]
    yield tabulate(table, headers, tablefmt="github", disable_numparse=True)


def conduct(all_rows: dict[str, dict], known: dict[str, Task]) -> Iterator[str]:
    """What a run does besides its score."""
    tabulate = require("tabulate", "report").tabulate
    table, total = [], Counter()
    for name, rows in all_rows.items():
        task, ours = known[name], rows.get((OURS, PLAIN))
        if ours is None:
            continue
        others = {"loss": reference(task, rows, PLAIN), "unguided": rows.get((UNGUIDED, PLAIN))}
        others["one setting"] = rows[LOSS_ONLY[0], PLAIN]

        def harmed(method: str, against: str, task=task, rows=rows, others=others) -> str:
            worse, unseen, seeds = harm(task, rows.get((method, PLAIN)), others[against])
            total[method, against, "worse"] += worse
            total[method, against, "unseen"] += unseen
            total[method, against, "runs"] += seeds
            return f"{worse} of {seeds}" if seeds else ""

        cells = {(m, against): harmed(m, against) for m in (OURS, NEGATED, TWICE) for against in others}
        shown = [cells[method, against] for method in (OURS, NEGATED) for against in ("loss", "unguided")]
        for method in LOSS_ONLY:
            harmed(method, "loss")
        searcher, needed, spent = calls_needed(task, rows, OURS, BLACK_BOX)
        total["few calls"] += task.headline and needed is not None and FEW * needed <= spent
        inside, observations = coverage(ours)
        total["inside"] += inside
        total["observations"] += observations
        times = seconds_ratio(ours, others["unguided"])
        table.append(
            [
                name + " *" * task.headline,
                *shown,
                f"{inside / observations:.1%}" if observations else "",
                "" if times is None else f"{times:.1f}",
                searcher and f"{RIVALS[searcher].title}: {'not in' if needed is None else f'{needed} of'} {spent}",
            ]
        )
    headers = [
        "task",
        "harmed, against loss only",
        "against the same without guidance",
        "negated guide: harmed, against loss only",
        "against the same without guidance",
        "in 90 % intervals",
        "time / without guidance",
        "calls to the end of the best black-box searcher",
    ]
    yield tabulate(table, headers, tablefmt="github", disable_numparse=True)

    def harms(method: str, against: str, which: str = "worse") -> str:
        count, runs = total[method, against, which], total[method, against, "runs"]
        return f"{count} of {runs} ({count / max(runs, 1):.1%})"

    def harms_against(method: str) -> str:
        return (
            f"{harms(method, 'one setting')} against loss only, {harms(method, 'loss')} against the best of loss only "
            f"in each task, {harms(method, 'unguided')} against the same without guidance"
        )

    alone = ", ".join(f"{RIVALS[method].title} {harms(method, 'loss')}" for method in LOSS_ONLY)
    yield (
        "Harmed: the run ends below the other by more than two standard errors of the paired difference (over items). "
        f"In all: {harms_against(OURS)}; with the guide's predictions and directions negated: "
        f"{harms_against(NEGATED)}; in twice the steps (as many by the loss alone as that has itself): "
        f"{harms_against(TWICE)}. Harmed against the best of loss only and yet preferred to it by the selection split: "
        f"{harms(OURS, 'loss', 'unseen')}. What the loss alone, at one setting for all tasks, harms by the same count, "
        f"against its best in each: {alone}. "
        f"{total['inside'] / max(total['observations'], 1):.1%} of the new observations lay in the 90 % interval that "
        "the value function gave before it was told. Time: of a run, all of the "
        "guidance's calls in it, with the same cached evaluation, beside other processes. The searcher is the one that "
        "ends best on the selection split; MetricOpt reaches that score, also on the selection split, with at most "
        f"1/{FEW} of its calls on {total['few calls']} headline pairs."
    )


def tally(all_compared: dict[str, dict], known: dict[str, Task], key: tuple[str, str]) -> str:
    by_verdict: dict[str, list[str]] = {verdict: [] for verdict in (WIN, ABOVE, TIE, BELOW, LOSS)}
    for name, compared in all_compared.items():
        if key in compared and compared[key].verdict:
            star = " *" if known[name].headline else ""
            by_verdict[compared[key].verdict].append(f"{name}{star}")
    return "; ".join(
        f"{verdict} {len(names)}" + (f" ({', '.join(names)})" if names else "") for verdict, names in by_verdict.items()
    )


def against_one_setting(all_rows: dict[str, dict], known: dict[str, Task], variant: str) -> str:
    """Tasks above and below loss only at the setting that was chosen for it over all tasks, by the interval alone."""
    above, below = [], []
    for name, rows in all_rows.items():
        ours, theirs = rows.get((OURS, variant)), rows.get((LOSS_ONLY[0], variant))
        difference = ours.minus(theirs, known[name].sign) if ours and theirs else None
        if difference is not None:
            above += [f"{name} {interval(difference)}"] * (difference.low > 0)
            below += [f"{name} {interval(difference)}"] * (difference.high < 0)
    return f"above {len(above)} ({'; '.join(above)}); below {len(below)} ({'; '.join(below)})".replace(" ()", "")


def did_not_win(all_rows: dict[str, dict], known: dict[str, Task]) -> Iterator[str]:
    """Where a rival is better than ours, each with what it may see."""
    lines = []
    for name, rows in all_rows.items():
        for row in rows.values():
            ours = rows.get((OURS, POST_HOC)) if row.reads_labels else None
            ours = ours or rows.get((OURS, PLAIN))
            if ours is None or row.method == OURS:
                continue
            difference = row.minus(ours, known[name].sign)
            if difference is not None and difference.low > 0:
                lines.append(f"- `{name}`: {row.title} is better than {ours.title} by {interval(difference)}")
    yield "\n".join(lines) or "Nowhere is a rival's interval above MetricOpt's."


def render(records: list[dict], fixed: protocol.Protocol, plot: Callable[[Task, dict], str]) -> str:
    """The text of BENCHMARKS.md.

    Args:
        plot: draws a task's curves, and says where they lie, relative to the text.
    """
    known = tasks()
    all_rows = {name: rows_of([r for r in records if r["task"] == name]) for name in known}
    all_rows = {name: rows for name, rows in all_rows.items() if (LOSS_ONLY[0], PLAIN) in rows}
    all_compared = {name: compare(known[name], rows) for name, rows in all_rows.items()}
    parts = [
        "# Benchmarks",
        "Written by `make bench-report` from `benchmarks/results/`; do not edit above the log. Headline pairs are "
        "marked *.",
        "## Where MetricOpt wins, ties and loses",
        f"Of {len(all_rows)} tasks, {sum(known[name].headline for name in all_rows)} of them headline pairs. Win and "
        "loss: corrected for all comparisons of a task's table (Holm); above and below: the 95 % interval alone "
        "excludes zero.",
        f"Against loss only: {tally(all_compared, known, (OURS, PLAIN))}.",
        f"Both with post-hoc tuning: {tally(all_compared, known, (OURS, POST_HOC))}.",
        "Above, loss only is taken at its best of three in each task (see Tasks). Against it at the one setting that "
        f"was chosen for it over all tasks, by the interval alone: {against_one_setting(all_rows, known, PLAIN)}. Both "
        f"with post-hoc tuning: {against_one_setting(all_rows, known, POST_HOC)}.",
        *overview(all_rows, all_compared, known),
        "### Harm, calibration, time and calls",
        *conduct(all_rows, known),
        "### What did better",
        "By an interval that is not corrected for looking at all of them:",
        *did_not_win(all_rows, known),
        "## Protocol",
        protocol_text(fixed, records),
        "## Tasks",
        "† reads the labels of the observation split, not only the metric: its reference is loss only + post-hoc, "
        "where there is one; of all others it is loss only. Loss only is taken at its best: at the setting chosen for "
        'it over all tasks, in small steps, or in one after the other ("MetricOpt without guidance"), in each task '
        "what is better on the selection split. ‡ knows the metric's formula. Differences are paired "
        "by seed, positive where the method is better, with 95 % intervals (bootstrap over seeds and items, "
        f"Student's t); p is Holm-corrected over the table: win and loss mean p < {SIGNIFICANT}, above and below "
        "that the interval alone excludes zero. ± is the standard error over seeds. Calls: to observe / select / "
        "tune post hoc; seconds: of the run, on one thread of a machine that did other things too.",
    ]
    for name, rows in all_rows.items():
        parts += task_section(known[name], rows, all_compared[name], plot(known[name], rows))
    parts += ["## Published figures of other protocols", PUBLISHED.rstrip(), "## Made by", made_by(records)]
    return "\n\n".join(parts) + "\n"


def main(argv: list[str] | None = None) -> int:
    (arguments,) = HfArgumentParser(ReportArguments).parse_args_into_dataclasses(argv)
    output = Path(arguments.output)
    records = read(Path(arguments.results))
    if not records:
        print(f"There are no records in {arguments.results}: run `make bench` first.")
        return 2

    def plot(task: Task, rows: dict) -> str:
        folder = output.parent / "benchmarks" / "curves"
        folder.mkdir(parents=True, exist_ok=True)
        plot_curves(folder / f"{task.name}.svg", task, rows)
        return f"benchmarks/curves/{task.name}.svg"

    log = output.read_text(encoding="utf-8").partition(LOG) if output.exists() else ("", "", "")
    output.write_text(render(records, protocol.load(), plot) + (f"\n{LOG}{log[2]}" if log[1] else ""), encoding="utf-8")
    print(f"written: {output.name}")
    return 0


LOG = "## Log\n"  # what is written by hand below this line stays

if __name__ == "__main__":
    sys.exit(main())
