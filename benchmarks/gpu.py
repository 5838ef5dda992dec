"""All that a GPU alone can tell, in one command of some minutes: its tests, and what MetricOpt costs on it.

    python -m benchmarks.gpu                 (make bench ARGS=gpu), writes docs/results/gpu.md

Runs `pytest -m gpu`, and on timm models of random weights a linearisation of an observation set and a run of MetricOpt,
against as many training steps by the loss; prints each row as it is measured, and makes one table of them. What could
not be run, all of it where there is no GPU, stands there by its name.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import numpy as np
import timm
import torch
import transformers
from tabulate import tabulate
from torch import nn
from transformers import EvalPrediction, HfArgumentParser

from metricopt_hf import MetricOptConfig, MetricOptTrainer

from .pages import page
from .problem import Rows

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "results" / "gpu.md"
SIZE, CLASSES = 224, 10  # of images
NO_GPU = "there is no GPU here that torch can use"


@dataclass
class GpuArguments:
    """How much to measure."""

    models: list[str] = field(
        default_factory=lambda: ["vit_base_patch16_224", "resnet50", "vit_small_patch16_224"],
        metadata={"help": "timm models."},
    )
    steps: int = field(default=10, metadata={"help": "Of either run."})
    rows: int = field(default=2000, metadata={"help": "Images in the observation set, and in the selection set."})
    batch_size: int = field(default=64, metadata={"help": "Of training and of passes."})
    tests: bool = field(default=True, metadata={"help": "Whether to run the tests that need a GPU."})
    page: str = field(default=str(PAGE), metadata={"help": "Where the table is written to."})


class WithLoss(nn.Module):
    """A timm model as Trainer wants it."""

    def __init__(self, name: str):
        super().__init__()
        self.model = timm.create_model(name, num_classes=CLASSES)

    def forward(self, pixel_values, labels):
        logits = self.model(pixel_values)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def noise(count: int) -> Rows:
    """Random images and classes."""
    columns = {"pixel_values": torch.randn(count, 3, SIZE, SIZE), "labels": torch.randint(CLASSES, (count,))}
    return Rows(columns, np.arange(count), "noise")


def accuracy(prediction: EvalPrediction) -> float:
    return float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())


def trainer_of(name: str, args: GpuArguments, metric: bool, data: Rows, folder: str) -> MetricOptTrainer:
    """Of a run that follows the accuracy, or, without a metric, its loss."""
    torch.manual_seed(0)
    config = MetricOptConfig(
        folder,
        max_steps=args.steps,
        metric_steps=args.steps,
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=args.batch_size,
        greater_is_better=True if metric else None,
        bf16=True,
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    given = {"metric": accuracy, "observation_dataset": data, "selection_dataset": data} if metric else {}
    trainer = MetricOptTrainer(WithLoss(name), config, train_dataset=data, **given)
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def seconds_of(run: Callable[[], Any]) -> float:
    torch.cuda.synchronize()
    start = perf_counter()
    run()
    torch.cuda.synchronize()
    return perf_counter() - start


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


def run_rows(name: str, args: GpuArguments, data: Rows) -> list[list[str]]:
    """What a model's runs took."""
    with TemporaryDirectory() as folder:
        by_loss = seconds_of(trainer_of(name, args, False, data, folder).train)
        guided = trainer_of(name, args, True, data, folder)
        seconds = seconds_of(guided.train)
    spent, basis, made = guided.ledger, guided.result.coordinates.basis, guided.phase.linearizer
    told = f"{seconds:.1f} s, {sum(spent.passes.values())} passes, {sum(spent.calls.values())} calls"
    prediction = made.evaluator.predictions()
    cost, once = made.cost(prediction, basis.shape[1]), seconds_of(partial(made.linearize, basis, prediction))
    epoch = by_loss / args.steps * len(data) / args.batch_size
    return [
        [f"a linearisation of {len(data):,} images, {cost}", name, f"{once:.2f} s", "yes"],
        [f"an epoch over as many by the loss, from {args.steps} steps", name, f"{epoch:.2f} s", "yes"],
        [f"a run of {args.steps} metric steps", name, told, "yes"],
        [f"{args.steps} steps of {args.batch_size} by the loss", name, f"{by_loss:.1f} s", "yes"],
    ]


def rows(args: GpuArguments) -> Iterator[list[str]]:
    """What was measured, as rows of the table, and what was not, with the reason."""
    there = torch.cuda.is_available()
    data = noise(args.rows) if there else None
    for name in args.models:
        try:
            if not there:
                raise RuntimeError(NO_GPU)
            yield from run_rows(name, args, data)
        except RuntimeError as error:  # such as a lack of memory
            told = f"not run: {str(error).splitlines()[0]}"
            yield [f"a linearisation, {args.steps} metric steps, and as many by the loss", name, told, "not run"]
    if args.tests:
        yield tests_row() if there else ["pytest -m gpu", "", f"not run: {NO_GPU}", "not run"]


def main(argv: list[str] | None = None) -> int:
    (args,) = HfArgumentParser(GpuArguments).parse_args_into_dataclasses(argv)
    transformers.logging.set_verbosity_error()
    start, table = perf_counter(), []
    for row in rows(args):
        table.append(row)
        print(*row, sep=" | ", flush=True)
    there = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if there else "No GPU was there, so every figure is missing"
    told = f"{device}; bf16, torch {torch.__version__}, {perf_counter() - start:.0f} s"
    headers = ["what", "model", "measured", "as hoped"]
    print(f"\n{told}\n\n{tabulate(table, headers, disable_numparse=True)}")
    written = page(
        "# On a GPU",
        "Written by `python -m benchmarks.gpu`; do not edit.",
        f"{told} in all. {args.rows} images each to observe and to select on, random weights and images of "
        f"{SIZE} x {SIZE}; seconds of the wall clock, loading of the data included.",
        tabulate(table, headers, tablefmt="github", disable_numparse=True),
    )
    Path(args.page).write_text(written, encoding="utf-8")
    return 0 if all(row[-1].startswith("yes") for row in table) else 1


if __name__ == "__main__":
    sys.exit(main())
