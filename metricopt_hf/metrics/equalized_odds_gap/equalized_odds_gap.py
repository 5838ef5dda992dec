"""The equalized odds gap: how much a classifier's error rates differ between groups.

It is the greatest difference between two groups in the rate at which examples of one true class are predicted to be of
another, or of the same. Of two classes it is the greater of the differences in true and in false positive rate:
fairlearn's `equalized_odds_difference`. It is 0 when the prediction says nothing of the group beyond what the true
class says, and 1 at most. Lower is better; a classifier that always answers the same reaches 0, so combine it with
accuracy.
"""

import datasets
import evaluate
import numpy as np


class EqualizedOddsGap(evaluate.Metric):
    """
    Args:
        predictions (`list` of `int`): predicted class of each example.
        references (`list` of `int`): true class of each example. Pass `scores.argmax(-1)`: `evaluate` truncates floats.
        groups (`list` of `int`): group of each example; any integers.

    Returns:
        equalized_odds_gap (`float`): in [0, 1]. Groups are compared on each true class of which they have an example.

    Raises:
        ValueError: no examples, a missing value, or no true class of which two groups have an example.

    Example:
        >>> import evaluate
        >>> from metricopt_hf.metrics import path
        >>> equalized_odds_gap = evaluate.load(path("equalized_odds_gap"))
        >>> equalized_odds_gap.compute(predictions=[1, 1, 0, 1], references=[1, 1, 1, 1], groups=[0, 0, 1, 1])
        {'equalized_odds_gap': 0.5}
    """

    def _info(self):
        return evaluate.MetricInfo(
            description=__doc__,
            citation="M. Hardt, E. Price, N. Srebro: "
            "Equality of Opportunity in Supervised Learning. NeurIPS 2016, arXiv 1610.02413.",
            inputs_description=self.__doc__,
            features=datasets.Features(
                {name: datasets.Value("int64") for name in ("predictions", "references", "groups")}
            ),
            format="numpy",  # arrays from Arrow at once, instead of lists of Python integers
        )

    def _compute(self, predictions, references, groups):
        columns = _integers(predictions=predictions, references=references, groups=groups)
        predicted, true, group = (np.unique(column, return_inverse=True)[1] for column in columns)
        counts = np.zeros((true.max() + 1, group.max() + 1, predicted.max() + 1))
        np.add.at(counts, (true, group, predicted), 1)
        gaps = []
        for of_class in counts:  # [groups, predicted classes]
            there = of_class[of_class.sum(1) > 0]
            if len(there) > 1:
                gaps.append(np.ptp(there / there.sum(1, keepdims=True), axis=0).max())
        if not gaps:
            raise ValueError("no true class has examples in two groups, so there are no rates to compare.")
        return {"equalized_odds_gap": float(max(gaps))}


def _integers(**columns):
    """The columns as integer arrays, [n] each; ValueError where there is no example or a value is missing."""
    columns = {name: np.asarray(column) for name, column in columns.items()}
    for name, column in columns.items():
        if column.size == 0:
            raise ValueError(f"got no {name}, so the metric is undefined: pass at least one example.")
        if column.dtype.kind not in "iu":
            raise ValueError(f"{name} hold missing or non-integer values: pass an integer for every example.")
    return columns.values()
