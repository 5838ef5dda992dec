"""What a task of the benchmark is: four disjoint splits, a small model, a metric."""

from __future__ import annotations

import copy
import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import EvalPrediction

from examples.comparison.splits import Splits
from metricopt_hf import FiLM, PhiSpace

METRIC_ONLY = ("group", "amount", "treatment")  # columns that the metric alone reads; train has none of them
LABELS = ("labels", *METRIC_ONLY)  # what a metric is given, in this order

# What a metric asks for, stated before a task is run
KINDS = {
    "beyond threshold": "Loss and metric disagree about more than where to decide: a bias per logit leaves most of it.",
    "threshold": "Loss and metric disagree about where to decide: the metric's optimum is a bias per logit.",
    "no conflict": "What is best for the loss is about best for the metric.",
}


@dataclass(frozen=True)
class Sizes:
    """Examples: of the pools (None: all there are), to train on (of CIFAR's pool), and to observe on.

    As many as to observe on are selected on.
    """

    train_pool: int | None
    train: int | None
    test_pool: int | None
    observation: int


class Rows(torch.utils.data.Dataset):
    """Some rows of columns that are held once: items are dicts of tensors.

    Args:
        columns: name -> [n, ...], of the whole pool.
        rows: [m] which of them.
        pool: name of the pool, such as "cifar10 test".
    """

    def __init__(self, columns: dict[str, Tensor], rows: np.ndarray, pool: str):
        self.columns, self.rows, self.pool = columns, np.asarray(rows), pool

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {name: column[self.rows[i]] for name, column in self.columns.items()}

    def batches(self, size: int | None = None) -> Iterator[dict[str, Tensor]]:
        """In order, `size` items at a time (None: all at once)."""
        for rows in torch.as_tensor(self.rows).split(size or len(self)):
            yield {name: column[rows] for name, column in self.columns.items()}

    def prediction(self, logits: np.ndarray) -> EvalPrediction:
        """Logits [m, classes] of these rows, with what the metric is given beside them."""
        rows = torch.as_tensor(self.rows)
        labels = label_ids_of({name: self.columns[name][rows] for name in LABELS if name in self.columns})
        return EvalPrediction(logits, tuple(x.numpy() for x in labels) if isinstance(labels, tuple) else labels.numpy())

    def with_column(self, name: str, values: Tensor) -> Rows:
        """values: [n], of the whole pool."""
        return Rows({**self.columns, name: values}, self.rows, self.pool)

    def as_training(self) -> Rows:
        """These rows without the columns that the metric alone reads."""
        columns = {name: values for name, values in self.columns.items() if name not in METRIC_ONLY}
        return Rows(columns, self.rows, self.pool)

    @property
    def digest(self) -> str:
        """A short hash of which examples these are."""
        return hashlib.sha256(self.pool.encode() + self.rows.astype("<i8").tobytes()).hexdigest()[:16]


@dataclass
class Problem(Splits):
    """A task with a seed, ready to train: four data sets of `Rows`, train without `METRIC_ONLY`, and a model.

    Attributes:
        model: eval mode; takes an item's columns, "labels" optional, and need not take those of `METRIC_ONLY`; gives
            {"loss" (if labels), "logits"}. Methods get deep copies.
        eval_batch: examples in a batch where the metric is looked at: as many as are quickest.
        phi: what moves, on a copy of the model.
    """

    model: nn.Module
    eval_batch: int = 500
    phi: Callable[[nn.Module], PhiSpace] = FiLM

    @property
    def label_names(self) -> list[str]:
        """Those of `LABELS` that the metric is given; of more than one its `label_ids` are a tuple."""
        return [name for name in LABELS if name in self.observation.columns]

    def start(self) -> Tensor:
        """[d]: phi of the pretrained model."""
        return self.phi(copy.deepcopy(self.model)).read()

    def outputs(self, phi: Tensor) -> dict[str, EvalPrediction]:
        """What the model says at phi, [d], by split that is measured."""
        model = copy.deepcopy(self.model)
        self.phi(model).write(phi)
        return {name: self.predict(model, rows) for name, rows in self.measured.items()}

    @torch.no_grad()
    def predict(self, model: nn.Module, rows: Rows) -> EvalPrediction:
        """What `model`, in eval mode, says of `rows`."""
        logits = [model(**inputs_of(batch))["logits"] for batch in rows.batches(self.eval_batch)]
        return rows.prediction(torch.cat(logits).numpy())


def inputs_of(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """A batch without what is the metric's."""
    return {name: column for name, column in batch.items() if name not in LABELS}


def label_ids_of(batch: dict[str, Tensor]) -> Tensor | tuple[Tensor, ...]:
    """Labels, or labels and the metric's other columns, as Trainer hands them to a metric."""
    found = tuple(batch[name] for name in LABELS if name in batch)
    return found if len(found) > 1 else found[0]


def take(prediction: EvalPrediction, rows: np.ndarray) -> EvalPrediction:
    """Some examples of a prediction, each as often as it stands in `rows`."""
    labels = prediction.label_ids
    labels = tuple(x[rows] for x in labels) if isinstance(labels, tuple) else labels[rows]
    return EvalPrediction(prediction.predictions[rows], labels)


def joined(*predictions: EvalPrediction) -> EvalPrediction:
    """All examples of some predictions, one after the other."""
    labels = [p.label_ids for p in predictions]
    tuples = isinstance(labels[0], tuple)
    labels = tuple(map(np.concatenate, zip(*labels, strict=True))) if tuples else np.concatenate(labels)
    return EvalPrediction(np.concatenate([p.predictions for p in predictions]), labels)


@dataclass(frozen=True)
class Task:
    """What is tuned, and for which metric.

    Attributes:
        metric: of logits and labels, and of the `METRIC_ONLY` columns that the task has.
        headline: whether it is one of those that the claims are made for.
        labels: "classes", "binary" (two classes; these two can be tuned post hoc) or "numbers".
        prepare: seed -> problem.
        note: what a reader has to know.
        kind: of `KINDS`: what the metric asks for. Stated before the task is run.
        why: one sentence, why it is of that kind.
        groups: whose accuracies the metric compares: "group", "label and group" (each label in each group), or none.
        pixels: where the data sets of CIFAR hold activations: gives the images of the pool that is measured on,
            [n, 3, 32, 32] normalised, in the pool's order.
    """

    name: str
    title: str
    metric: Callable[[EvalPrediction], float]
    metric_name: str
    greater_is_better: bool
    headline: bool
    labels: str
    prepare: Callable[[int], Problem]
    note: str = ""
    kind: str = ""
    why: str = ""
    groups: str = ""
    pixels: Callable[[], Tensor] | None = None

    @property
    def decides(self) -> bool:
        """Whether the model decides for classes, so that a bias per logit can be tuned."""
        return self.labels in ("classes", "binary")

    @property
    def sign(self) -> int:
        """By which scores are multiplied so that greater is better."""
        return 1 if self.greater_is_better else -1


def data_root() -> Path:
    """Where the data sets lie: $METRICOPT_DATA, or `../shared/data` beside the project."""
    return Path(os.environ.get("METRICOPT_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))


def no_data() -> bool:
    """Whether they are not there, which is said."""
    if missing := not data_root().exists():
        print(f"The data are not here: {data_root()} (set METRICOPT_DATA to the folder that holds cifar10).")
    return missing


def cached(name: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """What `make` gives, from a file where it was made before: in $METRICOPT_CACHE, by default `out/`."""
    root = Path(os.environ.get("METRICOPT_CACHE", Path(__file__).resolve().parents[1] / "out"))
    file = root / f"{name}.safetensors"
    if not file.exists():
        tensors = make()
        file.parent.mkdir(parents=True, exist_ok=True)
        made = file.with_suffix(f".{os.getpid()}")
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, made)
        os.replace(made, file)  # a process beside this one reads all of it or nothing
    return load_file(file)
