"""What a value function over behaviour is worth on a model other than that it was learned on. Written out, win or not.

    python -m benchmarks.transfer            (make bench ARGS=transfer)
    python -m benchmarks.transfer --pairs a9a_width a9a_bank --seeds 0 1 2
    python -m benchmarks.transfer --smoke

Per pair and seed a first run, `guide="behaviour"`, leaves its value function in a folder. The target is run three times
with the same seed: without guidance, from scratch, and started from that folder. No example that the first run trained
on, observed or selected on is one of the target's. What was run already is not run again; the page is written from the
records alone. Seeds 0 to 2 were looked at when the summaries were chosen, so the default ones are others.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
from tqdm.auto import tqdm
from transformers import HfArgumentParser

from examples.comparison.report import mean_and_error
from metricopt_hf import BehaviourGuide, MetricOptTrainer, ValueFunction
from metricopt_hf.value import ValueNetwork, fit

from . import cifar, tabular
from .bench_report import ROOT
from .pages import page
from .problem import Problem, Rows, Task, no_data
from .records import RESULTS, context, rounded
from .run import quiet
from .tables import markdown
from .tasks import CIFAR, CIFAR_SMOKE, TABULAR, TABULAR_SMOKE, tasks
from .training import NO_GUIDE, PREDICTIONS, Budget, make_trainer, per_look

PAGE, RECORDS = ROOT / "docs" / "results" / "transfer.md", RESULTS / "transfer"
# the first run has seeds of its own
FIRST_RUN_SEEDS = 1000
FIRST, SECOND = 0, 1  # whose examples
UNGUIDED, COLD, WARM = "without guidance", "from scratch", "transferred"
WANTED = 0.5  # of rank correlation and of passes saved
MOST_OF = 0.9  # of what the run from scratch gains: the best of many noisy looks is met by chance
CIFAR_STEPS, CIFAR_SIZES = 100, replace(CIFAR, observation=1000)
OBSERVE = {"scores": {"observe": "scores"}, "predictions": {**PREDICTIONS, "tune_output_bias": False}}


@dataclass
class TransferArguments:
    """What to run."""

    pairs: list[str] = field(default_factory=list, metadata={"help": "Default: all."})
    seeds: list[int] = field(default_factory=lambda: list(range(10, 20)), metadata={"help": "Seeds."})
    observe: list[str] = field(default_factory=lambda: ["scores"], metadata={"help": f"Of {', '.join(OBSERVE)}."})
    records: str = field(default=str(RECORDS), metadata={"help": "Folder of the records, a file per pair."})
    page: str = field(default=str(PAGE), metadata={"help": "The page to write."})
    smoke: bool = field(
        default=False, metadata={"help": "A few examples and steps of each; the page is printed, nothing is kept."}
    )


@dataclass(frozen=True)
class Pair:
    """From what to what a value function is carried.

    Attributes:
        task: of the target: metric and direction; the first run's metric is the same.
        source, target: (seed, whose examples) -> problem.
        steps: of every run.
    """

    title: str
    task: Task
    source: Callable[[int, int], Problem]
    target: Callable[[int, int], Problem]
    steps: int = 200


def pairs(smoke: bool = False) -> dict[str, Pair]:
    known = tasks(smoke)
    worst, g_mean, f1 = known["cifar_worst"], known["a9a_gmean"], known["bank_f1"]
    image = {depth: partial(images, depth, smoke) for depth in (20, 32)}
    a9a = {width: partial(table, "a9a", width, smoke) for width in (64, 128)}
    return {
        "resnet20_32": Pair("CIFAR-10, ResNet-20 to ResNet-32", worst, image[20], image[32], CIFAR_STEPS),
        "resnet32_20": Pair("CIFAR-10, ResNet-32 to ResNet-20", worst, image[32], image[20], CIFAR_STEPS),
        "a9a_width": Pair("a9a, MLP 64 to 128 wide", g_mean, a9a[64], a9a[128]),
        "a9a_bank": Pair("a9a to bank marketing", f1, a9a[64], partial(table, "bank_marketing", 64, smoke)),
        "a9a_seed": Pair("a9a, another seed and cut", g_mean, a9a[64], a9a[64]),
    }


def images(depth: int, smoke: bool, seed: int, whose: int) -> Problem:
    """One half of the pools; which is whose hangs on `seed` alone, as both halves of a seed are used together."""
    sizes = CIFAR_SMOKE if smoke else CIFAR_SIZES
    net, train, test = cifar.pool(depth, sizes)
    generator = np.random.default_rng(seed)
    rows = [np.array_split(generator.permutation(len(pool["labels"])), 2)[whose] for pool in (train, test)]
    size = min(sizes.observation, 2 * len(rows[1]) // 5)
    observed, selected, rest = np.split(rows[1], [size, 2 * size])
    measured = (Rows(test, part, "cifar10 test") for part in (observed, selected, rest))
    return Problem(Rows(train, rows[0], "cifar10 train"), *measured, net, eval_batch=100)


def table(name: str, width: int, smoke: bool, seed: int, whose: int) -> Problem:
    """The same; a9a has a part of its positive training labels flipped, as `a9a_gmean` has."""
    sizes = TABULAR_SMOKE if smoke else TABULAR
    train, test = (
        {column: values[:size] for column, values in split.items()}
        for split, size in zip(tabular.load(name), (sizes.train_pool, sizes.test_pool), strict=True)
    )
    half = np.array_split(np.random.default_rng(seed).permutation(len(train["labels"])), 2)[whose]
    flipped = 0.3 if name == "a9a" else 0.0
    size = min(sizes.observation, len(half) // 4)
    own = FIRST_RUN_SEEDS * (whose == FIRST) + seed
    return tabular.cut(name, train, test, size, flipped, own, partial(tabular.MLP, hidden=width), of=half)


class Asked(BehaviourGuide):
    """Says how the value function given ranks the first rounds, before it has seen any of their scores.

    Attributes:
        ranked: rank correlation with the first round's scores, interpolated or real; and of the same observations of
            the first run with their scores shuffled, as a control.
    """

    def learn_rows(self, rows, scores, observed) -> None:
        if not self.ranked and len(rows) > 1 and np.ptp(scores) > 0 and self._begun(rows[0]):
            summaries = self._summaries(rows)
            for name, network in (("transferred", self._given), ("shuffled", self.control)):
                predicted = network.predict(summaries)[0].numpy()
                useful = np.ptp(predicted) > 0
                self.ranked[name] = float(spearmanr(predicted, scores).statistic) if useful else 0.0
        super().learn_rows(rows, scores, observed)

    def __init__(self, value_function: ValueFunction, control: ValueFunction):
        super().__init__(value_function)
        self.control, self.ranked = control, {}


def shuffled(value_function: ValueFunction, seed: int) -> ValueFunction:
    """The same, fitted to the same summaries with their scores shuffled."""
    seen, order = value_function.observations, np.random.default_rng(seed).permutation(len(value_function.observations))
    network = ValueNetwork(value_function.num_coordinates)
    generator = torch.Generator().manual_seed(seed)
    fit(network, seen.z, seen.scores[order], seen.variances, generator)
    return network


def curve_of(trainer: MetricOptTrainer) -> dict[str, list[float]]:
    """Per look at the selection split: passes to observe before it, and the score there."""
    rows = per_look(trainer.result.curve, [0.0] * (trainer.args.max_steps + 1))
    return {key: [row[key] for row in rows] for key in ("passes", "selection", "trust")}


def run_one(pair: Pair, seed: int, observe: str, smoke: bool) -> dict[str, Any]:
    """The record of a pair with a seed."""
    budget = Budget(steps=10 if smoke else pair.steps)
    source, target = pair.source(seed, FIRST), pair.target(seed, SECOND)
    changes, record = OBSERVE[observe], {"seed": seed, "observe": observe, "methods": {}}
    with tempfile.TemporaryDirectory() as folder:

        def run(problem: Problem, seed: int, changes: dict, **options) -> MetricOptTrainer:
            trainer = make_trainer(pair.task, problem, seed, budget, folder, changes, **options)
            trainer.train()
            return trainer

        shared = run(source, FIRST_RUN_SEEDS + seed, {**changes, "guide": "behaviour"}).value_function
        shared.save_pretrained(folder)
        given = ValueFunction.from_pretrained(folder)
        asked = Asked(given, shuffled(given, seed))
        runs = {
            UNGUIDED: run(target, seed, {**NO_GUIDE, "tune_output_bias": False}),
            COLD: run(target, seed, {**changes, "guide": "behaviour"}),
            WARM: run(target, seed, changes, guide=asked),
        }
    for name, trainer in runs.items():
        best = trainer.result.best_phi
        model = trainer.model.eval()
        assert best is not None  # it is in place, merged
        prediction = target.predict(model, target.report)
        report = pair.task.metric(prediction)
        record["methods"][name] = {"report": report, "curve": curve_of(trainer)}
    return {**record, "ranked": asked.ranked}


def passes_until(curve: dict[str, list[float]], score: float, sign: int, all_of_them: float) -> float:
    """Passes before the first look at which the selection score is as good as `score`; all where it never is."""
    for passes, reached in zip(curve["passes"], curve["selection"], strict=True):
        if sign * (reached - score) >= 0:
            return float(passes)
    return float(all_of_them)


@dataclass(frozen=True)
class Row:
    """What a pair came to, over seeds.

    Attributes:
        ranked, control: [seeds] rank correlations before any own observation.
        passes: share of what the run from scratch gains -> from scratch and transferred: [seeds] until then.
        reached: in how many seeds the transferred one gains as much in the end.
        ends, means, report: method -> [seeds]; the best and the mean of all looks at the selection split, and the
            report split at the end.
    """

    ranked: np.ndarray
    control: np.ndarray
    passes: dict[float, tuple[np.ndarray, np.ndarray]]
    reached: int
    ends: dict[str, np.ndarray]
    means: dict[str, np.ndarray]
    report: dict[str, np.ndarray]

    def saved(self, share: float) -> float:
        """Share of the passes to so much of the gain, of the sums over the seeds."""
        cold, warm = (passes.sum() for passes in self.passes[share])
        return 1 - warm / cold if cold else 0.0


def row_of(pair: Pair, records: Sequence[dict[str, Any]]) -> Row:
    sign, passes, reached = pair.task.sign, {share: ([], []) for share in (1.0, MOST_OF)}, 0
    ends: dict[str, list[float]] = {name: [] for name in (UNGUIDED, COLD, WARM)}
    means: dict[str, list[float]] = {name: [] for name in ends}
    for record in records:
        curves = {name: record["methods"][name]["curve"] for name in ends}
        for name, curve in curves.items():
            ends[name].append(sign * max(sign * score for score in curve["selection"]))
            means[name].append(float(np.mean(curve["selection"])))
        start, goal = curves[COLD]["selection"][0], ends[COLD][-1]
        for share, parts in passes.items():
            for part, name in zip(parts, (COLD, WARM), strict=True):
                wanted = start + share * (goal - start)
                part.append(passes_until(curves[name], wanted, sign, curves[COLD]["passes"][-1]))
        reached += sign * (ends[WARM][-1] - goal) >= 0
    return Row(
        np.array([record["ranked"].get("transferred", 0.0) for record in records]),
        np.array([record["ranked"].get("shuffled", 0.0) for record in records]),
        {share: tuple(map(np.array, parts)) for share, parts in passes.items()},
        reached,
        *({name: np.array(values) for name, values in columns.items()} for columns in (ends, means)),
        {name: np.array([r["methods"][name]["report"] for r in records]) for name in ends},
    )


def estimate(values: Sequence[float], digits: int = 3) -> str:
    mean, error = mean_and_error(values)
    return f"{mean:.{digits}f} ± {error:.{digits}f}" if len(values) > 1 else f"{mean:.{digits}f}"


def _passes(passes: tuple[np.ndarray, np.ndarray]) -> list[str]:
    return [estimate(part, 0) for part in passes]


def text(rows: dict[tuple[str, str], tuple[Pair, Row]]) -> str:
    """The page, from (pair, what is observed) -> what it came to."""
    parts = []
    for observe in dict.fromkeys(observe for _, observe in rows):
        mine = {name: found for (name, seen), found in rows.items() if seen == observe}
        ranks = sum(row.ranked.mean() > WANTED for _, row in mine.values())
        saves = {share: sum(row.saved(share) >= WANTED for _, row in mine.values()) for share in (1.0, MOST_OF)}
        first = [
            [
                pair.title,
                pair.task.metric_name,
                len(row.ranked),
                estimate(row.ranked, 2),
                f"{row.ranked.min():.2f}",
                estimate(row.control, 2),
            ]
            for pair, row in mine.values()
        ]
        headers = ["pair", "metric", "seeds", "rank correlation", "least", "control"]
        spent = [
            [
                pair.title,
                *(cell for share in row.passes for cell in [*_passes(row.passes[share]), f"{row.saved(share):.0%}"]),
                f"{row.reached} of {len(row.ranked)}",
            ]
            for pair, row in mine.values()
        ]
        goals = ("its end", f"{MOST_OF:.0%}")
        spent_headers = ["pair", *(f"{n}, to {goal}" for goal in goals for n in (COLD, WARM, "saved")), "as good"]
        second = [
            [pair.title, *(estimate(part[n]) for part in (row.ends, row.means, row.report) for n in row.ends)]
            for pair, row in mine.values()
        ]
        names = (UNGUIDED, COLD, WARM)
        parts += [
            f"## Where {observe} are observed",
            f"The mean rank correlation is above {WANTED} on {ranks} of {len(mine)} pairs; {WANTED:.0%} of the passes "
            f"or more are saved on {saves[1.0]} of {len(mine)} to where the run from scratch ends, and on "
            f"{saves[MOST_OF]} to {MOST_OF:.0%} of its gain.",
            markdown(headers, first),
            "Passes:",
            markdown(spent_headers, spent),
            "The best of all looks at the selection split, where a run ends (which is optimistic), their mean, which "
            "says how steadily it goes there, and the report split:",
            markdown(["pair", *(f"{n}, {part}" for part in ("best", "mean", "report") for n in names)], second),
        ]
    return page(
        "# A value function over behaviour on another model",
        "Written by `python -m benchmarks.transfer` from the records in `benchmarks/results/transfer/`; do not edit.",
        "A first run with `guide=\"behaviour\"` leaves a value function; a run on the target starts from it "
        f'("{WARM}"), or does not ("{COLD}"). Train, observation and selection examples of the first run are none of '
        "the target's, where both have one data set. ± is the standard error over seeds. No bias is tuned in any of "
        "these runs. A pair has the seeds that its row says; one seed shows that it runs, and little more.",
        "Rank correlation: of what the value function predicts of the target's first round of observations with the "
        "scores there, before the run has observed anything of its own; the control is fitted to the first run's "
        "summaries with their scores shuffled. Passes: forward passes over the observation split before the look at "
        "the selection split that is as good as the best that the run from scratch sees; all that it makes where none "
        "is. "
        f"The best of many looks is met by chance too, so the same is told of {MOST_OF:.0%} of what it gains. "
        '"Saved" compares sums over the seeds; "as good" counts the seeds in which the transferred run ends as well.',
        *parts,
    )


def main(argv: list[str] | None = None) -> int:
    (args,) = HfArgumentParser(TransferArguments).parse_args_into_dataclasses(argv)
    if no_data():
        return 2
    quiet()
    known = pairs(args.smoke)
    wanted = {name: known[name] for name in args.pairs or known}
    seeds = args.seeds[:2] if args.smoke else args.seeds
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary if args.smoke else args.records)
        folder.mkdir(parents=True, exist_ok=True)
        work = [(name, observe, seed) for seed in seeds for observe in args.observe for name in wanted]
        for name, observe, seed in tqdm(work, desc="pairs"):
            file = folder / f"{name}.jsonl"
            if (observe, seed) not in {(r["observe"], r["seed"]) for r in read(file)}:
                record = rounded({**run_one(known[name], seed, observe, args.smoke), **context()})
                with open(file, "a", encoding="utf-8") as lines:
                    lines.write(json.dumps(record) + "\n")
        for observe in OBSERVE:
            for name in known:
                records = [r for r in read(folder / f"{name}.jsonl") if r["observe"] == observe]
                if records:
                    found[name, observe] = sorted(records, key=lambda r: r["seed"])
    written = text({key: (known[key[0]], row_of(known[key[0]], records)) for key, records in found.items()})
    print(written)
    if not args.smoke:
        Path(args.page).write_text(written, encoding="utf-8")
    return 0


def read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []


if __name__ == "__main__":
    sys.exit(main())
