"""A metric under a constraint: recall as high as precision allows. Constraints, against what one would do without them.

    python -m benchmarks.constraints            (make bench ARGS=constraints)
    python -m benchmarks.constraints --bound 0.5 --seeds 0 1 2 3 4 5 6 7 8 9
    python -m benchmarks.constraints --smoke

Bank marketing, the MLP of `benchmarks.tabular`, recall with precision at least at a bound. Rivals: a threshold, which
is a bias tuned on the penalised metric, on the observation split or, as it needs no selection, on both splits; and the
same run with shuffled values.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import process_time

import numpy as np
import torch
import transformers
from tqdm.auto import tqdm
from transformers import EvalPrediction, HfArgumentParser

from examples.comparison.report import mean_and_error
from examples.comparison.study import Start
from metricopt_hf import Ledger, Metric, MetricOptConfig, MetricOptTrainer
from metricopt_hf.experimental import constrained
from metricopt_hf.posthoc import add_bias, tune_bias

from . import tabular
from .bench_report import ROOT
from .pages import page
from .problem import Problem, joined, no_data
from .run import quiet
from .tables import markdown
from .tasks import TABULAR, TABULAR_SMOKE
from .training import SILENT

PAGE = ROOT / "docs" / "results" / "constraints.md"
MEASURED = ("selection", "report")
LOSS_ONLY = "loss only"
# title -> changes
METHODS: dict[str, Mapping] = {
    LOSS_ONLY: {"follows_metric": False},
    "control: shuffled": {"guide": "shuffled"},
    "constraints": {},
}


@dataclass
class ConstraintsArguments:
    """What to run."""

    bound: float = field(default=0.6, metadata={"help": "The least precision."})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2, 3, 4], metadata={"help": "Seeds to run, two or more."})
    max_steps: int = field(default=10, metadata={"help": "Optimizer steps of every method."})
    page: str = field(default=str(PAGE), metadata={"help": "The page to write."})
    smoke: bool = field(
        default=False, metadata={"help": "A few examples and steps; the page is printed, nothing is kept."}
    )


@dataclass(frozen=True)
class Row:
    """What a method came to with a seed: recall and precision on `MEASURED`, and seconds of processor time."""

    method: str
    seed: int
    recall: Mapping[str, float]
    precision: Mapping[str, float]
    noise: float  # of precision on the report split
    seconds: float


def numbers(prediction: EvalPrediction) -> dict[str, float]:
    """Recall and precision of the second class; precision is 1 where nothing is predicted to be of it."""
    predicted, labels = prediction.predictions.argmax(-1) == 1, prediction.label_ids == 1
    hits = float((predicted & labels).sum())
    found = int(predicted.sum())
    return {"recall": hits / max(1, int(labels.sum())), "precision": hits / found if found else 1.0}


def trainer_of(title: str, problem: Problem, seed: int, args: ConstraintsArguments, folder: str) -> MetricOptTrainer:
    config = MetricOptConfig(
        folder,
        max_steps=args.max_steps,
        lr_scheduler_type="constant",
        per_device_train_batch_size=64,
        per_device_eval_batch_size=problem.eval_batch,
        metric_steps=args.max_steps,
        greater_is_better=True,
        seed=seed,
        **SILENT,
    )
    options = {"metric": constrained(Metric(numbers, "recall"), f"precision>={args.bound}"), "phi": problem.phi}
    trainer = Start(problem.model, config, problem, options).trainer(**METHODS[title])
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def row(method: str, seed: int, outputs: Mapping[str, EvalPrediction], seconds: float) -> Row:
    found = {split: numbers(outputs[split]) for split in MEASURED}
    picked = int((outputs["report"].predictions.argmax(-1) == 1).sum())
    precision = found["report"]["precision"]
    return Row(
        method,
        seed,
        {split: values["recall"] for split, values in found.items()},
        {split: values["precision"] for split, values in found.items()},
        (precision * (1 - precision) / max(1, picked)) ** 0.5,
        seconds,
    )


def outputs_of(model: torch.nn.Module, problem: Problem) -> dict[str, EvalPrediction]:
    model = model.eval()
    return {name: problem.predict(model, getattr(problem, name)) for name in ("observation", *MEASURED)}


def with_threshold(
    outputs: Mapping[str, EvalPrediction], trainer: MetricOptTrainer, known: EvalPrediction | None = None
) -> dict[str, EvalPrediction]:
    """With the bias that is best on `known`, by default the observation split, for the penalised metric."""
    bias = tune_bias(trainer.metric, outputs["observation"] if known is None else known, Ledger())
    return {name: add_bias(output, bias) for name, output in outputs.items()}


def rows_of(seed: int, args: ConstraintsArguments, folder: str) -> list[Row]:
    problem = tabular.problem("bank_marketing", TABULAR_SMOKE if args.smoke else TABULAR, 0.0, seed)
    start = outputs_of(problem.model, problem)
    rows = [row("as it is", seed, start, 0.0)]
    for title in METHODS:
        trainer, begun = trainer_of(title, problem, seed, args, folder), process_time()
        trainer.train()
        seconds = process_time() - begun
        outputs = outputs_of(trainer.model, problem)
        if title == LOSS_ONLY:
            rows.append(row("as it is, threshold", seed, with_threshold(start, trainer), 0.0))
            both = joined(start["observation"], start["selection"])
            rows.append(row("as it is, threshold of both", seed, with_threshold(start, trainer, both), 0.0))
        rows.append(row(title, seed, outputs, seconds))
        if title == LOSS_ONLY:
            rows.append(row("loss only, threshold", seed, with_threshold(outputs, trainer), seconds))
    return rows


def table(rows: Sequence[Row], bound: float) -> str:
    lines = []
    for method in dict.fromkeys(row.method for row in rows):
        mine = [row for row in rows if row.method == method]
        held = {split: sum(row.precision[split] >= bound for row in mine) for split in MEASURED}
        lines.append(
            [
                method,
                *(f"{held[split]} of {len(mine)}" for split in MEASURED),
                *(_estimate([row.precision[split] for row in mine]) for split in MEASURED),
                *(_estimate([row.recall[split] for row in mine]) for split in MEASURED),
                f"{np.mean([row.seconds for row in mine]):.1f}",
            ]
        )
    columns = [f"{name}, {split}" for name in ("holds", "precision", "recall") for split in MEASURED]
    return markdown(["method", *columns, "seconds"], lines)


def _estimate(values: Sequence[float]) -> str:
    mean, error = mean_and_error(values)
    return f"{mean:.3f} ± {error:.3f}"


def text(rows: Sequence[Row], args: ConstraintsArguments) -> str:
    noise = float(np.mean([row.noise for row in rows]))
    return page(
        f"# Recall with precision of at least {args.bound:g}",
        "Written by `python -m benchmarks.constraints`; do not edit.",
        f"Bank marketing, MLP, {len(args.seeds)} seeds, ± standard error over them; {args.max_steps} steps. "
        '"Holds": in how many seeds precision reaches the bound. A recall counts only where it does. The threshold is '
        "a bias tuned on the observation split (of both: on selection too), for the same penalised metric. On the "
        "report split a precision has a standard error of about "
        f"{noise:.3f} by the choice of its rows alone. Seconds are processor time.",
        table(rows, args.bound),
    )


def main(argv: list[str] | None = None) -> int:
    (args,) = HfArgumentParser(ConstraintsArguments).parse_args_into_dataclasses(argv)
    if no_data():
        return 2
    quiet()
    if args.smoke:
        args.max_steps = min(args.max_steps, 2)
    with tempfile.TemporaryDirectory() as folder:
        rows = [row for seed in tqdm(args.seeds, desc="seeds") for row in rows_of(seed, args, folder)]
    written = text(rows, args)
    print(written)
    if not args.smoke:
        Path(args.page).write_text(written, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
