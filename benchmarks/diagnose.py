"""What `trainer.diagnose()` recommends before training, against what the committed runs then came to.

    python -m benchmarks.diagnose            (make bench ARGS=diagnose)
    python -m benchmarks.diagnose --tasks bank_f1 dominoes --seeds 0
    python -m benchmarks.diagnose --smoke

What is diagnosed already is not diagnosed again; the page is written from the records alone.
"""

from __future__ import annotations

import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

from tqdm.auto import tqdm
from transformers import HfArgumentParser

from metricopt_hf import ConfigurationError
from metricopt_hf.diagnosis import GUIDANCE, NOTHING, RECOMMENDATIONS, THRESHOLD, TOO_FEW

from .bench_report import ROOT
from .comparing import OURS, Result, Row, best, results_of
from .measure import PLAIN, POST_HOC
from .pages import page
from .problem import Task, no_data
from .records import RESULTS, context, key_of, read, rounded, write
from .run import quiet
from .tables import interval, markdown
from .tasks import tasks
from .training import Budget, make_trainer

OUTCOMES = (NOTHING, THRESHOLD, GUIDANCE)
DIAGNOSES, PAGE = RESULTS / "diagnoses", ROOT / "docs" / "results" / "diagnosis.md"
METHOD = "diagnosis"  # in place of a method's name in a record
SMOKE_TASKS = 2


@dataclass
class DiagnoseArguments:
    """What to diagnose, and with what to compare it."""

    tasks: list[str] = field(default_factory=list, metadata={"help": "Default: all."})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "Seeds."})
    results: str = field(default=str(RESULTS), metadata={"help": "Folder of the records of runs."})
    diagnoses: str = field(default=str(DIAGNOSES), metadata={"help": "Folder of the diagnoses, a file per task."})
    page: str = field(default=str(PAGE), metadata={"help": "The page to write."})
    smoke: bool = field(
        default=False,
        metadata={"help": f"The first {SMOKE_TASKS} tasks with a few examples; the page is printed, nothing is kept."},
    )


def diagnosed(task: Task, seed: int, known: Mapping[str, Any]) -> dict[str, Any]:
    """The record of a diagnosis.

    Args:
        known: what the caller knows: commit, versions.
    """
    problem = task.prepare(seed)
    with tempfile.TemporaryDirectory() as folder:
        found = make_trainer(task, problem, seed, Budget(), folder, {}).diagnose()
    return rounded(
        {
            "task": task.name,
            "method": METHOD,
            "seed": seed,
            **known,
            "recommendation": found.recommendation,
            "examples": found.examples,
            "examples_needed": found.examples_needed,
            "scores": dict(found.scores),
            "gains": {f"{of} - {over}": [gain.mean, gain.error] for (of, over), gain in found.gains.items()},
            "calls": sum(found.ledger.calls.values()),
            "passes": sum(found.ledger.passes.values()),
            "seconds": found.seconds,
        }
    )


def without_training(result: Result) -> Row | None:
    """The start, or the start with a bias tuned, whichever the selection split prefers."""
    return best(result.task, result.rows, (("start", variant) for variant in (PLAIN, POST_HOC)))


def outcome(result: Result) -> str | None:
    """What the runs of a task came to, in the words of the diagnosis; None where too few of them were run.

    Guidance paid if MetricOpt lies above what needs no training by its 95 % interval on the report split; else a
    threshold sufficed if a bias lies above the start; else there was nothing to gain.
    """
    ours, cheap, sign = result.rows.get((OURS, PLAIN)), without_training(result), result.task.sign
    difference = None if ours is None or cheap is None else ours.minus(cheap, sign)
    if difference is None:
        return None
    if difference.low > 0:
        return GUIDANCE
    start, tuned = (result.rows.get(("start", variant)) for variant in (PLAIN, POST_HOC))
    gained = None if start is None or tuned is None else tuned.minus(start, sign)
    return THRESHOLD if gained is not None and gained.low > 0 else NOTHING


def confusion(pairs: Iterable[tuple[str, str]]) -> str:
    """Counts of (recommendation, outcome)."""
    counts = Counter(pairs)
    table = [[said, *(counts[said, came] for came in OUTCOMES)] for said in RECOMMENDATIONS]
    return markdown(["recommended", *(f"then: {came}" for came in OUTCOMES)], table)


def share_right(pairs: Sequence[tuple[str, str]]) -> str:
    """How many recommendations came true, as a sentence."""
    said = [(recommended, came) for recommended, came in pairs if recommended != TOO_FEW]
    right = sum(recommended == came for recommended, came in said)
    if not said:
        return f"Of {len(pairs)} diagnoses none says what to do."
    return (
        f"Of {len(pairs)} diagnoses, {len(said)} say what to do, and {right} of these are right "
        f"({right / len(said):.0%}); the others say that there are too few examples to tell."
    )


def diagnosis_page(diagnoses: Sequence[dict[str, Any]], results: Sequence[Result]) -> str:
    by_task: dict[str, list[dict]] = {}
    for record in sorted(diagnoses, key=lambda record: record["seed"]):
        by_task.setdefault(record["task"], []).append(record)
    found = {result.task.name: result for result in results}
    pairs, table = [], []
    for name, task in tasks().items():
        if name not in by_task:
            continue
        records, result = by_task[name], found.get(name)
        came = None if result is None else outcome(result)
        said = Counter(record["recommendation"] for record in records)
        pairs += [(record["recommendation"], came) for record in records if came is not None]
        cells = ["not run", "", ""]
        if came is not None:
            ours, others = result.rows[OURS, PLAIN], (without_training(result), result.rival)
            cells = [came, *(interval(ours.minus(other, task.sign)) for other in others)]
        gain = mean(r["gains"]["phi - bias" if "phi - bias" in r["gains"] else "phi - start"][0] for r in records)
        said = "; ".join(f"{recommendation} ({count})" for recommendation, count in said.most_common())
        table.append([f"`{name}`", task.kind, said, f"{gain:+.4f}", *cells])
    seconds, passes = (mean(record[key] for record in diagnoses) for key in ("seconds", "passes"))
    headers = ["task", "kind", "recommended (seeds)", "phi beyond a bias", "came to", "MetricOpt - no training"]
    return page(
        "# Diagnosis before training",
        f"`trainer.diagnose()` on all tasks, against what the runs came to. {share_right(pairs)}",
        confusion(pairs),
        markdown([*headers, "MetricOpt - rival"], table),
        'Recommended: on observation and selection, before any training. "phi beyond a bias": what phi reaches in its '
        "linear surroundings more than a bias per logit (than the start, where a bias has no place), mean over the "
        "seeds. Came to: guidance paid if MetricOpt lies above what needs no training (the start, or a bias tuned on "
        "it, by the selection split) with its 95 % interval on the report split; else a threshold sufficed if a bias "
        "lies above the start; else there was nothing to gain. The last column is not what the diagnosis speaks of: "
        "the loss alone may reach as much as guidance does.",
        f"A diagnosis takes {passes:.0f} forward passes and {seconds:.0f} s on average, on one thread. Written by "
        "`python -m benchmarks.diagnose` from the records in `benchmarks/results/`; do not edit.",
    )


def run(arguments: DiagnoseArguments, folder: Path) -> None:
    """Diagnose what is not in the folder yet."""
    known_tasks = tasks(arguments.smoke)
    names = arguments.tasks or list(known_tasks)[: SMOKE_TASKS if arguments.smoke else None]
    if unknown := set(names) - set(known_tasks):
        raise ConfigurationError(f"--tasks {sorted(unknown)[0]}: there are {', '.join(known_tasks)}.")
    done = {key_of(record) for record in read(folder)}
    left = [(name, seed) for name in names for seed in arguments.seeds if (name, METHOD, seed) not in done]
    known = context()
    for name, seed in tqdm(left, desc="diagnoses"):
        write(diagnosed(known_tasks[name], seed, known), folder)


def main(argv: list[str] | None = None) -> int:
    (arguments,) = HfArgumentParser(DiagnoseArguments).parse_args_into_dataclasses(argv)
    if no_data():
        return 2
    quiet()
    if arguments.smoke:
        with tempfile.TemporaryDirectory() as folder:
            run(arguments, Path(folder))
            print(diagnosis_page(read(Path(folder)), []))  # runs of whole tasks are no match for parts of them
        return 0
    results = results_of(read(Path(arguments.results)))
    run(arguments, Path(arguments.diagnoses))
    Path(arguments.page).write_text(diagnosis_page(read(Path(arguments.diagnoses)), results), encoding="utf-8")
    print(f"written: {arguments.page}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
