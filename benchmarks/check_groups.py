"""Does the method do what it claims where no threshold can help? Exits 1 if not.

    python -m benchmarks.check_groups            (make check-groups)

Three tasks of the benchmark, with its methods, settings, splits and budgets: dominoes, and a9a, accuracy in the worst
group of label and digit or sex, and CIFAR-10 under four cameras, accuracy under the worst of them.

The claim, for each of the three over seeds 0-2: the paired 95 % interval of MetricOpt minus its rival (the best of loss
only and no training, each with and without a tuned bias) on the report split lies above zero, and those of the controls
that know nothing do not.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from transformers import HfArgumentParser

from . import protocol
from .comparing import CHEAP, Result, results_of
from .measure import PLAIN
from .methods import OURS
from .problem import no_data
from .records import read
from .run import BenchArguments, execute

TASKS = ("dominoes", "a9a_groups", "cifar_cameras")
CONTROLS = ("shuffled", "random")


@dataclass
class CheckArguments:
    """What to run. The claim is made for the defaults."""

    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "Seeds to run, two or more."})
    tasks: list[str] = field(default_factory=lambda: list(TASKS), metadata={"help": "Tasks to check."})
    jobs: int = field(default=2, metadata={"help": "Processes, of one thread each."})
    results: str | None = field(default=None, metadata={"help": "Folder for the records. Default: they are not kept."})


def holds(result: Result) -> bool:
    """Say what came out of a task, and whether the claim holds there."""
    print(f"\n{result.task.title}, against {result.rival.title}\n")
    fine = True
    for method in (OURS, *CONTROLS):
        row = result.rows[method, PLAIN]
        difference = row.minus(result.rival, result.task.sign)
        held = (difference.low > 0) == (method == OURS)
        claim = "above 0" if method == OURS else "not above 0"
        print(
            f"{row.title}: {difference.mean:+.4f}, 95 % interval [{difference.low:+.4f}, {difference.high:+.4f}]; "
            f"{claim}: {'yes' if held else 'NO'}"
        )
        fine &= held
    return fine


def main(argv: list[str] | None = None) -> int:
    (args,) = HfArgumentParser(CheckArguments).parse_args_into_dataclasses(argv)
    if no_data():
        return 2
    methods = [*CHEAP, OURS, *CONTROLS]
    units = [[(task, method, seed) for method in methods] for task in args.tasks for seed in args.seeds]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(args.results or temporary)
        if execute(units, protocol.load(), folder, BenchArguments(jobs=args.jobs)):
            return 2
        results = [result for result in results_of(read(folder)) if result.task.name in args.tasks]
    fine = all([holds(result) for result in results])
    print("\nThe claim holds." if fine else "\nThe claim FAILS.")
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
