"""The benchmark's tasks: a real data set, a pretrained model, and the metric that it is judged by.

`tasks()[name].prepare(seed)` gives four disjoint splits and a small model: whatever the net computes in front of phi's
first layer stands still in every method, so it is computed once, and is what the data sets hold.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from . import cifar, scores, tabular, text_tasks
from .problem import Problem, Rows, Task, cached


@dataclass(frozen=True)
class Sizes:
    """Examples: of the pools (None: all there are), to train on (of CIFAR's pool), and to observe on.

    As many as to observe on are selected on.
    """

    train_pool: int
    train: int
    test_pool: int | None
    observation: int


CIFAR, CIFAR_SMOKE = Sizes(10_000, 6_000, None, 2_000), Sizes(120, 80, 200, 60)
CIFAR_TUNING = replace(CIFAR, observation=800)  # a quicker problem to choose settings on
COLUMNS = ("pixel_values", "labels")
TABULAR, TABULAR_SMOKE = Sizes(None, None, None, 2_000), Sizes(600, None, 200, 150)


@functools.cache
def _cifar_pool(depth: int, sizes: Sizes) -> tuple[nn.Module, dict[str, Tensor], dict[str, Tensor]]:
    net = cifar.pretrained(depth)

    def make() -> dict[str, Tensor]:
        splits = {"train": f"train[:{sizes.train_pool}]", "test": f"test[:{sizes.test_pool or ''}]"}
        images = {name: cifar.activations(net, cifar.load(split)) for name, split in splits.items()}
        return {f"{name}.{column}": getattr(i, column) for name, i in images.items() for column in COLUMNS}

    tensors = cached(f"cifar/resnet{depth}-{sizes.train_pool}-{sizes.test_pool}", make)
    return net, *({column: tensors[f"{name}.{column}"] for column in COLUMNS} for name in ("train", "test"))


def cifar_problem(depth: int, sizes: Sizes, seed: int) -> Problem:
    """The nets have seen the whole train split, so the splits that are measured on come from test."""
    net, train, test = _cifar_pool(depth, sizes)
    generator = np.random.default_rng(seed)
    chosen = generator.permutation(len(train["labels"]))[: sizes.train]
    order = generator.permutation(len(test["labels"]))
    parts = np.split(order, [sizes.observation, 2 * sizes.observation])
    measured = (Rows(test, rows, "cifar10 test") for rows in parts)
    return Problem(net, Rows(train, chosen, "cifar10 train"), *measured, eval_batch=100)


@functools.lru_cache(maxsize=1)
def tabular_problem(name: str, sizes: Sizes, flipped: float, seed: int) -> Problem:
    """Observation and selection are cut from the official train split, the report split is the official test split.

    Args:
        flipped: share of the positive training labels that is turned to negative, before the MLP is trained.
    """
    train, test = (
        {column: values[:: 1 if size is None else len(values) // size][:size] for column, values in split.items()}
        for split, size in zip(tabular.load(name), (sizes.train_pool, sizes.test_pool), strict=True)
    )
    generator = np.random.default_rng(seed)
    order = generator.permutation(len(train["labels"]))
    observed, selected, rest = np.split(order, [sizes.observation, 2 * sizes.observation])
    noisy = train["labels"].clone()
    positive = rest[train["labels"][torch.as_tensor(rest)].numpy() == 1]
    noisy[generator.permutation(positive)[: round(flipped * len(positive))]] = 0
    trained = Rows({**train, "labels": noisy}, rest, f"{name} train")
    return Problem(
        tabular.pretrain(next(trained.batches()), seed),
        trained,
        Rows(train, observed, f"{name} train"),
        Rows(train, selected, f"{name} train"),
        Rows(test, np.arange(len(test["labels"])), f"{name} test"),
        eval_batch=2000,
    )


BANK = ("bank_marketing", "Bank marketing (without duration), MLP")
FLIPPED = "a9a, 30 % of the positive training labels flipped, MLP"
CLEAN = "Labels of observation, selection and report are clean; those that the MLP was trained on are not."
OPAQUE = "The metric is another process (`benchmarks/opaque_cost.py`): asymmetric, with noise in every call."


def tasks(smoke: bool = False, image_sizes: Sizes = CIFAR) -> dict[str, Task]:
    """All tasks by name, the cheapest headline ones first; for a smoke run with a few examples each."""

    def images(name: str, depth: int, metric, metric_name: str, headline: bool, greater: bool = True) -> Task:
        prepare = functools.partial(cifar_problem, depth, CIFAR_SMOKE if smoke else image_sizes)
        return Task(name, f"CIFAR-10, ResNet-{depth}", metric, metric_name, greater, headline, "classes", prepare)

    def table(
        name: str, data: str, title: str, metric, metric_name: str, headline: bool, greater=True, flipped=0.0, note=""
    ) -> Task:
        prepare = functools.partial(tabular_problem, data, TABULAR_SMOKE if smoke else TABULAR, flipped)
        return Task(name, title, metric, metric_name, greater, headline, "binary", prepare, note)

    made = (
        table("a9a_gmean", "a9a", FLIPPED, scores.g_mean, "G-mean", True, flipped=0.3, note=CLEAN),
        table("bank_f1", *BANK, scores.f1, "F1", True),
        table("bank_cost", *BANK, scores.opaque_cost, "opaque cost", True, greater=False, note=OPAQUE),
        *text_tasks.tasks(smoke),
        images("cifar_worst", 20, scores.worst_class_recall, "worst-class recall", True),
        images("cifar_auprc", 20, scores.macro_auprc, "macro AUCPR", True),
        table("a9a_error", "a9a", "a9a, MLP", scores.misclassification, "misclassification", False, greater=False),
        table("bank_recall", *BANK, scores.recall_at_precision, "recall at precision >= 0.6", False),
        images("cifar_error", 20, scores.misclassification, "misclassification", False, greater=False),
        images("cifar32_worst", 32, scores.worst_class_recall, "worst-class recall", False),
    )
    return {task.name: task for task in made}
