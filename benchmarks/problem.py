"""What a task of the benchmark is: four disjoint splits, a small model, a metric."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
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

    def batch(self, start: int, end: int) -> dict[str, Tensor]:
        rows = torch.as_tensor(self.rows[start:end])
        return {name: column[rows] for name, column in self.columns.items()}

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
    """

    model: nn.Module
    train: Rows
    observation: Rows
    selection: Rows
    report: Rows

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
