"""Chooses one setting per method for all tasks, on development seeds and the selection split; writes `protocol.json`.

    python -m benchmarks.tune            (make bench-tune)

Every method's grid is of the same size. A setting's worth is its score on the selection split, in each task divided by
the spread of all settings of all methods there (their scores' standard deviation), so that tasks count alike; then
averaged over tasks and seeds. CIFAR observes and selects on fewer images here, for time. No report split is looked at.
What was run is kept in `results/tuning/`, and is not run again.
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
from metricopt_hf.splits import data_root

from . import protocol
from .methods import RIVALS, TUNED
from .records import RESULTS, context, read, rounded, write
from .run import quiet
from .tasks import CIFAR_TUNING, tasks
from .training import Budget

FOLDER = RESULTS / "tuning"


@dataclass
class TuneArguments:
    """What to choose on."""

    tasks: list[str] = field(default_factory=lambda: ["a9a_gmean", "bank_f1"], metadata={"help": "Tasks to choose on."})
    seeds: list[int] = field(default_factory=lambda: [100, 101], metadata={"help": "Development seeds, 100 to 109."})
    first_seed_only: list[str] = field(
        default_factory=lambda: ["cola_mcc", "cifar_worst"],
        metadata={"help": "Slower tasks, to choose on with the first seed only."},
    )
    methods: list[str] = field(default_factory=lambda: list(TUNED), metadata={"help": "Methods to choose for."})


def setting(config: dict[str, Any]) -> str:
    return json.dumps(config, sort_keys=True)


def worth(records: list[dict[str, Any]], signs: dict[str, int]) -> dict[str, dict[str, float]]:
    """method -> setting -> what it is worth; greater is better.

    Args:
        records: with `task`, `method`, `config` and `score`.
        signs: of the tasks, -1 where smaller is better.
    """
    scores: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    for record in records:
        key = (record["task"], record["method"], setting(record["config"]))
        scores[key].append(signs[record["task"]] * record["score"])
    means = {key: float(np.mean(values)) for key, values in scores.items()}
    spread = {task: float(np.std([mean for key, mean in means.items() if key[0] == task])) or 1.0 for task in signs}
    worths: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for (task, method, config), mean in means.items():
        worths[method][config].append(mean / spread[task])
    return {method: {c: float(np.mean(v)) for c, v in settings.items()} for method, settings in worths.items()}


def main(argv: list[str] | None = None) -> int:
    (arguments,) = HfArgumentParser(TuneArguments).parse_args_into_dataclasses(argv)
    if not data_root().exists():
        print(f"The data are not here: {data_root()} (set METRICOPT_DATA to the folder that holds cifar10).")
        return 2
    if not set(arguments.seeds) <= set(protocol.DEVELOPMENT_SEEDS):
        raise ConfigurationError(f"--seeds {arguments.seeds}: only development seeds, 100 to 109, may be chosen on.")
    quiet()
    budget, known, all_tasks = Budget(), context(), tasks(image_sizes=CIFAR_TUNING)
    pairs = [(task, arguments.seeds[0]) for task in arguments.tasks + arguments.first_seed_only]
    pairs += [(task, seed) for seed in arguments.seeds[1:] for task in arguments.tasks]
    wanted = [
        (task, method, seed, config)
        for task, seed in pairs
        for method in arguments.methods
        for config in RIVALS[method].grid
    ]
    there = {(r["task"], r["method"], r["seed"], setting(r["config"])) for r in read(FOLDER)}
    pending = [w for w in wanted if (*w[:3], setting(w[3])) not in there]
    for task, method, seed, config in tqdm(pending, desc="settings"):
        start = perf_counter()
        problem = all_tasks[task].prepare(seed)
        with tempfile.TemporaryDirectory() as folder:
            outcome = RIVALS[method].run(all_tasks[task], problem, seed, budget, folder, config)
        record = {"task": task, "method": method, "seed": seed, "config": dict(config), "score": outcome.selection}
        write(rounded({**record, "seconds": perf_counter() - start, "commit": known["commit"]}), FOLDER)

    keys = {(*w[:3], setting(w[3])) for w in wanted}
    records = [r for r in read(FOLDER) if (r["task"], r["method"], r["seed"], setting(r["config"])) in keys]
    signs = {task: 1 if all_tasks[task].greater_is_better else -1 for task, _ in pairs}
    worths = worth(records, signs)
    best = {method: max(settings, key=settings.get) for method, settings in worths.items()}
    for method, settings in worths.items():
        print(f"\n{RIVALS[method].title}")
        for config, value in settings.items():
            print(f"{'*' if config == best[method] else ' '} {value:8.3f}  {config}")
    protocol.Protocol(
        {method: json.loads(config) for method, config in best.items()},
        budget,
        {
            "command": "python -m benchmarks.tune",
            "tasks and seeds": pairs,
            "worth": {m: {c: round(v, 3) for c, v in settings.items()} for m, settings in worths.items()},
        },
    ).save()
    print(f"\nwritten: {Path(protocol.FILE).name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
