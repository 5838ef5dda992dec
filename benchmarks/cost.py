"""What MetricOpt costs on each task: a linearisation, its metric calls, and a run against 200 steps by the loss alone.

    python -m benchmarks.cost            (make bench ARGS=cost), some minutes; writes docs/results/cost.md
    python -m benchmarks.cost --tasks bank_f1 dominoes
    python -m benchmarks.cost --smoke

Seconds are processor time in one thread.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from time import process_time

from tqdm.auto import tqdm
from transformers import HfArgumentParser

from metricopt_hf import ConfigurationError, Ledger

from . import protocol
from .bench_report import ROOT
from .looks import evaluator, frozen_phi
from .methods import OURS, RIVALS
from .pages import page
from .problem import Problem, Task, no_data
from .run import quiet
from .searchers import linearizer
from .tables import markdown
from .tasks import tasks

PAGE = ROOT / "docs" / "results" / "cost.md"
LOSS_ONLY = "loss_only"
SMOKE_TASKS = 2
HEADERS = ["task", "rows", "phi", "linearisation, s", "passes", "calls", "run, s", "by the loss, s", "ratio"]


@dataclass
class CostArguments:
    """What to measure."""

    tasks: list[str] = field(default_factory=list, metadata={"help": "Default: all."})
    seed: int = field(default=0, metadata={"help": "Of the splits, and of the runs."})
    page: str = field(default=str(PAGE), metadata={"help": "The page to write."})
    smoke: bool = field(
        default=False,
        metadata={"help": f"The first {SMOKE_TASKS} tasks with a few examples; the page is printed, nothing is kept."},
    )


def linearisation(task: Task, problem: Problem, seed: int) -> tuple[float, int, int]:
    """Seconds of one, behind the first, its passes (backward ones too), and the numbers of phi."""
    phi = frozen_phi(problem)
    observation = evaluator(task, problem, phi, problem.observation, Ledger())
    made = linearizer(observation, seed)
    space, prediction = made.coordinates(), observation.predictions()
    start = process_time()
    made.linearize(space.basis, prediction)
    return process_time() - start, 1 + made.passes(prediction), phi.dim


def row(task: Task, seed: int, fixed: protocol.Protocol) -> list[str]:
    """The table's row of a task."""
    problem = task.prepare(seed)
    seconds, passes, dim = linearisation(task, problem, seed)
    with tempfile.TemporaryDirectory() as folder:
        ours, by_loss = (
            RIVALS[method].run(task, problem, seed, fixed.budget, folder, fixed.config(method))
            for method in (OURS, LOSS_ONLY)
        )
    calls = sum(ours.ledger.calls.values())
    cells = [f"{seconds:.2f}", f"{passes}", f"{calls:,}", f"{ours.seconds:.1f}", f"{by_loss.seconds:.1f}"]
    return [task.name, f"{len(problem.observation):,}", f"{dim:,}", *cells, f"{ours.seconds / by_loss.seconds:.1f}"]


def text(rows: list[list[str]], fixed: protocol.Protocol) -> str:
    return page(
        "# Cost",
        "Written by `python -m benchmarks.cost`; do not edit.",
        f"Processor seconds in one thread, on a machine that does other things too. A linearisation of the observation "
        "split gives the derivatives of all outputs by phi; its passes are forward and backward ones over that split. "
        f"Calls are all metric calls of a run. A run of MetricOpt has {fixed.budget.metric_steps} metric steps, each "
        f"with one linearisation; beside it stand {fixed.budget.steps} steps by the loss alone, with "
        f"{fixed.budget.rounds + 1} looks at the selection split.",
        markdown(HEADERS, rows),
    )


def main(argv: list[str] | None = None) -> int:
    (args,) = HfArgumentParser(CostArguments).parse_args_into_dataclasses(argv)
    if no_data():
        return 2
    quiet()
    known, fixed = tasks(args.smoke), protocol.first_of_grids() if args.smoke else protocol.load()
    names = args.tasks or list(known)[: SMOKE_TASKS if args.smoke else None]
    if unknown := set(names) - set(known):
        raise ConfigurationError(f"--tasks {sorted(unknown)[0]}: there are {', '.join(known)}.")
    rows = []
    for name in tqdm(names, desc="tasks"):
        rows.append(row(known[name], args.seed, fixed))
        tqdm.write(" | ".join(rows[-1]))
    written = text(rows, fixed)
    if args.smoke:
        print(written)
    else:
        Path(args.page).write_text(written, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
