"""Does guidance win back what rounding costs? Models whose weights are rounded behind their training.

    python -m benchmarks.rounding            (make bench ARGS=rounding)
    python -m benchmarks.rounding --models ResNet-20 --bits 3 --seeds 0 1 2 3 4
    python -m benchmarks.rounding --smoke

The black box is a `ModelMetric`: it gets the model, rounds the weights of its convolutions and linear layers to `bits`
bits by output channel, and answers the metric on the data set. Norms and biases, which are what phi is, are not
rounded. Beside guidance stand the loss alone (of the model as it is), and the loss through straight-through rounding,
which needs to know what the black box does: the weights are rounded in the forward pass. A bias per logit is tuned on
top of each. As all in front of the last block stands still, its activations are computed once for the model as it is,
and once for the rounded one.
"""

from __future__ import annotations

import copy
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from time import process_time

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import EvalPrediction, HfArgumentParser

from examples.comparison.report import MethodRun, comparison_table, table_note
from examples.comparison.splits import MEASURED, Splits
from examples.comparison.study import Start
from metricopt_hf import ConfigurationError, Ledger, Metric, MetricOptConfig, ModelMetric
from metricopt_hf.posthoc import add_bias, tune_bias

from . import cifar, scores, text_tasks
from .bench_report import ROOT
from .pages import page
from .problem import Rows, Sizes, cached, inputs_of, no_data
from .run import quiet
from .training import SILENT

PAGE = ROOT / "docs" / "results" / "rounding.md"
SIZES, SMOKE = Sizes(10_000, 3_000, None, 1_000), Sizes(120, 80, 200, 60)
POOL_TRAINED = 6_000  # images of the train pool whose activations are computed in rounded form too
BATCH = 250
START, LOSS_ONLY = "as it is", "loss only"
# title -> (whether the loss sees rounded weights, changes)
METHODS: dict[str, tuple[bool, Mapping]] = {
    LOSS_ONLY: (False, {"follows_metric": False}),
    "loss through rounding": (True, {"follows_metric": False}),
    "control: shuffled": (False, {"guide": "shuffled"}),
    "MetricOpt": (False, {}),
}
WITH_BIAS = " + bias"
ROUNDED = nn.Conv2d, nn.Linear


@dataclass
class RoundingArguments:
    """What to run."""

    models: list[str] = field(
        default_factory=lambda: ["ResNet-20", "MiniLM"], metadata={"help": "Of ResNet-20 (CIFAR-10), MiniLM (CoLA)."}
    )
    bits: int = field(default=4, metadata={"help": "Of each rounded weight."})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "Seeds to run, two or more."})
    max_steps: int = field(default=10, metadata={"help": "Optimizer steps of every method."})
    metric_calls: int = field(default=80, metadata={"help": "Of a guided run, to observe."})
    page: str = field(default=str(PAGE), metadata={"help": "The page to write."})
    smoke: bool = field(
        default=False, metadata={"help": "A few examples and steps; the page is printed, nothing is kept."}
    )


@torch.no_grad()
def rounded(model: nn.Module, bits: int) -> nn.Module:
    """`model`, with the weights of its convolutions and linear layers on 2^bits - 1 equally spaced levels.

    The levels are symmetric about zero, and go up to the largest weight of each output channel.
    """
    levels = 2 ** (bits - 1) - 1
    for module in model.modules():
        if isinstance(module, ROUNDED):
            rows = module.weight.flatten(1)
            step = rows.abs().amax(1, keepdim=True).clamp_min(1e-12) / levels
            module.weight.copy_(((rows / step).round() * step).view_as(module.weight))
    return model


@torch.no_grad()
def logits_of(model: nn.Module, rows: Rows) -> np.ndarray:
    return torch.cat([model(**inputs_of(batch))["logits"] for batch in rows.batches(BATCH)]).numpy()


def accuracy(prediction: EvalPrediction) -> float:
    return float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())


# whether rounded -> split -> the same rows
Cut = dict[bool, dict[str, Rows]]


@dataclass(frozen=True)
class Case:
    """A model with its data.

    Attributes:
        title: as it stands on the page.
        net: as it is.
        cut: seed -> four disjoint splits, of activations of the model as it is and of the rounded one.
        metric: of predictions, with its name.
    """

    title: str
    net: nn.Module
    cut: Callable[[int], Cut]
    metric: Callable[[EvalPrediction], float]
    name: str


def resnet(bits: int, smoke: bool) -> Case:
    sizes = SMOKE if smoke else SIZES
    net, train, test = cifar.pool(20, sizes)
    trained = min(POOL_TRAINED, sizes.train_pool)

    def make() -> dict[str, Tensor]:
        trunk = rounded(copy.deepcopy(net), bits)
        splits = {"train": f"train[:{trained}]", "test": f"test[:{sizes.test_pool or ''}]"}
        return {name: cifar.activations(trunk, cifar.load(split)).pixel_values for name, split in splits.items()}

    made = cached(f"cifar/resnet20-{bits}bit-{trained}-{sizes.test_pool}", make)
    plain = {"train": {name: column[:trained] for name, column in train.items()}, "test": test}
    pools = {
        False: plain,
        True: {name: {**columns, "pixel_values": made[name]} for name, columns in plain.items()},
    }

    def cut(seed: int) -> Cut:
        generator = np.random.default_rng(seed)
        rows = generator.permutation(trained)[: sizes.train]
        order = generator.permutation(len(test["labels"]))
        parts = np.split(order, [sizes.observation, 2 * sizes.observation])
        return {
            form: {
                "train": Rows(pool["train"], rows, "cifar10 train"),
                **{name: Rows(pool["test"], r, "cifar10 test") for name, r in zip(MEASURED, parts, strict=True)},
            }
            for form, pool in pools.items()
        }

    return Case(f"CIFAR-10 (JPEG), ResNet-20, {sizes.train:,} images", net, cut, accuracy, "accuracy")


def minilm(bits: int, smoke: bool) -> Case:
    text = text_tasks.smaller(text_tasks.COLA_POOL) if smoke else text_tasks.COLA_POOL
    block, made = text_tasks.make_start(text, (f"{bits}bit", partial(rounded, bits=bits)))
    columns = {
        form: {"hidden": made[name], "labels": made["labels"]}
        for form, name in ((False, "hidden"), (True, "hidden_changed"))
    }

    def cut(seed: int) -> Cut:
        parts = dict(zip(("train", *MEASURED), text_tasks.cut(text, made["part"], seed), strict=True))
        return {
            form: {name: Rows(of_form, rows, text.folder) for name, rows in parts.items()}
            for form, of_form in columns.items()
        }

    return Case(f"CoLA, MiniLM, {text.train_size:,} texts", block, cut, scores.mcc, "MCC")


MODELS = {"ResNet-20": resnet, "MiniLM": minilm}


def measured(
    case: Case, title: str, seed: int, model: nn.Module, splits: Cut, bits: int, ledger: Ledger, seconds: float
) -> list[MethodRun]:
    """The row of a model, and that of the same with a bias tuned on top; "float": not rounded, on the report split."""
    calls = {purpose: count for purpose, count in ledger.calls.items() if purpose != "check"}
    floating = EvalPrediction(logits_of(model, splits[False]["report"]), None)
    model = rounded(copy.deepcopy(model), bits)
    outputs = {name: rows.prediction(logits_of(model, rows)) for name, rows in splits[True].items() if name != "train"}
    floating.label_ids = outputs["report"].label_ids
    found = {name: case.metric(output) for name, output in outputs.items()}
    tuning = Ledger()
    bias = tune_bias(Metric(case.metric, case.name), outputs["observation"], tuning)
    tuned = {name: case.metric(add_bias(output, bias)) for name, output in outputs.items()}
    more = {**calls, "post-hoc": tuning.calls["post-hoc"]}
    return [
        MethodRun(title, seed, {"float": case.metric(floating), **found}, calls, seconds),
        MethodRun(title + WITH_BIAS, seed, {"float": case.metric(add_bias(floating, bias)), **tuned}, more, seconds),
    ]


def run(case: Case, title: str, seed: int, splits: Cut, args: RoundingArguments, folder: str) -> list[MethodRun]:
    through, numbers = METHODS[title]
    model = copy.deepcopy(case.net)

    def metric(model: nn.Module, rows: Rows) -> float:
        return case.metric(rows.prediction(logits_of(rounded(model, args.bits), rows)))

    config = MetricOptConfig(
        folder,
        max_steps=args.max_steps,
        lr_scheduler_type="constant",
        per_device_train_batch_size=64,
        metric_steps=args.max_steps,
        observe="scores",
        metric_call_budget=args.metric_calls,
        seed=seed,
        **SILENT,
    )
    data = Splits(splits[through]["train"], *(splits[True][name] for name in MEASURED))
    net_of_run = rounded(model, args.bits) if through else model
    begin = Start(net_of_run, config, data, {"metric": ModelMetric(metric, case.name, True)})
    trainer = begin.trainer(**numbers)
    trainer.remove_callback(transformers.PrinterCallback)
    begun = process_time()
    trainer.train()
    seconds = process_time() - begun
    trained = copy.deepcopy(case.net)  # with the weights as they are, and what was tuned
    tuned = trainer.model.state_dict()
    for name, module in trained.named_modules():
        if isinstance(module, ROUNDED):
            del tuned[f"{name}.weight"]
    trained.load_state_dict({**trained.state_dict(), **tuned})
    return measured(case, title, seed, trained.eval(), splits, args.bits, trainer.ledger, seconds)


def text(tables: Mapping[str, list[MethodRun]], args: RoundingArguments) -> str:
    columns = ("float", "observation", "selection", "report")
    parts = []
    for title, runs in tables.items():
        parts += [f"## {title}", comparison_table(runs, LOSS_ONLY, columns, tablefmt="github")]
    return page(
        f"# Behind rounding to {args.bits} bits",
        "Written by `python -m benchmarks.rounding`; do not edit.",
        f"Weights of convolutions and linear layers rounded to {args.bits} bits by output channel; {args.max_steps} "
        'steps. The metric of the rounded model; "float": of the same model without rounding, on the report split. '
        '"Loss through rounding" knows what the black box does to the model; "+ bias" has a bias per logit tuned on '
        "the observation split. Seconds are processor time.",
        *parts,
        table_note(len(args.seeds)),
    )


def main(argv: list[str] | None = None) -> int:
    (args,) = HfArgumentParser(RoundingArguments).parse_args_into_dataclasses(argv)
    if no_data():
        return 2
    quiet()
    if unknown := set(args.models) - set(MODELS):
        raise ConfigurationError(f"--models {sorted(unknown)[0]}: there are {', '.join(MODELS)}.")
    if args.smoke:
        args.max_steps, args.metric_calls = min(args.max_steps, 4), min(args.metric_calls, 8)
    tables: dict[str, list[MethodRun]] = {}
    for name in args.models:
        case, runs = MODELS[name](args.bits, args.smoke), []
        with tempfile.TemporaryDirectory() as folder, tqdm(total=len(args.seeds) * len(METHODS), desc=name) as bar:
            for seed in args.seeds:
                splits = case.cut(seed)
                runs += measured(case, START, seed, case.net, splits, args.bits, Ledger(), 0.0)
                for title in METHODS:
                    runs += run(case, title, seed, splits, args, folder)
                    bar.update()
        order = list(dict.fromkeys(run.method for run in runs))
        rows = len(splits[False]["observation"])
        title = f"{case.title}, {case.name} observed and selected on {rows:,} each"
        tables[title] = sorted(runs, key=lambda run: order.index(run.method))
    written = text(tables, args)
    print(written)
    if not args.smoke:
        Path(args.page).write_text(written, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
