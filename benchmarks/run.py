"""Runs the benchmark: tasks x methods x seeds, one JSON line per run; what is there already is not run again.

    python -m benchmarks.run            (make bench ARGS=run)
    python -m benchmarks.run --tasks bank_f1 --methods loss_only metricopt --seeds 0 1
    python -m benchmarks.run --smoke            (make bench ARGS="run --smoke")

The settings are those of `protocol.json`. A run killed in the middle is taken up by starting it again.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import sys
import tempfile
import threading
from collections import defaultdict
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
from tqdm.auto import tqdm
from transformers import HfArgumentParser

from metricopt_hf import ConfigurationError

from . import protocol
from .measure import run_one
from .methods import FIRST, OURS, RIVALS
from .problem import no_data
from .records import RESULTS, Key, context, key_of, read, write
from .tasks import tasks


@dataclass
class BenchArguments:
    """What to run. The default is the whole table."""

    tasks: list[str] = field(default_factory=list, metadata={"help": "Default: all, headline tasks first."})
    methods: list[str] = field(default_factory=list, metadata={"help": "Default: all."})
    seeds: list[int] | None = field(
        default=None, metadata={"help": "Default: 0 to 9 for ours, loss only and controls, 0 to 4 for the others."}
    )
    jobs: int = field(default=1, metadata={"help": "Processes, of one thread each."})
    results: str = field(default=str(RESULTS), metadata={"help": "Folder of the lines, a file per task."})
    smoke: bool = field(
        default=False, metadata={"help": "Every task once and every method once, with a few examples; nothing is kept."}
    )


def plan(arguments: BenchArguments) -> list[list[Key]]:
    """Units of runs that share a problem, in the order in which they are wanted."""
    all_tasks = tasks()
    names, methods = arguments.tasks or list(all_tasks), arguments.methods or list(RIVALS)
    for kind, given, known in (("tasks", names, all_tasks), ("methods", methods, RIVALS)):
        if unknown := set(given) - set(known):
            raise ConfigurationError(f"--{kind} {sorted(unknown)[0]}: there are {', '.join(known)}.")
    units = []
    for task in names:
        able = [method for method in methods if RIVALS[method].applies(all_tasks[task])]
        for group in ([m for m in able if m in FIRST], [m for m in able if m not in FIRST]):
            seeds = arguments.seeds or range(max((RIVALS[m].seeds for m in group), default=0))
            units += [[(task, method, seed) for method in group] for seed in seeds]
    return [unit for unit in units if unit]


def smoke_plan() -> list[list[Key]]:
    """Every task and every method, once where that is possible; those that few tasks suit choose first."""
    known = tasks()
    suited = {method: [name for name, task in known.items() if RIVALS[method].applies(task)] for method in RIVALS}
    left, units = list(known), []
    for method in sorted(RIVALS, key=lambda method: len(suited[method])):
        task = next((name for name in suited[method] if name in left), suited[method][0])
        left = [name for name in left if name != task]
        units.append([(task, method, 0)])
    return units + [[(task, OURS, 0)] for task in left]


def quiet() -> None:
    """In every process: one thread, and no word but warnings of our own."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    logging.getLogger("metricopt_hf").setLevel(logging.ERROR)


def start_worker() -> None:
    """`quiet`, and not to outlive the process that gives out the work, whatever ended it."""
    quiet()

    def follow() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def run_unit(
    unit: Iterable[Key], fixed: protocol.Protocol, folder: str, known: dict[str, Any], smoke: bool = False
) -> list[Key]:
    for task, method, seed in unit:
        record = run_one(tasks(smoke)[task], method, seed, fixed.config(method), fixed.budget, known)
        write(record, Path(folder))
    return list(unit)


def minutes(pending: list[Key], done: list[dict[str, Any]], jobs: int) -> float | None:
    """How long `pending` may take, by the runs that are done: of the same task and method, else of the method."""
    measured = defaultdict(list)
    for record in done:
        for name in ((record["task"], record["method"]), record["method"]):
            measured[name].append(record["seconds"]["whole"])
    if not measured:
        return None
    overall = median(x for values in measured.values() for x in values)
    each = (median(measured.get((task, m)) or measured.get(m) or [overall]) for task, m, _ in pending)
    return sum(each) / 60 / jobs


def check(done: Iterable[dict[str, Any]], fixed: protocol.Protocol) -> None:
    """Refuse to go on in results of other settings."""
    for record in done:
        if record["config"] != fixed.config(record["method"]):
            raise ConfigurationError(
                f"{key_of(record)} was run with {record['config']}, the protocol says "
                f"{fixed.config(record['method'])}: results of two protocols do not make one table. Move them away."
            )


def main(argv: list[str] | None = None) -> int:
    (arguments,) = HfArgumentParser(BenchArguments).parse_args_into_dataclasses(argv)
    if no_data():
        return 2
    if arguments.smoke:
        with tempfile.TemporaryDirectory() as folder:
            return execute(smoke_plan(), protocol.first_of_grids(), Path(folder), arguments)
    return execute(plan(arguments), protocol.load(), Path(arguments.results), arguments)


def execute(units: list[list[Key]], fixed: protocol.Protocol, folder: Path, arguments: BenchArguments) -> int:
    done = read(folder)
    check(done, fixed)
    there = {key_of(record) for record in done}
    units = [left for unit in units if (left := [key for key in unit if key not in there])]
    pending = [key for unit in units for key in unit]
    expected = minutes(pending, done, arguments.jobs)
    about = "no earlier run to estimate from" if expected is None else f"about {expected:.0f} minutes"
    print(f"{len(pending)} runs to do, {len(there)} done already; {about}.", flush=True)
    known, failed = context(), []
    with (
        tqdm(total=len(pending), desc="runs") as bar,
        ProcessPoolExecutor(arguments.jobs, multiprocessing.get_context("spawn"), start_worker) as pool,
    ):
        futures = {pool.submit(run_unit, unit, fixed, str(folder), known, arguments.smoke): unit for unit in units}
        for future in as_completed(futures):
            bar.update(len(futures[future]))
            if (error := future.exception()) is not None:
                failed.append(futures[future])
                tqdm.write(f"{futures[future]} failed: {type(error).__name__}: {error}")
            elif expected is None:
                left = [key for other, unit in futures.items() if not other.done() for key in unit]
                expected = minutes(left, read(folder), arguments.jobs)
                tqdm.write(f"By the first runs: about {expected:.0f} minutes.")
    for unit in failed:
        print(f"not finished: {unit}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
