"""How much is there to gain? What a bias per logit can reach on the report split, from the start model's predictions.

    python -m benchmarks.ceiling            (make bench ARGS=ceiling)

A bias moves decision thresholds, and nothing costs less. It is searched (`metricopt_hf.posthoc`) on the observation
split, as all can do; on observation and selection together, which is twice the examples; and on the report split
itself, which nobody may: it is a mark of how high the search could end if it had seen what it is judged on.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from statistics import mean

import numpy as np
from tqdm.auto import tqdm
from transformers import HfArgumentParser

from examples.comparison.report import mean_and_error, require
from metricopt_hf import ConfigurationError, Ledger, Metric
from metricopt_hf.posthoc import add_bias, tune_bias

from .by_loss import POST_HOC_CALLS
from .problem import Task, joined, no_data
from .run import quiet
from .tasks import tasks

COLUMNS = ("start", "+ bias, observation", "+ bias, observation and selection", "+ bias, report itself")


@dataclass
class CeilingArguments:
    """What to look at."""

    tasks: list[str] = field(default_factory=list, metadata={"help": "Default: all that have logits of classes."})
    seeds: list[int] = field(default_factory=lambda: list(range(10)), metadata={"help": "Seeds."})


def ceilings(task: Task, seed: int) -> list[float]:
    """The metric on the report split, one for each of `COLUMNS`."""
    problem = task.prepare(seed)
    made = problem.outputs(problem.start())
    metric, report = Metric(task.metric, task.metric_name, task.greater_is_better), made["report"]
    both = joined(made["observation"], made["selection"])
    biases = [tune_bias(metric, seen, Ledger(), POST_HOC_CALLS) for seen in (made["observation"], both, report)]
    return [task.metric(report), *(task.metric(add_bias(report, bias)) for bias in biases)]


def main(argv: list[str] | None = None) -> int:
    (arguments,) = HfArgumentParser(CeilingArguments).parse_args_into_dataclasses(argv)
    if no_data():
        return 2
    tunable = {name: task for name, task in tasks().items() if task.decides}
    if unknown := set(arguments.tasks) - set(tunable):
        raise ConfigurationError(f"--tasks {sorted(unknown)[0]}: there are {', '.join(tunable)}.")
    quiet()
    table = []
    for name in tqdm(arguments.tasks or list(tunable), desc="tasks"):
        task = tunable[name]
        scores = np.array([ceilings(task, seed) for seed in arguments.seeds])
        room = mean(task.sign * (scores[:, -1] - scores[:, 1]))
        cells = (mean_and_error(column.tolist()) for column in scores.T)
        table.append([name + " *" * task.headline, *(f"{m:.4f} ± {e:.4f}" for m, e in cells), f"{room:+.4f}"])
    headers = ["task", *COLUMNS, "room above a bias tuned on observation"]
    print(require("tabulate", "report").tabulate(table, headers, tablefmt="github", disable_numparse=True))
    return 0


if __name__ == "__main__":
    sys.exit(main())
