"""Worst-group accuracy: the smallest accuracy of any group of examples, those of one camera, one hospital, one sex.

With `by_label=True` the examples of each label in each group are a group of their own, as in group DRO. It is 1 when
every example is classified correctly and 0 as soon as one group is missed altogether. Higher is better.
"""

import datasets
import evaluate
import numpy as np


class WorstGroupAccuracy(evaluate.Metric):
    """
    Args:
        predictions (`list` of `int`): predicted class of each example.
        references (`list` of `int`): true class of each example. Pass `scores.argmax(-1)`: `evaluate` truncates floats.
        groups (`list` of `int`): group of each example; any integers.
        by_label (`bool`): whether the examples of each label in each group count as a group. Default: False.

    Returns:
        worst_group_accuracy (`float`): in [0, 1]; over the groups that occur.

    Raises:
        ValueError: no examples, or a missing value.

    Example:
        >>> import evaluate
        >>> from metricopt_hf.metrics import path
        >>> worst_group_accuracy = evaluate.load(path("worst_group_accuracy"))
        >>> batch = {"predictions": [0, 0, 1, 0], "references": [0, 0, 1, 1], "groups": [0, 0, 1, 1]}
        >>> worst_group_accuracy.compute(**batch)
        {'worst_group_accuracy': 0.5}
        >>> worst_group_accuracy.compute(**batch, by_label=True)
        {'worst_group_accuracy': 0.5}
    """

    def _info(self):
        return evaluate.MetricInfo(
            description=__doc__,
            citation="S. Sagawa, P. W. Koh, T. B. Hashimoto, P. Liang: "
            "Distributionally Robust Neural Networks. ICLR 2020, arXiv 1911.08731.",
            inputs_description=self.__doc__,
            features=datasets.Features(
                {name: datasets.Value("int64") for name in ("predictions", "references", "groups")}
            ),
            format="numpy",  # arrays from Arrow at once, instead of lists of Python integers
        )

    def _compute(self, predictions, references, groups, by_label=False):
        columns = _integers(predictions=predictions, references=references, groups=groups)
        predictions, references, groups = columns
        keys = np.stack([groups, references] if by_label else [groups])
        _, cells = np.unique(keys, axis=1, return_inverse=True)
        cells = cells.reshape(-1)  # some releases of numpy keep the axis
        accuracies = np.bincount(cells, weights=predictions == references) / np.bincount(cells)
        return {"worst_group_accuracy": float(accuracies.min())}


def _integers(**columns):
    """The columns as integer arrays, [n] each; ValueError where there is no example or a value is missing."""
    columns = {name: np.asarray(column) for name, column in columns.items()}
    for name, column in columns.items():
        if column.size == 0:
            raise ValueError(f"got no {name}, so the metric is undefined: pass at least one example.")
        if column.dtype.kind not in "iu":
            raise ValueError(f"{name} hold missing or non-integer values: pass an integer for every example.")
    return columns.values()
