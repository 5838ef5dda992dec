"""What `trainer.diagnose()` says before training, against what bias and phi then came to.

    python -m benchmarks.diagnose            (make bench ARGS=diagnose)
    python -m benchmarks.diagnose --tasks bank_f1 dominoes --seeds 0
    python -m benchmarks.diagnose --smoke

A diagnosis gives two verdicts: does a bias pay, and does phi pay beyond it? The model that it speaks of is the
pretrained one, so what came is measured from there too: the bias, and ten metric steps, on the report split. What is
recorded already is not run again; the page is written from the records alone.
"""

from __future__ import annotations

import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

from tqdm.auto import tqdm
from transformers import HfArgumentParser

from metricopt_hf import ConfigurationError
from metricopt_hf.diagnosis import BIAS, NO, OPEN, PHI, YES, Gain

from .bench_report import ROOT
from .comparing import OURS, best, rows_of
from .measure import PLAIN, POST_HOC, variants
from .methods import RIVALS
from .pages import page
from .problem import Task, no_data
from .records import RESULTS, context, key_of, read, rounded, write
from .run import quiet
from .statistics import Paired
from .tables import interval, markdown
from .tasks import tasks
from .training import Budget, make_trainer, train

DIAGNOSES, PAGE = RESULTS / "diagnoses", ROOT / "docs" / "results" / "diagnosis.md"
METHOD, START = "diagnosis", "start"  # in place of a method's name in a record
ASKED = {BIAS: "a bias", PHI: "phi beyond both"}
SMOKE_TASKS = 2


@dataclass
class DiagnoseArguments:
    """What to diagnose, and with what to compare it."""

    tasks: list[str] = field(default_factory=list, metadata={"help": "Default: all."})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "Seeds of diagnoses."})
    diagnoses: str = field(default=str(DIAGNOSES), metadata={"help": "Folder of the records, a file per task."})
    page: str = field(default=str(PAGE), metadata={"help": "The page to write."})
    smoke: bool = field(
        default=False,
        metadata={"help": f"The first {SMOKE_TASKS} tasks with a few examples; the page is printed, nothing is kept."},
    )


class Judged(NamedTuple):
    """A verdict, and what came.

    Attributes:
        asked: of `ASKED`.
        said: YES, NO or OPEN.
        came: the gain on the report split.
        worthwhile, error: of the diagnosis, in the metric's unit.
    """

    asked: str
    said: str
    came: Paired
    worthwhile: float
    error: float

    @property
    def paid(self) -> bool:
        """Whether the gain's 95 % interval lies above zero."""
        return self.came.low > 0

    @property
    def right(self) -> bool:
        """YES: it paid. NO: not by twice what is worthwhile, which NO rules out. OPEN: by two errors at most."""
        if self.said == YES:
            return self.paid
        if self.said == NO:
            return not self.paid or self.came.mean < 2 * self.worthwhile
        return abs(self.came.mean) <= 2 * self.error


def made(task: Task, seed: int, method: str, known: Mapping[str, Any]) -> dict[str, Any]:
    """The record of a diagnosis, or of what came.

    Args:
        known: what the caller knows: commit, versions.
    """
    problem = task.prepare(seed)
    record = {"task": task.name, "method": method, "seed": seed, **known}
    with tempfile.TemporaryDirectory() as folder:
        if method == OURS:
            outcome = train(task, problem, seed, Budget(), folder, {})
        elif method == START:
            outcome = RIVALS[START].run(task, problem, seed, Budget(), folder, {})
        else:
            found = make_trainer(task, problem, seed, Budget(), folder, {}).diagnose()
            return rounded(
                {
                    **record,
                    "recommendation": found.recommendation,
                    "worthwhile": found.worthwhile,
                    "examples": found.examples,
                    "examples_needed": found.examples_needed,
                    "scores": dict(found.scores),
                    "gains": {f"{of} - {over}": [gain.mean, gain.error] for (of, over), gain in found.gains.items()},
                    "calls": sum(found.ledger.calls.values()),
                    "passes": sum(found.ledger.passes.values()),
                    "seconds": found.seconds,
                }
            )
    found = variants(task, problem, method, outcome)
    return rounded({**record, "variants": {name: found[name] for name in (PLAIN, POST_HOC) if name in found}})


def came_to(task: Task, records: Iterable[Mapping[str, Any]]) -> dict[str, Paired]:
    """What a bias gave against the start, and phi against the better of both (by the selection split)."""
    rows = rows_of(record for record in records if record["method"] != METHOD)
    start, tuned, ours = (rows.get(key) for key in ((START, PLAIN), (START, POST_HOC), (OURS, PLAIN)))
    cheap = best(task, rows, ((START, PLAIN), (START, POST_HOC)))
    found = {
        BIAS: None if start is None or tuned is None else tuned.minus(start, task.sign),
        PHI: None if ours is None or cheap is None else ours.minus(cheap, task.sign),
    }
    return {asked: difference for asked, difference in found.items() if difference is not None}


def gains_of(record: Mapping[str, Any]) -> dict[str, Gain]:
    """By what is `ASKED`; a record has no number for an error that is not known."""
    gains = record["gains"]
    beyond = min((gains[name] for name in ("phi - bias", "phi - start") if name in gains), key=lambda gain: gain[0])
    found = {BIAS: gains.get("bias - start"), PHI: beyond}
    return {asked: Gain(g[0], float("inf") if g[1] is None else g[1]) for asked, g in found.items() if g is not None}


def judged(task: Task, records: Sequence[Mapping[str, Any]]) -> list[Judged]:
    """All verdicts on a task, where it is known what came."""
    came, found = came_to(task, records), []
    for record in records:
        if record["method"] == METHOD:
            found += [
                Judged(asked, gain.verdict(record["worthwhile"]), came[asked], record["worthwhile"], gain.error)
                for asked, gain in gains_of(record).items()
                if asked in came
            ]
    return found


def confusion(verdicts: Iterable[Judged]) -> str:
    """Counts of what was said and what came."""
    counts = Counter((v.said, v.paid, v.right) for v in verdicts)
    table = []
    for said in (YES, NO, OPEN):
        cells = (sum(n for (s, paid, _), n in counts.items() if s == said and paid == came) for came in (True, False))
        right = sum(n for (s, _, right), n in counts.items() if s == said and right)
        table.append([said, *cells, right])
    return markdown(["said: pays?", "came: pays", "came: does not", "right"], table)


def share_right(verdicts: Sequence[Judged]) -> str:
    """How many verdicts came true, as a sentence."""
    said, left = ([v for v in verdicts if (v.said == OPEN) == is_open] for is_open in (False, True))
    if not said:
        return f"Of {len(verdicts)} verdicts none says yes or no."
    right = sum(v.right for v in said)
    return (
        f"Of {len(verdicts)} verdicts, {len(said)} say yes or no, and {right} of these are right "
        f"({right / len(said):.0%}); {len(left)} say that it cannot be told, and of {sum(v.right for v in left)} of "
        "these that is so."
    )


def diagnosis_page(records: Sequence[dict[str, Any]]) -> str:
    by_task: dict[str, list[dict]] = {}
    for record in sorted(records, key=lambda record: record["seed"]):
        by_task.setdefault(record["task"], []).append(record)
    verdicts, table = [], []
    for name, task in tasks().items():
        diagnoses = [record for record in by_task.get(name, ()) if record["method"] == METHOD]
        if not diagnoses:
            continue
        found, came = judged(task, by_task[name]), came_to(task, by_task[name])
        verdicts += found
        for asked, title in ASKED.items():
            mine = [v for v in found if v.asked == asked]
            told = ", ".join(f"{said} {count}" for said, count in Counter(v.said for v in mine).most_common())
            if mine:
                right = f"{sum(v.right for v in mine)} of {len(mine)}"
                table.append([f"`{name}`", title, told, interval(came[asked]), right])
    diagnoses = [record for record in records if record["method"] == METHOD]
    seconds, passes = (mean(record[key] for record in diagnoses) for key in ("seconds", "passes"))
    return page(
        "# Diagnosis before training",
        f"`trainer.diagnose()` on {len({record['task'] for record in diagnoses})} of the benchmark's {len(tasks())} "
        f"tasks, against what came. {share_right(verdicts)}",
        confusion(verdicts),
        markdown(["task", "pays?", "said (seeds)", "came, on the report split", "right"], table),
        "Said: on observation and selection, before any training. Came: what a bias per logit that was tuned on "
        "observation gave against the pretrained model, and what ten metric steps from that model gave against the "
        "better of these two (by the selection split); 95 % intervals over seeds and examples. "
        'A "yes" is right if the interval lies above zero. A "no" says that there is less to have than twice what is '
        'worthwhile, the metric\'s own standard error, and is right if that is so. "Cannot tell" is right if what came '
        "is within two standard errors of the diagnosis. The loss alone may reach as much as phi does: the diagnosis "
        "does not speak of it. Two rules are younger than the first of these diagnoses: a gain beyond one standard "
        'error is not called "no" unless all that is worthwhile is ruled out; and a gain that is surely there, but '
        'surely below what is worthwhile, is a "no".',
        f"A diagnosis takes {passes:.0f} forward passes and {seconds:.0f} s on average, on one thread beside other "
        "work. Written by `python -m benchmarks.diagnose` from the records in `benchmarks/results/`; do not edit.",
    )


def run(arguments: DiagnoseArguments, folder: Path) -> None:
    """Make what is not in the folder yet."""
    known_tasks = tasks(arguments.smoke)
    names = arguments.tasks or list(known_tasks)[: SMOKE_TASKS if arguments.smoke else None]
    if unknown := set(names) - set(known_tasks):
        raise ConfigurationError(f"--tasks {sorted(unknown)[0]}: there are {', '.join(known_tasks)}.")
    done = {key_of(record) for record in read(folder)}
    left = [(name, method, seed) for seed in arguments.seeds for name in names for method in (METHOD, START, OURS)]
    left = [key for key in left if key not in done]
    known = context()
    for name, method, seed in tqdm(left, desc="runs"):
        write(made(known_tasks[name], seed, method, known), folder)


def main(argv: list[str] | None = None) -> int:
    (arguments,) = HfArgumentParser(DiagnoseArguments).parse_args_into_dataclasses(argv)
    if no_data():
        return 2
    quiet()
    if arguments.smoke:
        with tempfile.TemporaryDirectory() as folder:
            run(arguments, Path(folder))
            print(diagnosis_page(read(Path(folder))))
        return 0
    run(arguments, Path(arguments.diagnoses))
    Path(arguments.page).write_text(diagnosis_page(read(Path(arguments.diagnoses))), encoding="utf-8")
    print(f"written: {arguments.page}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
