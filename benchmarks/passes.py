"""What a pass over the observation set costs behind a frozen prefix, against `trainer.evaluate()` on the same rows.

    python -m benchmarks.passes              (make bench ARGS=passes)
    python -m benchmarks.passes --device cuda --models ViT-B/16 --rows 2000 --batch_size 250

Random weights, random data, nothing to fetch. A pass is `Evaluator.predictions`, with a metric that costs nothing, at
another phi each time, with what `evaluate_many` does with several points beside as many passes. All are timed in turn,
and the figures are the medians of the ratios.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter, process_time

import torch
import transformers
from tabulate import tabulate
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, HfArgumentParser

from metricopt_hf import Ledger, Metric, MetricOptConfig, MetricOptTrainer
from metricopt_hf.evaluation.data import InOrder
from metricopt_hf.evaluation.evaluator import BatchOutput, Evaluator

from . import overhead

CACHE_BYTES = 2e9  # as the trainer has it


@dataclass
class PassArguments:
    """What to measure."""

    device: str = field(default="cpu", metadata={"help": "cpu or cuda."})
    models: list[str] = field(default_factory=lambda: ["small ViT", "ResNet-20", "BERT"])
    rows: int = field(default=512, metadata={"help": "Examples in the set."})
    batch_size: int = field(default=128, metadata={"help": "Of passes and of evaluate()."})
    points: int = field(default=8, metadata={"help": "Points at which is predicted, one by one and by evaluate_many."})
    repeats: int = field(default=5, metadata={"help": "Passes and evaluations, in turn."})
    processor_time: bool = field(
        default=False, metadata={"help": "Count seconds of processor time, where other work shares the machine."}
    )


class Texts(torch.utils.data.Dataset):
    """Random token ids."""

    def __init__(self, rows: int, length: int = 32):
        self.ids, self.labels = torch.randint(5, 1000, (rows, length)), torch.randint(3, (rows,))

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[i], "attention_mask": torch.ones_like(self.ids[i]), "labels": self.labels[i]}


def bert() -> nn.Module:
    """Twelve narrow layers."""
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=1000,
            hidden_size=128,
            num_hidden_layers=12,
            num_attention_heads=4,
            intermediate_size=512,
            num_labels=3,
        )
    )


def model_and_data(name: str, rows: int) -> tuple[nn.Module, torch.utils.data.Dataset]:
    if name == "BERT":
        return bert(), Texts(rows)
    make, _, size = overhead.MODELS[name]
    return make(), overhead.noise(rows, size)


def trainer_of(name: str, args: PassArguments, folder: str) -> MetricOptTrainer:
    torch.manual_seed(0)
    model, data = model_and_data(name, args.rows)
    on_cpu = args.device == "cpu"
    config = MetricOptConfig(
        folder,
        per_device_eval_batch_size=args.batch_size,
        use_cpu=on_cpu,
        bf16=not on_cpu,
        bf16_full_eval=not on_cpu,
        greater_is_better=True,
        max_steps=2,
        report_to=[],
        disable_tqdm=True,
    )
    return MetricOptTrainer(
        model,
        config,
        train_dataset=data,
        eval_dataset=data,
        observation_dataset=data,
        selection_dataset=data,
        metric=lambda prediction: 0.5,
        compute_metrics=lambda prediction: {"metric": 0.5},
    )


def evaluator_of(trainer: MetricOptTrainer) -> Evaluator:
    """Of the trainer's observation set, as the metric phase has one."""

    def predict(batch) -> BatchOutput:
        _, logits, labels = trainer.prediction_step(trainer.model, batch, False)
        return BatchOutput(logits, labels)

    batches = InOrder(trainer.observation_dataset, trainer.args.eval_batch_size, trainer.data_collator)
    metric = Metric(lambda prediction: 0.5, "none", True)
    return Evaluator(trainer.phi, predict, batches, metric, Ledger(), CACHE_BYTES)


def seconds_of(work: Callable[[], object], args: PassArguments) -> float:
    now = process_time if args.processor_time else perf_counter
    if args.device != "cpu":
        torch.cuda.synchronize()
    start = now()
    work()
    if args.device != "cpu":
        torch.cuda.synchronize()
    return now() - start


@dataclass(frozen=True)
class Measured:
    """Seconds, and the median of the ratios of what was timed in turn.

    Attributes:
        evaluate, one_pass: of `trainer.evaluate()`, and of a pass behind the kept prefix.
        ratio: of the latter to the former.
        one_by_one, together: of all points, a pass each, and several in a pass.
        together_ratio: of the latter to the former.
    """

    evaluate: float
    one_pass: float
    ratio: float
    one_by_one: float
    together: float
    together_ratio: float


def measure(name: str, args: PassArguments) -> Measured:
    """All of it for one model."""
    with TemporaryDirectory() as folder:
        trainer = trainer_of(name, args, folder)
        trainer.settle()
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.evaluate()  # brings the model where it belongs
        phi = trainer.phi
        start = phi.read()
        evaluator = evaluator_of(trainer)

        def other() -> torch.Tensor:
            return start + 0.01 * torch.randn(phi.dim).to(start)

        @contextmanager
        def moved() -> Iterator[None]:
            with phi.restored():
                phi.write(other())
                yield

        evaluator.freeze(moved)
        evaluator.predictions()  # what is kept is found, and kept
        points = torch.stack([other() for _ in range(args.points)])

        def one_by_one() -> None:
            for point in points:
                phi.write(point)
                evaluator.predictions()

        evaluator.predict_many(points)  # whether several at once are quicker is tried here
        seconds: dict[str, list[float]] = {"evaluate": [], "pass": [], "one by one": [], "together": []}
        for _ in range(args.repeats):
            phi.write(other())
            seconds["pass"].append(seconds_of(evaluator.predictions, args))
            seconds["evaluate"].append(seconds_of(trainer.evaluate, args))
            seconds["one by one"].append(seconds_of(one_by_one, args))
            seconds["together"].append(seconds_of(lambda: evaluator.predict_many(points), args))

        def ratio(first: str, second: str) -> float:
            return median(a / b for a, b in zip(seconds[first], seconds[second], strict=True))

        return Measured(
            median(seconds["evaluate"]),
            median(seconds["pass"]),
            ratio("pass", "evaluate"),
            median(seconds["one by one"]),
            median(seconds["together"]),
            ratio("together", "one by one"),
        )


def row(name: str, args: PassArguments) -> list[str]:
    """The table's row of a model."""
    found = measure(name, args)
    return [
        name,
        f"{args.rows:,}",
        f"{found.evaluate:.3f}",
        f"{found.one_pass:.3f}",
        f"1/{1 / found.ratio:.1f}",
        f"{found.one_by_one:.2f}",
        f"{found.together:.2f}",
        f"{found.together_ratio:.2f}",
    ]


HEADERS = ["model", "rows", "evaluate(), s", "pass, s", "ratio", "points one by one, s", "evaluate_many, s", "ratio"]


def main(argv: list[str] | None = None) -> int:
    (args,) = HfArgumentParser(PassArguments).parse_args_into_dataclasses(argv)
    transformers.logging.set_verbosity_error()
    rows = [row(name, args) for name in args.models]
    kind = "processor time" if args.processor_time else "wall-clock time"
    print(f"\nA pass at another phi on {args.device}, {kind}, median of {args.repeats}\n")
    print(tabulate(rows, HEADERS, disable_numparse=True))
    return 0


if __name__ == "__main__":
    sys.exit(main())
