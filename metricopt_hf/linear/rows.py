"""Rows of predictions: how many examples there are, and some of them, for every form of predictions that Trainer makes.

Joined, predictions are arrays, or tuples and dicts of them, with a row per example. Not joined
(`eval_do_concat_batches=False`) they are lists with such a thing per batch, in which labels may be a list of one dict
per example, as of object detection.

The maker of a batch knows its number of examples (`batch_sizes`). Without it, we count the rows of the first array.
These may be tokens, nodes or patches that a collator has joined; then rows are not examples, and half of the examples
cannot be taken (see `unsplittable`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from transformers import EvalPrediction

FIELDS = ("predictions", "label_ids", "inputs", "losses")


def num_rows(prediction: EvalPrediction, concat: bool = True, batch_sizes: Sequence[int] | None = None) -> int:
    """Number of examples in `prediction`.

    Args:
        concat: whether batches are joined.
        batch_sizes: examples in each batch; None: not known.
    """
    return sum(_sizes(prediction, concat, batch_sizes))


def unsplittable(
    prediction: EvalPrediction, concat: bool = True, batch_sizes: Sequence[int] | None = None
) -> str | None:
    """Why some of the examples cannot be taken, as the end of a sentence; None where they can.

    Each of `FIELDS` that is there must hold an array with a row, or a list with an entry, for each example.

    Example:
        >>> nodes = EvalPrediction(np.zeros((7, 2)), np.zeros(3))
        >>> print(unsplittable(nodes, batch_sizes=[2, 1]))
        it is unknown which rows are an example's: of 3 examples the predictions hold 7 rows
    """
    sizes = _sizes(prediction, concat, batch_sizes)
    fields = {name: value for name in FIELDS if (value := getattr(prediction, name)) is not None}
    for name, value in fields.items():
        parts = [value] if concat else list(value)
        if len(parts) != len(sizes):
            return f"it is unknown which rows are an example's: {len(parts)} batches of {name}, {len(sizes)} of data"
        for part, size in zip(parts, sizes, strict=True):
            found = _lengths(part)
            if size not in found:
                held = f"{' or '.join(map(str, sorted(set(found))))} rows" if found else "no rows"
                return f"it is unknown which rows are an example's: of {size} examples the {name} hold {held}"
    return None


def take_rows(
    prediction: EvalPrediction, rows: np.ndarray, concat: bool = True, batch_sizes: Sequence[int] | None = None
) -> EvalPrediction:
    """Predictions and labels of some of the examples; the original is left as it is.

    Args:
        rows: [n] indices of examples, in increasing order.
        concat: whether batches are joined.
        batch_sizes: examples in each batch; None: not known.
    """
    values = {name: getattr(prediction, name) for name in FIELDS}
    sizes = _sizes(prediction, concat, batch_sizes)
    if concat:
        picked = {name: None if value is None else _pick(value, rows, sizes[0]) for name, value in values.items()}
    else:
        parts = _by_batch(rows, sizes)
        kept = [i for i, part in enumerate(parts) if len(part)]  # a batch without a row is no batch
        picked = {
            name: None if value is None else [_pick(value[i], parts[i], sizes[i]) for i in kept]
            for name, value in values.items()
        }
    return EvalPrediction(**picked)


def groups_of(
    prediction: EvalPrediction, place: int | None, concat: bool, sizes: Sequence[int] | None
) -> list[np.ndarray]:
    """Rows that stay together in a half: those equal in a label column; without one, each row by itself.

    Args:
        place: of that column among the label columns.
        concat, sizes: as for `take_rows`.
    """
    if place is None:
        return list(np.arange(num_rows(prediction, concat, sizes))[:, None])
    labels = prediction.label_ids
    column = labels[place] if concat else np.concatenate([batch[place] for batch in labels])
    _, group = np.unique(column, return_inverse=True)
    return np.split(np.argsort(group, kind="stable"), np.cumsum(np.bincount(group))[:-1])


def half_of(groups: Sequence[np.ndarray], generator: torch.Generator) -> np.ndarray:
    """The rows of a random half of the groups, in increasing order."""
    drawn = torch.randperm(len(groups), generator=generator)[: max(1, len(groups) // 2)]
    return np.sort(np.concatenate([groups[i] for i in drawn]))


def sizes_of(prediction: EvalPrediction, rows: np.ndarray, batch_sizes: Sequence[int] | None = None) -> tuple[int, ...]:
    """Examples in each batch of what `take_rows` takes, of batches that are not joined."""
    return tuple(len(part) for part in _by_batch(rows, _sizes(prediction, False, batch_sizes)) if len(part))


def _by_batch(rows: np.ndarray, sizes: Sequence[int]) -> list[np.ndarray]:
    """For each batch, its rows that are among `rows`."""
    ends = list(accumulate(sizes))
    return [rows[(rows >= end - size) & (rows < end)] - (end - size) for end, size in zip(ends, sizes, strict=True)]


def _sizes(prediction: EvalPrediction, concat: bool, batch_sizes: Sequence[int] | None) -> list[int]:
    """Examples in each batch, or, where batches are joined, [of all of them]."""
    if batch_sizes is not None:
        return [sum(batch_sizes)] if concat else list(batch_sizes)
    batches = [prediction.predictions] if concat else prediction.predictions
    return [next(iter(_lengths(batch)), 0) for batch in batches]


def _lengths(tree: Any) -> list[int]:
    """Rows of all arrays in nested tuples, lists and dicts, in order; other lists have one for each entry."""
    if isinstance(tree, np.ndarray):
        return [len(tree)] if tree.ndim else []
    if isinstance(tree, Mapping):
        return [length for value in tree.values() for length in _lengths(value)]
    if isinstance(tree, (list, tuple)):
        if tree and not any(isinstance(entry, (np.ndarray, list, tuple)) for entry in tree):
            return [len(tree)]
        inside = [length for value in tree for length in _lengths(value)]
        return inside if isinstance(tree, tuple) else [*inside, len(tree)]
    return []


def _pick(tree: Any, rows: np.ndarray, size: int) -> Any:
    if isinstance(tree, np.ndarray):
        return tree[rows] if tree.ndim and len(tree) == size else tree
    if isinstance(tree, Mapping):
        return {key: _pick(value, rows, size) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        has_rows = [isinstance(x, np.ndarray) and x.ndim > 0 and len(x) == size for x in tree]
        of_lists = all(isinstance(x, list) and len(x) == size for x in tree)
        if len(tree) == size and not (any(has_rows) or of_lists if isinstance(tree, tuple) else all(has_rows)):
            # one entry per example, whatever it is; a tuple of arrays is what a model returns, one of lists its labels
            return [tree[i] for i in rows]
        return type(tree)(_pick(value, rows, size) for value in tree)
    return tree
