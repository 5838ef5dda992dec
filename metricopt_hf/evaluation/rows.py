"""Rows of predictions: how many there are, and some of them, for every form of predictions that Trainer makes.

Joined, predictions are arrays, or tuples and dicts of them, with a row per example. Not joined
(`eval_do_concat_batches=False`) they are lists with such a thing per batch, in which labels may be a list of one dict
per example, as of object detection.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from transformers import EvalPrediction

FIELDS = ("predictions", "label_ids", "inputs", "losses")


def num_rows(prediction: EvalPrediction, concat: bool = True) -> int:
    """How many examples `prediction` is of.

    Args:
        concat: whether batches are joined.
    """
    return sum(_batch_sizes(prediction, concat))


def take_rows(prediction: EvalPrediction, rows: np.ndarray, concat: bool = True) -> EvalPrediction:
    """Predictions and labels of some of the examples; the original is left as it is.

    Args:
        rows: [n] which ones, in increasing order.
        concat: whether batches are joined.
    """
    values = {name: getattr(prediction, name) for name in FIELDS}
    if concat:
        size = num_rows(prediction)
        picked = {name: None if value is None else _pick(value, rows, size) for name, value in values.items()}
    else:
        sizes = _batch_sizes(prediction, concat)
        starts = np.concatenate([[0], np.cumsum(sizes)])
        parts = [rows[(rows >= start) & (rows < end)] - start for start, end in zip(starts, starts[1:], strict=False)]
        kept = [i for i, part in enumerate(parts) if len(part)]  # a batch without a row is no batch
        picked = {
            name: None if value is None else [_pick(value[i], parts[i], sizes[i]) for i in kept]
            for name, value in values.items()
        }
    return EvalPrediction(**picked)


def _batch_sizes(prediction: EvalPrediction, concat: bool) -> list[int]:
    batches = [prediction.predictions] if concat else prediction.predictions
    return [_size(batch) for batch in batches]


def _size(tree: Any) -> int:
    """Rows of the first array in nested tuples, lists and dicts."""
    if isinstance(tree, Mapping):
        tree = list(tree.values())
    return _size(tree[0]) if isinstance(tree, (list, tuple)) else len(tree)


def _pick(tree: Any, rows: np.ndarray, size: int) -> Any:
    if isinstance(tree, np.ndarray):
        return tree[rows] if tree.ndim and len(tree) == size else tree
    if isinstance(tree, Mapping):
        return {key: _pick(value, rows, size) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        per_row = len(tree) == size and not all(isinstance(x, np.ndarray) and len(x) == size for x in tree)
        if per_row:  # one entry per example, whatever it is
            return [tree[i] for i in rows]
        return type(tree)(_pick(value, rows, size) for value in tree)
    return tree
