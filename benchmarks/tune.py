"""Chooses one setting per method for all tasks, on development seeds and the selection split; writes `protocol.json`.

    python -m benchmarks.tune            (make bench ARGS=tune)

Every method's grid is of the same size. A setting's worth is its score on the selection split, in each task in units of
that score's standard error (bootstrap over the items, at the start), so that noise counts as noise; then averaged over
tasks. CIFAR observes and selects on fewer images here, for time. No report split is looked at.
Methods that need groups or images are chosen for on the tasks that have them.
What was run is kept in `results/tuning/`, and is not run again. Methods that are not named keep their settings.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from tqdm.auto import tqdm
from transformers import HfArgumentParser

from metricopt_hf import ConfigurationError

from . import protocol
from .measure import item_bootstrap
from .methods import RIVALS, TUNED
from .problem import Task, no_data
from .records import TUNING, context, read, rounded, setting, write
from .run import quiet
from .tasks import CIFAR_TUNING, tasks
from .training import Budget


@dataclass
class TuneArguments:
    """What to choose on."""

    tasks: list[str] = field(default_factory=lambda: ["a9a_gmean", "bank_f1"], metadata={"help": "Tasks to choose on."})
    seeds: list[int] = field(default_factory=lambda: [100, 101], metadata={"help": "Development seeds, 100 to 109."})
    first_seed_only: list[str] = field(
        default_factory=lambda: ["cola_mcc", "cifar_worst"],
        metadata={"help": "Slower tasks, to choose on with the first seed only."},
    )
    group_tasks: list[str] = field(
        default_factory=lambda: ["a9a_groups", "a9a_fair", "cifar_cameras", "dominoes"],
        metadata={"help": "Tasks to choose on for methods that apply to none of the others."},
    )
    methods: list[str] = field(default_factory=lambda: list(TUNED), metadata={"help": "Methods to choose for."})


def worth(records: list[dict[str, Any]], units: dict[str, float]) -> dict[str, dict[str, float]]:
    """method -> setting -> what it is worth; greater is better.

    Args:
        records: with `task`, `method`, `config` and `score`.
        units: task -> the score's standard error, negative where smaller is better.
    """
    scores: dict[tuple[str, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        scores[record["method"], setting(record["config"])][record["task"]].append(record["score"])
    worths: dict[str, dict[str, float]] = defaultdict(dict)
    for (method, config), by_task in scores.items():
        worths[method][config] = float(np.mean([np.mean(values) / units[task] for task, values in by_task.items()]))
    return worths


def unit(task: Task, seed: int) -> float:
    """The standard error of the start's score on the selection split, negative where smaller is better."""
    problem = task.prepare(seed)
    at_start = problem.outputs(problem.start())["selection"]
    error = float(np.std(item_bootstrap(task, problem.selection, at_start), ddof=1))
    return error if task.greater_is_better else -error


def main(argv: list[str] | None = None) -> int:
    (arguments,) = HfArgumentParser(TuneArguments).parse_args_into_dataclasses(argv)
    if no_data():
        return 2
    if not set(arguments.seeds) <= set(protocol.DEVELOPMENT_SEEDS):
        raise ConfigurationError(f"--seeds {arguments.seeds}: only development seeds, 100 to 109, may be chosen on.")
    quiet()
    budget, known, all_tasks = Budget(), context(), tasks(image_sizes=CIFAR_TUNING)
    pairs = [(task, arguments.seeds[0]) for task in arguments.tasks + arguments.first_seed_only]
    pairs += [(task, seed) for seed in arguments.seeds[1:] for task in arguments.tasks]
    group_pairs = [(task, seed) for seed in arguments.seeds for task in arguments.group_tasks]

    def suited(method: str) -> list[tuple[str, int]]:
        applies = RIVALS[method].applies
        return [p for p in pairs if applies(all_tasks[p[0]])] or [p for p in group_pairs if applies(all_tasks[p[0]])]

    kept = protocol.load() if protocol.FILE.exists() else protocol.Protocol({})
    wanted = [
        (task, method, seed, kept.with_loss(method, config))
        for method in arguments.methods
        for task, seed in suited(method)
        for config in RIVALS[method].grid
    ]
    wanted.sort(key=lambda w: (pairs + group_pairs).index((w[0], w[2])))  # runs that share a problem together
    there = {(r["task"], r["method"], r["seed"], setting(r["config"])) for r in read(TUNING)}
    pending = [w for w in wanted if (*w[:3], setting(w[3])) not in there]
    for task, method, seed, config in tqdm(pending, desc="settings"):
        start = perf_counter()
        problem = all_tasks[task].prepare(seed)
        with tempfile.TemporaryDirectory() as folder:
            outcome = RIVALS[method].run(all_tasks[task], problem, seed, budget, folder, config)
        record = {"task": task, "method": method, "seed": seed, "config": dict(config), "score": outcome.selection}
        write(rounded({**record, "seconds": perf_counter() - start, "commit": known["commit"]}), TUNING)

    keys = {(*w[:3], setting(w[3])) for w in wanted}
    records = [r for r in read(TUNING) if (r["task"], r["method"], r["seed"], setting(r["config"])) in keys]
    units = {task: unit(all_tasks[task], arguments.seeds[0]) for task in dict.fromkeys(w[0] for w in wanted)}
    worths = worth(records, units)
    best = {method: max(settings, key=settings.get) for method, settings in worths.items()}
    for method, settings in worths.items():
        print(f"\n{RIVALS[method].title}")
        for config, value in settings.items():
            print(f"{'*' if config == best[method] else ' '} {value:8.3f}  {config}")
    kind = "tasks and seeds"
    if set(arguments.methods) != set(TUNED):
        kind += f" of {', '.join(arguments.methods)}"
    chosen = {method: json.loads(config) for method, config in best.items()}
    for config in chosen.values():
        config.pop("by_loss", None)
    protocol.Protocol(
        {**kept.settings, **chosen},
        budget,
        {
            **kept.chosen,
            "command": "python -m benchmarks.tune",
            kind: pairs,
            "tasks and seeds with groups": group_pairs or kept.chosen.get("tasks and seeds with groups", []),
            "units": {**kept.chosen.get("units", {}), **{task: float(f"{value:.3g}") for task, value in units.items()}},
            "worth": {
                **kept.chosen.get("worth", {}),
                **{m: {c: round(v, 3) for c, v in settings.items()} for m, settings in worths.items()},
            },
        },
    ).save()
    print(f"\nwritten: {Path(protocol.FILE).name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
