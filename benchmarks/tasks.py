"""The benchmark's tasks: a real data set, a pretrained model, and the metric that it is judged by.

`TASKS[name].prepare(seed)` gives four disjoint splits and a small model: whatever the net computes in front of phi's
first layer stands still in every method, so it is computed once, and is what the data sets hold.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor, nn

from . import cifar, scores, tabular, text_tasks
from .problem import Problem, Rows, Task

TRAIN_POOL, TRAIN = 10_000, 6_000
OBSERVATION = 2_000  # examples, and as many for selection


@functools.cache
def _cifar_pool(depth: int) -> tuple[nn.Module, dict[str, Tensor], dict[str, Tensor]]:
    net = cifar.pretrained(depth)
    columns = []
    for split in (f"train[:{TRAIN_POOL}]", "test"):
        images = cifar.activations(net, cifar.load(split))
        columns.append({"pixel_values": images.pixel_values, "labels": images.labels})
    return net, *columns


def cifar_problem(depth: int, seed: int) -> Problem:
    net, train, test = _cifar_pool(depth)
    generator = np.random.default_rng(seed)
    chosen = generator.permutation(TRAIN_POOL)[:TRAIN]
    parts = np.split(generator.permutation(len(test["labels"])), [OBSERVATION, 2 * OBSERVATION])
    return Problem(net, Rows(train, chosen, "cifar10 train"), *(Rows(test, rows, "cifar10 test") for rows in parts))


@functools.lru_cache(maxsize=1)
def tabular_problem(name: str, seed: int, flipped: float = 0.0) -> Problem:
    """Observation and selection are cut from the official train split, the report split is the official test split.

    Args:
        flipped: share of the positive training labels that is turned to negative, before the MLP is trained.
    """
    train, test = tabular.load(name)
    generator = np.random.default_rng(seed)
    observed, selected, rest = np.split(generator.permutation(len(train["labels"])), [OBSERVATION, 2 * OBSERVATION])
    noisy = train["labels"].clone()
    positive = rest[train["labels"][torch.as_tensor(rest)].numpy() == 1]
    noisy[generator.permutation(positive)[: round(flipped * len(positive))]] = 0
    trained = Rows({**train, "labels": noisy}, rest, f"{name} train")
    return Problem(
        tabular.pretrain(trained.batch(0, len(trained)), seed),
        trained,
        Rows(train, observed, f"{name} train"),
        Rows(train, selected, f"{name} train"),
        Rows(test, np.arange(len(test["labels"])), f"{name} test"),
    )


def _cifar(name: str, depth: int, metric, metric_name: str, headline: bool, greater: bool = True) -> Task:
    prepare = functools.partial(cifar_problem, depth)
    return Task(name, f"CIFAR-10, ResNet-{depth}", metric, metric_name, greater, headline, "classes", prepare)


def _tabular(
    name: str, data: str, title: str, metric, metric_name: str, headline: bool, greater=True, note="", **options
) -> Task:
    prepare = functools.partial(tabular_problem, data, **options)
    return Task(name, title, metric, metric_name, greater, headline, "binary", prepare, note)


BANK = "Bank marketing (without duration), MLP"
ALL = (
    _tabular(
        "a9a_gmean",
        "a9a",
        "a9a, 30 % of positive training labels flipped, MLP",
        scores.g_mean,
        "G-mean",
        True,
        note="The labels of observation, selection and report are clean; those that the MLP was trained on are not.",
        flipped=0.3,
    ),
    _tabular("bank_f1", "bank_marketing", BANK, scores.f1, "F1", True),
    _tabular(
        "bank_cost",
        "bank_marketing",
        BANK,
        scores.opaque_cost,
        "opaque cost",
        True,
        greater=False,
        note="The metric is another process (`benchmarks/opaque_cost.py`): asymmetric, and with noise in every call.",
    ),
    _cifar("cifar_worst", 20, scores.worst_class_recall, "worst-class recall", True),
    _cifar("cifar_auprc", 20, scores.macro_auprc, "macro AUCPR", True),
    *text_tasks.tasks(),
    _tabular("a9a_error", "a9a", "a9a, MLP", scores.misclassification, "misclassification", False, greater=False),
    _tabular("bank_recall", "bank_marketing", BANK, scores.recall_at_precision, "recall at precision >= 0.6", False),
    _cifar("cifar_error", 20, scores.misclassification, "misclassification", False, greater=False),
    _cifar("cifar32_worst", 32, scores.worst_class_recall, "worst-class recall", False),
)
TASKS = {task.name: task for task in ALL}
