"""Does guidance win back what rounding costs? A ResNet-20 whose weights are rounded behind its training.

    python -m benchmarks.rounding            (make bench-rounding)
    python -m benchmarks.rounding --bits 3 --seeds 0 1 2 3 4
    python -m benchmarks.rounding --smoke

The black box is a `ModelMetric`: it gets the model, rounds the weights of its convolutions and its linear layer to
`bits` bits by output channel, and answers the accuracy on the data set. Norms and biases, which are what phi is, are
not rounded. Beside guidance stand the loss alone (of the model as it is), and the loss through straight-through
rounding, which needs to know what the black box does: the weights are rounded in the forward pass. Both are selected by
the same number; a bias per logit is tuned on top of each. As all in front of the last block stands still, its
activations are computed once for the model as it is, and once for the rounded one.
"""

from __future__ import annotations

import copy
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from time import process_time

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import EvalPrediction, HfArgumentParser

from metricopt_hf import Ledger, Metric, MetricOptConfig, ModelMetric
from metricopt_hf.comparison.report import MethodRun, comparison_table, table_note
from metricopt_hf.comparison.splits import MEASURED, Splits
from metricopt_hf.comparison.study import Start
from metricopt_hf.posthoc import add_bias, tune_bias

from . import cifar
from .bench_report import ROOT
from .pages import page
from .problem import Rows, Sizes, cached, no_data
from .run import quiet
from .training import NO_GUIDE, SILENT

PAGE = ROOT / "docs" / "results" / "rounding.md"
SIZES, SMOKE = Sizes(10_000, 3_000, None, 1_000), Sizes(120, 80, 200, 60)
POOL_TRAINED = 6_000  # images of the train pool whose activations are computed in rounded form too
BATCH = 250
START, LOSS_ONLY = "as it is", "loss only"
# title -> (whether the loss sees rounded weights, changes)
METHODS: dict[str, tuple[bool, Mapping]] = {
    LOSS_ONLY: (False, NO_GUIDE),
    "loss through rounding": (True, NO_GUIDE),
    "control: shuffled": (False, {"guide": "shuffled"}),
    "MetricOpt": (False, {}),
    "MetricOpt, loss through rounding": (True, {}),
}
WITH_BIAS = " + bias"


@dataclass
class RoundingArguments:
    """What to run."""

    bits: int = field(default=4, metadata={"help": "Of each rounded weight."})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "Seeds to run, two or more."})
    max_steps: int = field(default=200, metadata={"help": "Optimizer steps of every method."})
    metric_calls: int = field(default=80, metadata={"help": "Of a guided run, to observe."})
    page: str = field(default=str(PAGE), metadata={"help": "The page to write."})
    smoke: bool = field(
        default=False, metadata={"help": "A few images and steps; the page is printed, nothing is kept."}
    )


@torch.no_grad()
def rounded(model: nn.Module, bits: int) -> nn.Module:
    """`model`, with the weights of its convolutions and linear layers on 2^bits - 1 equally spaced levels.

    The levels are symmetric about zero, and go up to the largest weight of each output channel.
    """
    levels = 2 ** (bits - 1) - 1
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            rows = module.weight.flatten(1)
            step = rows.abs().amax(1, keepdim=True).clamp_min(1e-12) / levels
            module.weight.copy_(((rows / step).round() * step).view_as(module.weight))
    return model


@torch.no_grad()
def logits_of(model: nn.Module, rows: Rows) -> np.ndarray:
    return torch.cat([model(batch["pixel_values"])["logits"] for batch in rows.batches(BATCH)]).numpy()


def accuracy(prediction: EvalPrediction) -> float:
    return float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())


def pools(bits: int, sizes: Sizes) -> dict[bool, dict[str, dict[str, Tensor]]]:
    """Whether rounded -> pool ("train", "test") -> columns, with activations as `pixel_values`."""
    net, train, test = cifar.pool(20, sizes)
    trained = min(POOL_TRAINED, sizes.train_pool)

    def make() -> dict[str, Tensor]:
        trunk = rounded(copy.deepcopy(net), bits)
        splits = {"train": f"train[:{trained}]", "test": f"test[:{sizes.test_pool or ''}]"}
        return {name: cifar.activations(trunk, cifar.load(split)).pixel_values for name, split in splits.items()}

    made = cached(f"cifar/resnet20-{bits}bit-{trained}-{sizes.test_pool}", make)
    plain = {"train": {name: column[:trained] for name, column in train.items()}, "test": test}
    return {
        False: plain,
        True: {name: {**columns, "pixel_values": made[name]} for name, columns in plain.items()},
    }


def cut(made: dict[bool, dict[str, dict[str, Tensor]]], sizes: Sizes, seed: int) -> dict[bool, dict[str, Rows]]:
    """Four disjoint splits, once of the model as it is and once rounded: the same rows."""
    generator = np.random.default_rng(seed)
    train = generator.permutation(len(made[False]["train"]["labels"]))[: sizes.train]
    order = generator.permutation(len(made[False]["test"]["labels"]))
    parts = np.split(order, [sizes.observation, 2 * sizes.observation])
    return {
        form: {
            "train": Rows(pool["train"], train, "cifar10 train"),
            **{
                name: Rows(pool["test"], rows, "cifar10 test")
                for name, rows in zip(("observation", "selection", "report"), parts, strict=True)
            },
        }
        for form, pool in made.items()
    }


def measured(
    title: str, seed: int, model: nn.Module, splits, bits: int, ledger: Ledger, seconds: float
) -> list[MethodRun]:
    """The row of a model, and that of the same with a bias tuned on top; "float": not rounded, on the report split."""
    calls = {purpose: count for purpose, count in ledger.calls.items() if purpose != "check"}
    floating = EvalPrediction(logits_of(model, splits[False]["report"]), None)
    model = rounded(copy.deepcopy(model), bits)
    outputs = {
        name: rows.prediction(logits_of(model, rows)) for name, rows in splits[True].items() if name != "train"
    }
    floating.label_ids = outputs["report"].label_ids
    scores = {name: accuracy(output) for name, output in outputs.items()}
    tuning = Ledger()
    bias = tune_bias(Metric(accuracy, "accuracy"), outputs["observation"], tuning)
    tuned = {name: accuracy(add_bias(output, bias)) for name, output in outputs.items()}
    more = {**calls, "post-hoc": tuning.calls["post-hoc"]}
    return [
        MethodRun(title, seed, {"float": accuracy(floating), **scores}, calls, seconds),
        MethodRun(title + WITH_BIAS, seed, {"float": accuracy(add_bias(floating, bias)), **tuned}, more, seconds),
    ]


def run(title: str, seed: int, net: nn.Module, splits, args: RoundingArguments, folder: str) -> list[MethodRun]:
    through, numbers = METHODS[title]
    model = copy.deepcopy(net)

    def metric(model: nn.Module, rows: Rows) -> float:
        return accuracy(rows.prediction(logits_of(rounded(model, args.bits), rows)))

    config = MetricOptConfig(
        folder,
        max_steps=args.max_steps,
        lr_scheduler_type="constant",
        per_device_train_batch_size=64,
        metric_start_ratio=0,
        observe="scores",
        metric_call_budget=args.metric_calls,
        value_weight=64.0,
        seed=seed,
        **SILENT,
    )
    data = Splits(splits[through]["train"], *(splits[True][name] for name in MEASURED))
    net_of_run, options = rounded(model, args.bits) if through else model, {"metric": ModelMetric(metric, "accuracy")}
    begin = Start(net_of_run, config, data, options)
    trainer = begin.trainer(**numbers)
    trainer.remove_callback(transformers.PrinterCallback)
    begun = process_time()
    trainer.train()
    seconds = process_time() - begun
    trained = copy.deepcopy(net)  # with the weights as they are, and what was tuned
    tuned = {name: value for name, value in trainer.model.state_dict().items() if "bn" in name or name.endswith("bias")}
    trained.load_state_dict({**trained.state_dict(), **tuned})
    return measured(title, seed, trained.eval(), splits, args.bits, trainer.ledger, seconds)


def text(runs: list[MethodRun], args: RoundingArguments, sizes: Sizes) -> str:
    columns = ("float", "observation", "selection", "report")
    return page(
        f"# Accuracy behind rounding to {args.bits} bits",
        "Written by `python -m benchmarks.rounding`; do not edit.",
        f"CIFAR-10 (JPEG), ResNet-20, weights of convolutions and linear layers rounded to {args.bits} bits by output "
        f"channel; {args.max_steps} steps on {sizes.train:,} images, observed and selected on {sizes.observation:,} "
        'each. Accuracy of the rounded model; "float": of the same model without rounding, on the report split. '
        '"Loss through rounding" knows what the black box does to the model; "+ bias" has a bias per logit tuned on '
        "the observation split. Seconds are processor time.",
        comparison_table(runs, LOSS_ONLY, columns, tablefmt="github"),
        table_note(len(args.seeds)),
    )


def main(argv: list[str] | None = None) -> int:
    (args,) = HfArgumentParser(RoundingArguments).parse_args_into_dataclasses(argv)
    if no_data():
        return 2
    quiet()
    sizes = SMOKE if args.smoke else SIZES
    if args.smoke:
        args.max_steps, args.metric_calls = min(args.max_steps, 4), min(args.metric_calls, 8)
    net, made = cifar.pretrained(20), pools(args.bits, sizes)
    runs: list[MethodRun] = []
    with tempfile.TemporaryDirectory() as folder, tqdm(total=len(args.seeds) * len(METHODS), desc="runs") as bar:
        for seed in args.seeds:
            splits = cut(made, sizes, seed)
            runs += measured(START, seed, net, splits, args.bits, Ledger(), 0.0)
            for title in METHODS:
                runs += run(title, seed, net, splits, args, folder)
                bar.update()
    order = list(dict.fromkeys(run.method for run in runs))
    written = text(sorted(runs, key=lambda run: order.index(run.method)), args, sizes)
    print(written)
    if not args.smoke:
        Path(args.page).write_text(written, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
