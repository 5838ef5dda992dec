"""Does a value function that somebody shared save metric calls? Prints what came out, win or not.

    python -m benchmarks.warm_start            (make bench ARGS=warm-start)

The task of `worst_class` (CIFAR-10 as JPEG, a pretrained ResNet-20, worst-class recall). Per seed, a first run leaves a
value function in a folder; a second run, with another seed, other training images and another observation split, is
done twice: cold, and started from that folder (`value_function_name_or_path`). Nothing that the first run saw is in the
second run's splits. As everything in front of the last block stands still in all runs, its activations are computed
once, and the last block is all that is run: the outputs are those of the whole net.
"""

from __future__ import annotations

import logging
import sys
import tempfile
from dataclasses import dataclass, field

import numpy as np
import transformers
from torch import nn
from tqdm.auto import tqdm
from transformers import HfArgumentParser

from examples.comparison.methods import predictions
from examples.comparison.report import MethodRun, details_of, paired_difference, save_results
from metricopt_hf import MetricOptTrainer

from . import cifar
from .problem import Problem, Rows, no_data
from .worst_class import METRIC, make_trainer

COLD, WARM = "cold", "warm"
# a round of observations at each look at the selection split
GUIDED = {"observe": "scores"}
# rows of the table that is printed: one per so many rounds
ROUNDS_PER_ROW = 2
# the first run has seeds of its own
FIRST_RUN_SEEDS = 1000
TRAIN, OBSERVED, FIRST_SELECTED = 3000, 2000, 500  # images


@dataclass
class WarmStartArguments:
    """What to run."""

    seeds: list[int] = field(default_factory=lambda: list(range(10)), metadata={"help": "Seeds to run, two or more."})
    max_steps: int = field(default=100, metadata={"help": "Optimizer steps of every run; 160 metric calls."})
    results: str | None = field(default=None, metadata={"help": "File to write all figures to, as JSON."})


def two_users(net: nn.Module, train: cifar.Images, test: cifar.Images, seed: int) -> tuple[Problem, Problem]:
    """Problems for the first run and for the second one, all splits disjoint."""
    generator = np.random.default_rng(seed)
    halves = np.split(generator.permutation(len(train.labels)), 2)
    mine, yours = (Rows(vars(train), rows, "cifar10 train") for rows in halves)
    parts = np.split(generator.permutation(len(test.labels)), np.cumsum([OBSERVED, FIRST_SELECTED, OBSERVED, OBSERVED]))
    observed, selected, *second = (Rows(vars(test), rows, "cifar10 test") for rows in parts)
    return Problem(mine, observed, selected, selected, net), Problem(yours, *second, net)


def run(name: str, trainer: MetricOptTrainer, problem: Problem) -> MethodRun:
    trainer.train()
    (prediction,) = predictions(trainer, {"report": problem.report}).values()
    return MethodRun(
        name,
        trainer.args.seed,
        {"report": trainer.metric(prediction)},
        dict(trainer.ledger.calls),
        details=details_of(trainer),
    )


def curves(runs: list[MethodRun], name: str, key: str) -> np.ndarray:
    """[seeds, rounds and the end] of what `name` had at each round's start; nan where there was nothing."""
    return np.array([[row[key] for row in run.details["curve"]] for run in runs if run.method == name], dtype=float)


def row(label: str, cold: np.ndarray, warm: np.ndarray) -> str:
    """A line of the table from one number per seed for each of the two."""
    difference = paired_difference(warm, cold)
    return (
        f"{label:>22}  {cold.mean():.3f}  {warm.mean():.3f}  {difference.mean:+.3f} ± {difference.error:.3f}  "
        f"{difference.verdict}"
    )


def main(argv: list[str] | None = None) -> int:
    (args,) = HfArgumentParser(WarmStartArguments).parse_args_into_dataclasses(argv)
    if no_data():
        return 2
    transformers.logging.set_verbosity_error()
    logging.getLogger("metricopt_hf").setLevel(logging.ERROR)
    print("computing activations ...", flush=True)
    net = cifar.pretrained(20)
    train, test = (cifar.activations(net, cifar.load(split)) for split in (f"train[:{2 * TRAIN}]", "test"))
    runs = []
    for seed in tqdm(args.seeds, desc="seeds"):
        first, second = two_users(net, train, test, seed)
        with tempfile.TemporaryDirectory() as folder:
            shared = make_trainer(FIRST_RUN_SEEDS + seed, first, args.max_steps, folder, **GUIDED)
            shared.train()
            shared.value_function.save_pretrained(folder)
            for name, changes in ((COLD, {}), (WARM, {"value_function_name_or_path": folder})):
                trainer = make_trainer(seed, second, args.max_steps, folder, **GUIDED, **changes)
                runs.append(run(name, trainer, second))

    selection, trust = ([curves(runs, name, key) for name in (COLD, WARM)] for key in ("selection", "trust"))
    reports = [np.array([run.scores["report"] for run in runs if run.method == name]) for name in (COLD, WARM)]
    calls = [0, *(row["calls"] for row in runs[0].details["curve"][:-1])]  # before each look at the selection split
    print(
        f"\n{METRIC} on the selection split against metric calls; {len(args.seeds)} seeds, paired, ± standard error\n"
    )
    print(f"{'metric calls so far':>22}  {COLD}   {WARM}   {WARM} - {COLD}")
    for i in range(0, len(calls), ROUNDS_PER_ROW):
        print(row(str(calls[i]), *(s[:, i] for s in selection)))
    print(row("mean over the run", *(s.mean(1) for s in selection)))
    print(row("report split, at end", *reports))
    print(row("mean trust", *(t[:, :-1].mean(1) for t in trust)))
    if args.results is not None:
        save_results(args.results, runs, metric=METRIC, arguments=vars(args))
    return 0


if __name__ == "__main__":
    sys.exit(main())
