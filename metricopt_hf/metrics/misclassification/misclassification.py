"""Misclassification: the share of examples whose predicted class is not the true one, 1 - accuracy, the zero-one loss.

Lower is better.
"""

import datasets
import evaluate
import numpy as np


class Misclassification(evaluate.Metric):
    """
    Args:
        predictions (`list` of `int`): predicted class of each example.
        references (`list` of `int`): true class of each example. Pass `scores.argmax(-1)`: `evaluate` truncates floats.

    Returns:
        misclassification (`float`): in [0, 1].

    Raises:
        ValueError: no examples, or a missing value.

    Example:
        >>> import evaluate
        >>> from metricopt_hf.metrics import path
        >>> misclassification = evaluate.load(path("misclassification"))
        >>> misclassification.compute(predictions=[0, 0, 1, 0], references=[0, 0, 1, 1])
        {'misclassification': 0.25}
    """

    def _info(self):
        return evaluate.MetricInfo(
            description=__doc__,
            citation="T. Hastie, R. Tibshirani, J. Friedman: The Elements of Statistical Learning. Springer, 2009.",
            inputs_description=self.__doc__,
            features=datasets.Features({name: datasets.Value("int64") for name in ("predictions", "references")}),
            format="numpy",  # arrays from Arrow at once, instead of lists of Python integers
        )

    def _compute(self, predictions, references):
        predictions, references = _integers(predictions=predictions, references=references)
        return {"misclassification": float((predictions != references).mean())}


def _integers(**columns):
    """The columns as integer arrays, [n] each; ValueError where there is no example or a value is missing."""
    columns = {name: np.asarray(column) for name, column in columns.items()}
    for name, column in columns.items():
        if column.size == 0:
            raise ValueError(f"got no {name}, so the metric is undefined: pass at least one example.")
        if column.dtype.kind not in "iu":
            raise ValueError(f"{name} hold missing or non-integer values: pass an integer for every example.")
    return columns.values()
