"""What a task of the benchmark is: four disjoint splits, a small model, a metric."""

from __future__ import annotations

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

SPLITS = ("train", "observation", "selection", "report")


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

    @property
    def digest(self) -> str:
        """A short hash of which examples these are."""
        return hashlib.sha256(self.pool.encode() + self.rows.astype("<i8").tobytes()).hexdigest()[:16]


@dataclass(frozen=True)
class Problem:
    """A task with a seed, ready to train.

    Attributes:
        model: eval mode; takes an item's columns, `labels` optional; gives {"loss" (if labels), "logits"}. Methods get
            deep copies. Its default FiLM is phi.
        eval_batch: examples in a batch where the metric is looked at: as many as are quickest.
    """

    model: nn.Module
    train: Rows
    observation: Rows
    selection: Rows
    report: Rows
    eval_batch: int = 500

    def splits(self) -> dict[str, Rows]:
        return {name: getattr(self, name) for name in SPLITS}


@dataclass(frozen=True)
class Task:
    """What is tuned, and for which metric.

    Attributes:
        metric: of logits and labels.
        headline: whether it is one of those that the claims are made for.
        labels: "classes", "binary" (two classes; these two can be tuned post hoc) or "numbers".
        prepare: seed -> problem.
        note: what a reader has to know.
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

    @property
    def sign(self) -> int:
        """By which scores are multiplied so that greater is better."""
        return 1 if self.greater_is_better else -1


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
