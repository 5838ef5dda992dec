"""What MetricOpt costs: a linearisation of large models, and on each task a run against 200 steps by the loss alone.

    python -m benchmarks.cost            (make bench ARGS=cost), writes docs/performance.md and docs/results/cost.md
    python -m benchmarks.cost --what models          (the first of them alone: half an hour on a CPU)
    python -m benchmarks.cost --what tasks --tasks bank_f1 dominoes
    python -m benchmarks.cost --what tasks --smoke

Seconds are processor time in one thread.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from time import process_time

import torch
from tqdm.auto import tqdm
from transformers import HfArgumentParser

from metricopt_hf import ConfigurationError, Ledger

from . import large_models, protocol
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
MODELS_PAGE = ROOT / "docs" / "performance.md"
MODELS, TASKS = "models", "tasks"
LOSS_ONLY = "loss_only"
SMOKE_TASKS = 2
HEADERS = ["task", "rows", "phi", "linearisation, s", "passes", "calls", "run, s", "by the loss, s", "ratio"]


@dataclass
class CostArguments:
    """What to measure."""

    what: list[str] = field(default_factory=lambda: [MODELS, TASKS], metadata={"help": f"{MODELS}, {TASKS}, or both."})
    models: list[str] = field(default_factory=lambda: list(large_models.MODELS), metadata={"help": "Default: all."})
    tasks: list[str] = field(default_factory=list, metadata={"help": "Default: all."})
    seed: int = field(default=0, metadata={"help": "Of the splits, and of the runs."})
    page: str = field(default=str(PAGE), metadata={"help": "The page of the tasks."})
    models_page: str = field(default=str(MODELS_PAGE), metadata={"help": "The page of the models."})
    smoke: bool = field(
        default=False,
        metadata={"help": f"The first {SMOKE_TASKS} tasks with a few examples; the page is printed, nothing is kept."},
    )


def linearisation(task: Task, problem: Problem, seed: int) -> tuple[float, int, int]:
    """Seconds of one, behind the first, its passes (backward ones too), and the numbers of phi."""
    phi = frozen_phi(problem)
    observation = evaluator(task, problem, phi, problem.observation, Ledger())
    made = linearizer(observation, seed)
    prediction = observation.predictions()
    space = made.coordinates(prediction)
    start = process_time()
    made.linearize(space.basis, prediction)
    return process_time() - start, 1 + made.cost(prediction, space.dim).passes, phi.dim


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


def models_text(rows: list[list[str]]) -> str:
    """docs/performance.md."""
    held = large_models
    missed = [name for name, *_, share in rows if float(share) > held.MOST_OF_AN_EPOCH]
    why = (
        f" It is missed by {', '.join(missed)}: by differences, each coordinate takes another forward pass through all "
        "that lies behind phi's first layer."
    )
    return page(
        "# Performance",
        "Written by `python -m benchmarks.cost --what models`; do not edit.",
        "What a linearisation costs is known before it is made: with FiLM, and outputs that are a few numbers per row "
        "(or per token, where no token sees another one behind phi's first layer), one forward pass and one backward "
        "pass per output, of many logits for each row's five largest; else one forward pass for each of 16 "
        "coordinates. The log of a run says it at the start of the metric phase. These passes compute only what lies "
        "behind phi's first layer, where there is memory to keep what lies before.",
        f"Measured are {held.MEASURED} rows, as random as the weights, and scaled to {held.OBSERVED:,} observation "
        f"rows and, for an epoch of AdamW, {held.TRAINED:,} training rows. Seconds are processor time in one thread, "
        "on a machine that does other things too. Memory is that of the derivatives; batches, or in their place what "
        f"was computed of them before phi, take up to {held.CACHE_BYTES / 1e9:.0f} GB more. A run "
        f"linearises {held.LINEARISATIONS} times; in the last column stands what that takes. The goal is "
        f"{held.MOST_OF_AN_EPOCH} of an epoch, and 1 GiB.{why if missed else ''}",
        markdown(held.HEADERS, rows),
        "What it costs on the benchmark's small models, with metric calls and selection, is in "
        "[harm.md](results/harm.md#time); how a run grows with its sizes, in [growth.md](results/growth.md); what "
        "several ranks save, in [ranks.md](results/ranks.md); what a phi of tens of thousands of numbers gives, in "
        "[wide_phi.md](results/wide_phi.md); what was measured on a GPU, and what was not, in "
        "[gpu.md](results/gpu.md).",
    )


def main(argv: list[str] | None = None) -> int:
    (args,) = HfArgumentParser(CostArguments).parse_args_into_dataclasses(argv)
    if MODELS in args.what:
        torch.set_num_threads(1)
        rows = []
        for name in args.models:
            rows.append(large_models.row(name))
            print(" | ".join(rows[-1]), flush=True)
        Path(args.models_page).write_text(models_text(rows), encoding="utf-8")
    return measure_tasks(args) if TASKS in args.what else 0


def measure_tasks(args: CostArguments) -> int:
    """Measure tasks and write their page; the exit status."""
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
