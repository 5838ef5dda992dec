"""Accuracy of the group that fares worst."""

import datasets
import evaluate
import numpy as np

_DESCRIPTION = """\
Worst-group accuracy is the smallest accuracy of any group of examples: those of one camera, one hospital, one sex. With
`by_label=True` the examples of each label in each group are a group of their own, as in group DRO. It is 1 when every
example is classified correctly and 0 as soon as one group is missed altogether. Higher is better.
"""

_CITATION = """\
@inproceedings{sagawa2020distributionally,
  title={Distributionally Robust Neural Networks},
  author={Sagawa, Shiori and Koh, Pang Wei and Hashimoto, Tatsunori B. and Liang, Percy},
  booktitle={International Conference on Learning Representations},
  year={2020}
}
"""

_INPUTS_DESCRIPTION = """
Args:
    predictions (`list` of `int`): predicted class of each example.
    references (`list` of `int`): true class of each example. `evaluate` cuts floats down to integers before this
        module sees them: pass `scores.argmax(-1)`, not scores.
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


class WorstGroupAccuracy(evaluate.Metric):
    """The smallest accuracy of a group; see `inputs_description`."""

    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS_DESCRIPTION,
            features=datasets.Features(
                {name: datasets.Value("int64") for name in ("predictions", "references", "groups")}
            ),
            format="numpy",  # arrays from Arrow at once, instead of lists of Python integers
            reference_urls=["https://arxiv.org/abs/1911.08731"],
        )

    def _compute(self, predictions, references, groups, by_label=False):
        predictions, references, groups = _checked(predictions, references, groups)
        keys = np.stack([groups, references] if by_label else [groups])
        _, cells = np.unique(keys, axis=1, return_inverse=True)
        cells = cells.reshape(-1)  # some releases of numpy keep the axis
        accuracies = np.bincount(cells, weights=predictions == references) / np.bincount(cells)
        return {"worst_group_accuracy": float(accuracies.min())}


def _checked(predictions, references, groups):
    """The three as arrays [n] int, or a ValueError that says why not.

    equalized_odds_gap.py holds the same function: `evaluate` loads each script on its own.
    """
    columns = {"predictions": predictions, "references": references, "groups": groups}
    columns = {name: np.asarray(column) for name, column in columns.items()}
    if columns["references"].size == 0:
        raise ValueError("got no examples, and no group has an accuracy: pass at least one example.")
    for name, column in columns.items():
        if column.dtype.kind not in "iu":
            raise ValueError(f"{name} hold missing or non-integer values: pass an integer for every example.")
    return tuple(columns.values())
