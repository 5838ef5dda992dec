"""The data of the metric phase: the splits, and their batches as Trainer would make them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, Subset
from transformers import EvalPrediction

from ..errors import ConfigurationError

logger = logging.getLogger(__name__)


def cut(
    dataset: Any, size: int | None, seed: int, label_name: str = "labels", row_groups: str | None = None
) -> tuple[Any, Any]:
    """Two disjoint random parts of a data set of known length, for observation and for selection.

    Where its class labels can be read without its rows (see `class_labels`), each class has its share of both, and a
    class that cannot be in both is named in a warning.

    Args:
        size: examples of each; None: half of the data set each.
        row_groups: column whose equal rows come into the same part; then neither is of exactly that size.

    Raises:
        ConfigurationError: it is too small, it has no length, or that column cannot be read.
    """
    if not hasattr(dataset, "__len__"):
        raise ConfigurationError(
            "eval_dataset has no length, so no observation and selection split can be cut from it: "
            "pass observation_dataset=... and selection_dataset=..."
        )
    size = len(dataset) // 2 if size is None else size
    if size < 1 or 2 * size > len(dataset):
        raise ConfigurationError(
            f"eval_dataset has {len(dataset)} examples, too few to cut {max(size, 1)} for observation and as many for "
            "selection: pass observation_dataset and selection_dataset, or a smaller observation_size."
        )
    order = np.random.default_rng(seed).permutation(len(dataset))
    if row_groups is not None:
        first, second = _by_group(column(dataset, (row_groups,)), size, seed, row_groups)
        return take(dataset, first), take(dataset, second)
    labels = class_labels(dataset, label_name)
    parts = [order[:size], order[size : 2 * size]] if labels is None else _stratified(order, labels, 2, size)
    if labels is not None:
        for name, rows in zip(("observation", "selection"), parts, strict=True):
            _warn_of_missing(labels, rows, f"the {name} set that was cut from eval_dataset")
    return take(dataset, parts[0]), take(dataset, parts[1])


class _Picked(IterableDataset):
    """Some rows of a data set that can only be iterated, in its order."""

    def __init__(self, dataset: Iterable[Any], indices: Collection[int]):
        self.dataset, self.indices = dataset, frozenset(indices)

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[Any]:
        return (row for i, row in enumerate(self.dataset) if i in self.indices)


def class_labels(dataset: Any, label_name: str) -> np.ndarray | None:
    """[rows] integer class labels, if they can be read without computing rows; else None.

    Of a `datasets.Dataset` the column, of a list of dicts the entry, of a torch data set (or a `Subset` of one) its
    attribute, called `label_name`, "label", "labels" or, as torchvision's, "targets".
    """
    labels = column(dataset, (label_name, "label", "labels", "targets"))
    if labels is None or labels.dtype.kind not in "iub":
        return None
    return labels if 1 < len(np.unique(labels)) <= len(labels) // 2 else None


def column(dataset: Any, names: Sequence[str]) -> np.ndarray | None:
    """[rows] values of the first column of these names that there is; None if it cannot be read without its rows."""
    if isinstance(dataset, Subset):
        values = column(dataset.dataset, names)
        return None if values is None else values[np.asarray(dataset.indices)]
    try:
        if isinstance(dataset, list):
            name = next(name for name in names if isinstance(dataset[0], Mapping) and name in dataset[0])
            values = np.asarray([np.asarray(row[name]) for row in dataset])
        elif (columns := getattr(dataset, "column_names", None)) is not None:
            values = np.asarray(dataset.with_format("numpy")[next(name for name in names if name in columns)][:])
        else:
            values = np.asarray(next(getattr(dataset, name) for name in names if hasattr(dataset, name)))
    except (AttributeError, IndexError, KeyError, StopIteration, TypeError, ValueError):
        return None
    return values if values.shape == (len(dataset),) else None


def _by_group(values: np.ndarray | None, size: int, seed: int, name: str) -> list[np.ndarray]:
    """Rows of two parts of about `size`, none of which shares a value with the other."""
    if values is None:
        raise ConfigurationError(
            f"The column {name!r} of row_groups cannot be read from eval_dataset, so it cannot be cut along it: pass "
            "observation_dataset and selection_dataset, none of whose groups is in both."
        )
    _, group = np.unique(values, return_inverse=True)
    order = np.random.default_rng(seed).permutation(group.max() + 1)
    ends = np.cumsum(np.bincount(group)[order])  # rows of the groups so far
    last = len(values) if size == len(values) // 2 else 2 * size
    parts = [np.flatnonzero(np.isin(group, order[(ends > a) & (ends <= b)])) for a, b in ((0, size), (size, last))]
    if not all(len(part) for part in parts):
        raise ConfigurationError(
            f"eval_dataset has too few groups in the column {name!r} of row_groups to cut it: pass "
            "observation_dataset and selection_dataset."
        )
    return parts


def _stratified(order: np.ndarray, labels: np.ndarray, count: int, size: int) -> list[np.ndarray]:
    """`count` disjoint parts of the rows in `order`, in this order, each with its share of every class; of `size` each.

    Each part first gets the rows that it needs to hold every class, as far as there are enough of them.
    """
    rank, sizes = np.zeros(len(order)), np.zeros(len(order))
    for label in np.unique(labels):
        rows = np.flatnonzero(labels[order] == label)
        rank[rows], sizes[rows] = np.arange(len(rows)), len(rows)
    first = np.lexsort((order, (rank + 0.5) / sizes, rank >= count))
    chosen = order[first][: count * size]
    dealt = chosen[np.argsort(labels[chosen], kind="stable")]
    place = np.argsort(order)
    return [rows[np.argsort(place[rows])] for rows in (dealt[i::count] for i in range(count))]


def _warn_of_missing(labels: np.ndarray, rows: np.ndarray, what: str) -> None:
    missing = np.setdiff1d(labels, labels[rows])
    if len(missing):
        named = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
        logger.warning(
            f"Class {named} is missing in {what}: a metric per class may have no value for a class with so few "
            "examples. Pass observation_dataset and selection_dataset that hold all classes."
        )


def take(dataset: Any, indices: np.ndarray) -> Any:
    """The examples at `indices` of a `datasets.Dataset` or a torch data set, in this order (iterated: in its own)."""
    if isinstance(dataset, IterableDataset):
        indices = np.sort(indices)
        taken = _Picked(dataset, indices.tolist())
    else:
        rows = [int(i) for i in indices]
        taken = dataset.select(rows) if hasattr(dataset, "select") else Subset(dataset, rows)
    taken._metricopt_places = places(dataset)[indices]
    return taken


def places(dataset: Any) -> np.ndarray:
    """[n] int64: the places of a part's rows in the data set from which it was taken; for that data set itself, all."""
    found = getattr(dataset, "_metricopt_places", None)
    return np.arange(len(dataset)) if found is None else found


def is_part(dataset: Any) -> bool:
    """Whether a data set is a part that `take` made."""
    return hasattr(dataset, "_metricopt_places")


def examples_of(features: Any, examples: Any) -> Any:
    """The `examples` from which `features`, a part of a set, were made.

    Raises:
        ConfigurationError: the features do not identify them.
    """
    if "example_id" in getattr(features, "column_names", ()) and "id" in getattr(examples, "column_names", ()):
        wanted = set(features["example_id"])
        return take(examples, np.array([i for i, name in enumerate(examples["id"]) if name in wanted], int))
    where = places(features)
    if len(where) and where.max() >= len(examples):
        raise ConfigurationError(
            f"eval_examples has {len(examples)} rows, too few for features up to row {where.max()}: give one example "
            'per feature, or features with a column "example_id" and examples with "id".'
        )
    return take(examples, where)


class InOrder:
    """Makes fresh iterations over all of a data set in its order, the last batch as small as it is.

    Attributes:
        batch_sizes: examples in each batch; None where the data set has no length.
    """

    def __init__(self, dataset: Any, batch_size: int, collate: Callable, num_workers: int = 0):
        self._loader = partial(DataLoader, dataset, batch_size, collate_fn=collate, num_workers=num_workers)
        self.batch_sizes: tuple[int, ...] | None = None
        shared_out = isinstance(dataset, IterableDataset) and num_workers  # each worker makes batches of its own
        if hasattr(dataset, "__len__") and not shared_out:
            starts = range(0, len(dataset), batch_size)
            self.batch_sizes = tuple(min(batch_size, len(dataset) - start) for start in starts)

    def __call__(self) -> Iterator[Any]:
        return iter(self._loader())


def random_batches(
    dataset: Any, batch_size: int, count: int, collate: Callable, generator: torch.Generator
) -> Iterator[Any]:
    """`count` batches of a data set with random access, drawn at random."""
    for _ in range(count):
        rows = torch.randint(len(dataset), (min(batch_size, len(dataset)),), generator=generator)
        yield collate([dataset[int(i)] for i in rows])


def reordered(prediction: EvalPrediction, order: int) -> EvalPrediction:
    """A prediction with its rows sorted by label (order 0), or shuffled with `order` as the seed."""
    labels = rows = prediction.label_ids
    while isinstance(rows, (tuple, list)) and len(rows):
        rows = rows[0]
    count = len(rows) if isinstance(rows, np.ndarray) and rows.ndim else 0
    sortable = order == 0 and isinstance(labels, np.ndarray) and labels.ndim == 1
    places = np.argsort(labels, kind="stable") if sortable else np.random.default_rng(order).permutation(count)

    def turn(rows: Any) -> Any:
        if isinstance(rows, tuple):
            return tuple(map(turn, rows))
        has_rows = isinstance(rows, np.ndarray) and rows.ndim and len(rows) == count
        return rows[places].copy() if has_rows else rows

    fields = ("predictions", "label_ids", "inputs", "losses")
    return EvalPrediction(**{name: turn(getattr(prediction, name)) for name in fields})


def whole(loader: DataLoader, world_size: int) -> Any:
    """A loader that accelerate may have dealt out to the ranks, with all of its batches.

    Raises:
        ConfigurationError: they cannot be had back.
    """
    if world_size == 1:
        return loader
    sampler = getattr(getattr(loader, "batch_sampler", None), "batch_sampler", None)
    if sampler is None:
        raise ConfigurationError(
            "get_eval_dataloader is overridden, and on several ranks its loader has no batch sampler from which all "
            "batches could be had. Let it return self.accelerator.prepare(DataLoader(eval_dataset, batch_size=...)), "
            "or run on one rank."
        )
    return DataLoader(loader.dataset, batch_sampler=sampler, collate_fn=loader.collate_fn)
