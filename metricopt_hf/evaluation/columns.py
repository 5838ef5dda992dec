"""Label columns: whether a batch holds those that `label_names` names, as numbers; if not, which one fails, and why.

Trainer hands labels to a metric only where a batch has all of `label_names`, and collators drop columns of texts. So
one wrong column leaves the metric without any labels, and the error that follows says nothing of the cause.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from itertools import islice
from typing import Any

import numpy as np
import torch

TEXTS, WHOLE, FLOATS, NOTHING, OTHER = "texts", "whole numbers", "floats", "None", "neither numbers nor texts"
# Names under which transformers' collators take labels from a row; a batch has them as "labels".
ALIASES = {"labels": ("label", "label_ids")}
MOST_NAMED = 12  # columns in a message


def explain_labels(
    label_names: Sequence[str],
    batch: Mapping[str, Any],
    dataset: Any = None,
    forward: Callable | None = None,
    whole: Collection[str] = (),
) -> str | None:
    """The faults of the label columns of a batch, with the line to type; None without faults.

    Args:
        label_names: as of the config.
        batch: as the collator made it.
        dataset: from which it was made: a `datasets.Dataset`, or any that gives its rows as dicts.
        forward: the model's; a column that it does not take may be one of labels.
        whole: those of `label_names` that must be whole numbers, such as groups.

    Example:
        >>> batch, rows = {"x": torch.zeros(1, 2)}, [{"x": [0.0, 0.0], "group": "a"}]
        >>> print(explain_labels(["group"], batch, rows))
        The column 'group' holds texts, which are no labels: encode it as whole numbers, as in
        names = sorted({row["group"] for row in dataset}) and row["group"] = names.index(row["group"]).
    """
    in_batch, in_data = kinds(batch), kinds(dataset)
    missing = [name for name in label_names if name not in in_batch]
    faults = [] if label_names else ["label_names is empty: name the columns of labels, as in label_names=['labels']."]
    for name in label_names:
        source = next((n for n in (name, *ALIASES.get(name, ())) if n in in_data), name)
        kind = in_batch.get(name, in_data.get(source))
        if kind == TEXTS:
            faults.append(f"The column {source!r} holds texts, which are no labels: {_encoding(source, dataset)}.")
        elif kind == NOTHING:
            faults.append(f"The column {source!r} holds None: give every row a label, or leave such rows out.")
        elif kind == FLOATS and name in whole:
            faults.append(
                f"The column {source!r} holds floats, and whole numbers are wanted: "
                f"{_casting(source, dataset)}, if its values are whole."
            )
        elif name in missing and source in in_data:
            faults.append(
                f"The column {source!r} holds {in_data[source]} in the data set, and batches are without {name!r}: let "
                "the data_collator keep it."
            )
        elif name in missing:
            faults.append(_missing(name, label_names, in_batch, in_data, _parameters(forward)))
    if missing and len(missing) < len(label_names) and faults:
        there = ", ".join(name for name in label_names if name not in missing)
        faults.append(f"Without all of label_names={list(label_names)} the metric gets no labels, not even {there}.")
    return " ".join(faults) or None


def forgotten_columns(label_names: Sequence[str], dataset: Any, forward: Any, error: str) -> str | None:
    """A hint at columns that a metric may have been meant to get, where it failed to unpack its labels.

    Args:
        label_names, dataset, forward: see `explain_labels`.
        error: what the metric raised.
    """
    taken = {*label_names, *(alias for name in label_names for alias in ALIASES.get(name, ()))}
    with suppress(TypeError, ValueError):  # nothing is known of what it takes
        taken |= set(inspect.signature(forward).parameters)
    free = [name for name, kind in kinds(dataset).items() if name not in taken and kind in (WHOLE, FLOATS)]
    if "unpack" not in error or not free:
        return None
    return (
        f"The metric is given the label column{'s' * (len(label_names) > 1)} {', '.join(label_names)} alone; the data "
        f"set has {', '.join(free[:MOST_NAMED])} too. To give it more, say label_names={[*label_names, free[0]]}."
    )


def kinds(data: Any) -> dict[str, str]:
    """Column -> kind of its values, from a batch, a data set's features or its first row; empty if unknown."""
    if isinstance(data, Mapping):
        return {name: _kind(value) for name, value in data.items()}
    if isinstance(features := getattr(data, "features", None), Mapping):
        return {name: _kind_of_feature(feature) for name, feature in features.items()}
    row = None
    with suppress(Exception):  # a data set of somebody's own
        row = data[0] if hasattr(data, "__getitem__") else next(islice(iter(data), 1))
    return {name: _kind(value) for name, value in row.items()} if isinstance(row, Mapping) else {}


def _kind(value: Any) -> str:
    if value is None:
        return NOTHING
    if isinstance(value, (str, bytes)):
        return TEXTS
    if isinstance(value, torch.Tensor):
        return OTHER if value.is_complex() else FLOATS if value.is_floating_point() else WHOLE
    if isinstance(value, (list, tuple)) and value:
        found = {_kind(item) for item in value[:MOST_NAMED]}
        return next((kind for kind in (TEXTS, NOTHING, OTHER, FLOATS) if kind in found), WHOLE)
    with suppress(Exception):
        array = np.asarray(value)
        if array.dtype.kind == "O" and array.size:
            return _kind(array.ravel().tolist())
        return {"f": FLOATS, "i": WHOLE, "u": WHOLE, "b": WHOLE, "U": TEXTS, "S": TEXTS}.get(array.dtype.kind, OTHER)
    return OTHER


def _kind_of_feature(feature: Any) -> str:
    """The kind of a feature of `datasets`; a `ClassLabel` holds whole numbers."""
    while getattr(feature, "feature", None) is not None:  # lists
        feature = feature.feature
    dtype = str(getattr(feature, "dtype", ""))
    if dtype == "null":
        return NOTHING
    if "string" in dtype or "binary" in dtype:
        return TEXTS
    if dtype.startswith(("int", "uint", "bool")):
        return WHOLE
    return FLOATS if dtype.startswith(("float", "double")) else OTHER


def _parameters(forward: Callable | None) -> set[str] | None:
    """The parameters of `forward`; None where they are not known, or any name will do."""
    try:
        parameters = [] if forward is None else list(inspect.signature(forward).parameters.values())
    except (TypeError, ValueError):
        return None
    if not parameters or any(p.kind is p.VAR_KEYWORD for p in parameters):
        return None
    return {p.name for p in parameters} - {"self"}


def _missing(
    name: str,
    label_names: Sequence[str],
    in_batch: Mapping[str, str],
    in_data: Mapping[str, str],
    taken: set[str] | None,
) -> str:
    """The message about a column that neither a batch nor the data set has."""
    columns = list(dict.fromkeys([*in_data, *in_batch]))
    named = ", ".join(columns[:MOST_NAMED]) + (", ..." if len(columns) > MOST_NAMED else "")
    missing = f"There is no column {name!r}, which label_names={list(label_names)} names: the columns are {named}."
    free = [c for c in columns if c not in label_names and in_batch.get(c, in_data.get(c)) in (WHOLE, FLOATS, TEXTS)]
    close = difflib.get_close_matches(name, free, 1)
    if not close:
        close = [c for c in free if taken is not None and c not in taken][:1]
    if close:
        names = [close[0] if other == name else other for other in label_names]
        return f"{missing} If {close[0]!r} is meant, say label_names={names}."
    return f"{missing} Add it to the data set, or name another column: label_names=[...]."


def _encoding(name: str, dataset: Any) -> str:
    if hasattr(dataset, "class_encode_column"):
        return f"encode it as whole numbers, as in dataset = dataset.class_encode_column({name!r})"
    return (
        f'encode it as whole numbers, as in names = sorted({{row["{name}"] for row in dataset}}) and '
        f'row["{name}"] = names.index(row["{name}"])'
    )


def _casting(name: str, dataset: Any) -> str:
    if hasattr(dataset, "cast_column"):
        return f'say dataset = dataset.cast_column({name!r}, datasets.Value("int64"))'
    return f'say row["{name}"] = int(row["{name}"])'
