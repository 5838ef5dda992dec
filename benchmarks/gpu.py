"""All that a GPU alone can tell, in one command of some minutes: its tests, and what guidance costs on it.

    python -m benchmarks.gpu                 (make bench-gpu)

Runs `pytest -m gpu`, guided steps against plain ones (`benchmarks.overhead`), a pass over the observation set against
`trainer.evaluate()`, and 33 points together against one by one (`benchmarks.passes`), and prints one table.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter

import torch
import transformers
from tabulate import tabulate
from transformers import HfArgumentParser

from . import overhead, passes

ROOT = Path(__file__).parents[1]
# of trainer.evaluate() a pass may take at most, and of 33 passes 33 points together
PASS_LIMIT, TOGETHER_LIMIT = 1 / 15, 0.4


@dataclass
class GpuArguments:
    """How long to measure."""

    pairs: int = field(default=3, metadata={"help": "Pairs of runs per model."})
    steps: int = field(default=30, metadata={"help": "Timed steps of a run."})
    rows: int = field(default=2000, metadata={"help": "Images in the observation set."})
    batch_size: int = field(default=250, metadata={"help": "Of passes and of evaluate()."})
    tests: bool = field(default=True, metadata={"help": "Whether to run the tests that need a GPU."})


def tests_row() -> list[str]:
    """What pytest says last, and whether all went well."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests"], cwd=ROOT, capture_output=True, text=True
    )
    lines = done.stdout.strip().splitlines() or ["no output"]
    if done.returncode:
        print(done.stdout[-6000:], file=sys.stderr)
    return ["pytest -m gpu", "", lines[-1].strip("= "), "yes" if done.returncode == 0 else "NO"]


def rows(args: GpuArguments) -> list[list[str]]:
    """What was measured, as rows of the table."""
    table = [tests_row()] if args.tests else []
    steps = overhead.OverheadArguments(device="cuda", models=overhead.ON_GPU, pairs=args.pairs, steps=args.steps)
    for row in overhead.step_rows(steps):
        name, batch, threads, workers, plain, guided, ratio, fine = row
        what = f"a step of {batch}, {threads} CPU threads, {workers} workers"
        table.append([what, name, f"{plain} -> {guided} ms, ratio {ratio}", fine])
    measured = passes.PassArguments(
        device="cuda", models=overhead.ON_GPU, rows=args.rows, batch_size=args.batch_size, points=33
    )
    for name in measured.models:
        found = passes.measure(name, measured)
        told = f"{found.evaluate:.3f} -> {found.one_pass:.3f} s, ratio 1/{1 / found.ratio:.1f}"
        table.append([f"a pass over {args.rows} images", name, told, "yes" if found.ratio <= PASS_LIMIT else "NO"])
        told = f"{found.one_by_one:.2f} -> {found.together:.2f} s, ratio {found.together_ratio:.2f}"
        fine = "yes" if found.together_ratio <= TOGETHER_LIMIT else "NO"
        table.append([f"{measured.points} points together", name, told, fine])
    return table


def main(argv: list[str] | None = None) -> int:
    (args,) = HfArgumentParser(GpuArguments).parse_args_into_dataclasses(argv)
    if not torch.cuda.is_available():
        print("There is no GPU here that torch can use, so there is nothing to measure.", file=sys.stderr)
        return 1
    transformers.logging.set_verbosity_error()
    start = perf_counter()
    table = rows(args)
    print(f"\n{torch.cuda.get_device_name()}, bf16, torch {torch.__version__}, {perf_counter() - start:.0f} s\n")
    print(tabulate(table, ["what", "model", "measured", "as hoped"], disable_numparse=True))
    return 0 if all(row[-1].startswith("yes") for row in table) else 1


if __name__ == "__main__":
    sys.exit(main())
