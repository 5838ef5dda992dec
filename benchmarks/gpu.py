"""All that a GPU alone can tell, in one command of some minutes: its tests, and what guidance costs on it.

    python -m benchmarks.gpu                 (make bench ARGS=gpu), writes docs/results/gpu.md

Runs `pytest -m gpu`, guided steps against plain ones (`benchmarks.overhead`), a pass over the observation set against
`trainer.evaluate()`, and 33 points together against one by one (`benchmarks.passes`), prints each row as it is
measured, and makes one table of them.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter

import torch
import transformers
from tabulate import tabulate
from transformers import HfArgumentParser

from . import overhead, passes
from .pages import page

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "results" / "gpu.md"
# of trainer.evaluate() a pass may take at most, and of 33 passes 33 points together
PASS_LIMIT, TOGETHER_LIMIT = 1 / 15, 0.4


@dataclass
class GpuArguments:
    """How long to measure."""

    models: list[str] = field(default_factory=lambda: list(overhead.ON_GPU), metadata={"help": "timm models."})
    pairs: int = field(default=3, metadata={"help": "Pairs of runs per model."})
    steps: int = field(default=30, metadata={"help": "Timed steps of a run."})
    rows: int = field(default=2000, metadata={"help": "Images in the observation set."})
    batch_size: int = field(default=250, metadata={"help": "Of passes and of evaluate()."})
    tests: bool = field(default=True, metadata={"help": "Whether to run the tests that need a GPU."})
    page: str = field(default=str(PAGE), metadata={"help": "Where the table is written to."})


def tests_row() -> list[str]:
    """How many tests passed, and the names of those that were not run because their own set-up failed.

    Raises:
        SystemExit: a test failed: then there is nothing to report but its output.
    """
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-rE", "-m", "gpu", "tests"], cwd=ROOT, capture_output=True, text=True
    )
    last = (done.stdout.strip().splitlines() or [""])[-1]
    not_run = [name.rpartition("::")[2] for name in re.findall(r"^ERROR (\S+)", done.stdout, re.M)]
    if done.returncode:
        print(done.stdout[-6000:], file=sys.stderr)
        if "failed" in last or not not_run:
            raise SystemExit("A test fails on this GPU, so the page is not written.")
    told = ", ".join(re.findall(r"\d+ (?:passed|skipped)", last))
    if not_run:
        told += f"; not run: {', '.join(not_run)} (a test's own set-up failed)"
    return ["pytest -m gpu", "", told, "in part" if not_run else "yes"]


def rows(args: GpuArguments) -> Iterator[list[str]]:
    """What was measured, as rows of the table."""
    measured = passes.PassArguments(
        device="cuda", models=args.models, rows=args.rows, batch_size=args.batch_size, points=33
    )
    for name in args.models:
        found = passes.measure(name, measured)
        told = f"{found.evaluate:.3f} -> {found.one_pass:.3f} s, ratio 1/{1 / found.ratio:.1f}"
        yield [f"a pass over {args.rows} images", name, told, _hoped(found.ratio, PASS_LIMIT)]
        told = f"{found.one_by_one:.2f} -> {found.together:.2f} s, ratio {found.together_ratio:.2f}"
        yield [f"{measured.points} points together", name, told, _hoped(found.together_ratio, TOGETHER_LIMIT)]
    for model in args.models:
        steps = overhead.OverheadArguments(device="cuda", models=[model], pairs=args.pairs, steps=args.steps)
        for name, batch, threads, workers, plain, guided, ratio, fine in overhead.step_rows(steps):
            what = f"a step of {batch}, {threads} CPU threads, {workers} workers"
            yield [what, name, f"{plain} -> {guided} ms, ratio {ratio}", fine]
    if args.tests:
        yield tests_row()


def _hoped(ratio: float, limit: float) -> str:
    return f"{'yes' if ratio <= limit else 'NO'} ({limit:.2g})"


def main(argv: list[str] | None = None) -> int:
    (args,) = HfArgumentParser(GpuArguments).parse_args_into_dataclasses(argv)
    if not torch.cuda.is_available():
        print("There is no GPU here that torch can use, so there is nothing to measure.", file=sys.stderr)
        return 1
    transformers.logging.set_verbosity_error()
    start, table = perf_counter(), []
    for row in rows(args):
        table.append(row)
        print(*row, sep=" | ", flush=True)
    told = f"{torch.cuda.get_device_name()}, bf16, torch {torch.__version__}, {perf_counter() - start:.0f} s"
    headers = ["what", "model", "measured", "as hoped"]
    print(f"\n{told}\n\n{tabulate(table, headers, disable_numparse=True)}")
    written = page(
        "# On a GPU",
        "Written by `python -m benchmarks.gpu`; do not edit.",
        f"{told} in all. A step: plain Trainer's on the same frozen model, and a guided one; the ratio is the median "
        f"of {args.pairs} pairs. A pass: `trainer.evaluate()`, and a pass behind phi on the same images. Points: one "
        "pass each, and several in one where that is quicker. Random weights and images of 224 x 224.",
        tabulate(table, headers, tablefmt="github", disable_numparse=True),
    )
    Path(args.page).write_text(written, encoding="utf-8")
    return 0 if all(row[-1].startswith("yes") for row in table) else 1


if __name__ == "__main__":
    sys.exit(main())
