"""Rows of predictions: how many there are, and some of them, for every form of predictions that Trainer makes.

Joined, predictions are arrays, or tuples and dicts of them, with a row per example. Not joined
(`eval_do_concat_batches=False`) they are lists with such a thing per batch, in which labels may be a list of one dict
per example, as of object detection. A tuple holds several columns; a list that is as long as there are rows holds one
entry per row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from transformers import EvalPrediction

FIELDS = ("predictions", "label_ids", "inputs", "losses")


class Indivisible(Exception):
    """An array holds something else than a row per example, such as joined tokens: a part of it makes no sense."""


class SizedPrediction(EvalPrediction):
    """Predictions that know how many examples they are of, which their arrays need not show.

    Args:
        sizes: examples of each batch; of joined batches, of all of them together. None: they are not known.
    """

    def __init__(self, predictions: Any, label_ids: Any, inputs: Any = None, losses: Any = None, sizes: Sequence[int] | None = None):
        super().__init__(predictions, label_ids, inputs=inputs, losses=losses)
        self.sizes = sizes


def remade(prediction: EvalPrediction, fields: Mapping[str, Any], sizes: Sequence[int] | None = None) -> EvalPrediction:
    """The same with other `FIELDS`; `sizes`: other ones, where the rows are others."""
    return SizedPrediction(**fields, sizes=sizes or getattr(prediction, "sizes", None))


def num_rows(prediction: EvalPrediction, concat: bool = True) -> int:
    """How many examples `prediction` is of.

    Args:
        concat: whether batches are joined.
    """
    return sum(_batch_sizes(prediction, concat))


def divisible(prediction: EvalPrediction, concat: bool = True) -> bool:
    """Whether every array has a row per example, so that some of the rows can be taken."""
    try:
        take_rows(prediction, np.arange(1), concat)
    except Indivisible:
        return False
    return True


def take_rows(prediction: EvalPrediction, rows: np.ndarray, concat: bool = True) -> EvalPrediction:
    """Predictions and labels of some of the examples; the original is left as it is.

    Args:
        rows: [n] which ones, in increasing order.
        concat: whether batches are joined.

    Raises:
        Indivisible: an array does not have a row per example.
    """
    values = {name: getattr(prediction, name) for name in FIELDS}
    sizes = _batch_sizes(prediction, concat)
    if concat:
        picked = {name: None if value is None else _pick(value, rows, sizes[0]) for name, value in values.items()}
        return remade(prediction, picked, [len(rows)])
    starts = np.concatenate([[0], np.cumsum(sizes)])
    parts = [rows[(rows >= start) & (rows < end)] - start for start, end in zip(starts, starts[1:], strict=False)]
    kept = [i for i, part in enumerate(parts) if len(part)]  # a batch without a row is no batch
    picked = {
        name: None if value is None else [_pick(value[i], parts[i], sizes[i]) for i in kept]
        for name, value in values.items()
    }
    return remade(prediction, picked, [len(parts[i]) for i in kept])


def _batch_sizes(prediction: EvalPrediction, concat: bool) -> Sequence[int]:
    if (sizes := getattr(prediction, "sizes", None)) is not None:
        return sizes
    batches = [prediction.predictions] if concat else prediction.predictions
    return [_first_length(batch) or 0 for batch in batches]


def _first_length(tree: Any) -> int | None:
    """Length of the first array with rows in nested tuples, lists and dicts; None where there is none."""
    if isinstance(tree, Mapping):
        tree = list(tree.values())
    if isinstance(tree, (list, tuple)):
        return next((length for part in tree if (length := _first_length(part)) is not None), None)
    return len(tree) if np.ndim(tree) else None


def _pick(tree: Any, rows: np.ndarray, size: int) -> Any:
    if isinstance(tree, np.ndarray) and tree.ndim:
        if len(tree) != size:
            raise Indivisible(f"an array of {len(tree)} is of {size} examples")
        return tree[rows]
    if isinstance(tree, Mapping):
        return {key: _pick(value, rows, size) for key, value in tree.items()}
    if isinstance(tree, list) and len(tree) == size:
        if not all(isinstance(x, np.ndarray) and x.ndim and len(x) == size for x in tree):  # else columns
            return [tree[i] for i in rows]
    if isinstance(tree, (list, tuple)):
        return type(tree)(_pick(value, rows, size) for value in tree)
    return tree
