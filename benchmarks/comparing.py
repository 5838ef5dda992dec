"""A task's records compared: each method, paired by seed, with the best of what is cheap."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product
from statistics import mean

import numpy as np

from .measure import PLAIN, POST_HOC
from .methods import OURS, RIVALS
from .problem import KINDS, Task
from .statistics import Paired, holm, paired
from .tasks import tasks

CONTROLS = ("shuffled", "random", "negated")
WAYS = ("pairs", "rows")  # of MetricOpt's, each alone
CHEAP = ("loss_only", "loss_small", "start")  # at the setting chosen for it, in small steps, and no step at all
LOSS_ONLY = CHEAP[0]
BLACK_BOX = ("cma", "cma_virtual", "cma_flat", "spsa")
EQUAL_CALLS = BLACK_BOX[1]  # with MetricOpt's linearisations, calls and candidates
SIGNIFICANT = 0.05
WIN, ABOVE, TIE, BELOW, LOSS = "win", "above", "tie", "below", "loss"
Key = tuple[str, str]  # method, variant


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
        seen = {"†": rival.reads_labels, "§": rival.reads_groups, "¶": rival.needs_group, "‡": rival.knows_formula}
        marks = "".join(mark for mark, given in seen.items() if given)
        return rival.title + ("" if self.variant == PLAIN else f" + {self.variant}") + (f" {marks}" if marks else "")

    def of(self, seed: int) -> dict:
        return self.runs[seed]["variants"][self.variant]

    def scores(self, split: str = "report") -> list[float]:
        return [self.of(seed)["scores"][split] for seed in sorted(self.runs)]

    @property
    def passes(self) -> float:
        """Forward passes of a run to observe and to select, mean over the seeds; one a call where none were counted."""
        spent = (run.get("passes", run["calls"]) for run in self.runs.values())
        return mean(passes.get("observe", 0) + passes.get("select", 0) for passes in spent)

    def calls(self, purpose: str) -> float:
        """Metric calls of a run, mean over the seeds."""
        return mean(run["calls"].get(purpose, 0) + self.of(s)["calls"].get(purpose, 0) for s, run in self.runs.items())

    @property
    def seconds(self) -> float:
        """Of a run, mean over the seeds."""
        return mean(run["seconds"]["run"] for run in self.runs.values())

    def minus(self, other: Row, sign: int) -> Paired | None:
        """On the report split, over the seeds that both have; None: they share fewer than two."""
        seeds = common_seeds(self, other)
        if len(seeds) < 2:
            return None
        pairs = [(self.of(s), other.of(s)) for s in seeds]
        scores = [a["scores"]["report"] - b["scores"]["report"] for a, b in pairs]
        return paired(scores, np.array([np.subtract(a["items"], b["items"]) for a, b in pairs]), sign)


def common_seeds(ours: Row | None, other: Row | None) -> list[int]:
    return [] if ours is None or other is None else sorted(set(ours.runs) & set(other.runs))


def rows_of(records: Iterable[dict]) -> dict[Key, Row]:
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
    """A row and its difference to the rival.

    Attributes:
        difference: None: the row is the rival itself, or the start.
        corrected: its p-value, Holm-corrected over the task's rows.
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


def best(task: Task, rows: dict[Key, Row], keys: Iterable[Key]) -> Row | None:
    """Of the rows that there are, the one that is best on the selection split."""
    found = [rows[key] for key in keys if key in rows]
    return max(found, key=lambda row: task.sign * mean(row.scores("selection")), default=None)


def rival(task: Task, rows: dict[Key, Row]) -> Row | None:
    """The best of what is cheap: loss only, or no training, each with and without a bias tuned afterwards."""
    return best(task, rows, product(CHEAP, (PLAIN, POST_HOC)))


def compare(task: Task, rows: dict[Key, Row]) -> dict[Key, Compared]:
    cheapest = rival(task, rows)
    differences = {}
    for key, row in rows.items():
        if row is not cheapest and row.method != "start":
            differences[key] = row.minus(cheapest, task.sign)
    tested = [key for key, difference in differences.items() if difference is not None]
    corrected = dict(zip(tested, holm([differences[key].p for key in tested]), strict=True))
    return {k: Compared(row, differences.get(k), corrected.get(k, float("nan"))) for k, row in rows.items()}


@dataclass(frozen=True)
class Result:
    """What the records of a task say.

    Attributes:
        rows: all methods and variants that were run; loss only is among them.
        compared: the same, with the differences.
    """

    task: Task
    rows: dict[Key, Row]
    compared: dict[Key, Compared]

    @property
    def name(self) -> str:
        return self.task.name + " *" * self.task.headline

    def difference(self, ours: Key, theirs: Key) -> Paired | None:
        """Between any two rows; None where one was not run."""
        if ours not in self.rows or theirs not in self.rows:
            return None
        return self.rows[ours].minus(self.rows[theirs], self.task.sign)

    @property
    def rival(self) -> Row:
        """What MetricOpt is compared with."""
        return rival(self.task, self.rows)

    @property
    def ours(self) -> Compared | None:
        """MetricOpt, as it comes out of a run."""
        return self.compared.get((OURS, PLAIN))

    @property
    def searched(self) -> Paired | None:
        """MetricOpt minus CMA-ES on the same linearisation, at as many calls."""
        return self.difference((OURS, PLAIN), (EQUAL_CALLS, PLAIN))

    @property
    def best_with_labels(self) -> Compared | None:
        """Of the methods that train on observation labels, the one that the selection split prefers."""
        row = best(self.task, self.rows, ((method, PLAIN) for method, known in RIVALS.items() if known.reads_labels))
        return row and self.compared[row.method, row.variant]

    def shown(self) -> list[Compared]:
        """The rows that a reader wants first, or those of them that were run."""
        searcher = best(self.task, self.rows, ((method, PLAIN) for method in BLACK_BOX))
        with_labels = self.best_with_labels
        wanted = [
            ("start", PLAIN),
            ("start", POST_HOC),
            (LOSS_ONLY, PLAIN),
            (LOSS_ONLY, POST_HOC),
            (self.rival.method, self.rival.variant),
            (OURS, PLAIN),
            *((control, PLAIN) for control in CONTROLS),
            searcher and (searcher.method, searcher.variant),
            with_labels and (with_labels.row.method, with_labels.row.variant),
        ]
        return [self.compared[key] for key in dict.fromkeys(wanted) if key in self.compared]


def results_of(records: Iterable[dict]) -> list[Result]:
    """Of the tasks for which loss only was run, in the order of `tasks()`."""
    by_task: dict[str, list[dict]] = {}
    for record in records:
        by_task.setdefault(record["task"], []).append(record)
    results = []
    for task in tasks().values():
        rows = rows_of(by_task.get(task.name, []))
        if (LOSS_ONLY, PLAIN) in rows:
            results.append(Result(task, rows, compare(task, rows)))
    return results


def groups(results: Iterable[Result]) -> dict[str, list[Result]]:
    """Kind of task -> its results, in the order of `KINDS`."""
    grouped: dict[str, list[Result]] = {kind: [] for kind in KINDS}
    for result in results:
        grouped.setdefault(result.task.kind, []).append(result)
    return {kind: members for kind, members in grouped.items() if members}
