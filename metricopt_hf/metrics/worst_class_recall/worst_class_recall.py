"""Worst-class recall: the smallest per-class recall, over the classes present in the references.

It is 1 when every example is classified correctly and 0 as soon as one class is missed altogether. Higher is better.
"""

import datasets
import evaluate
import numpy as np


class WorstClassRecall(evaluate.Metric):
    """
    Args:
        predictions (`list` of `int`): predicted class of each example, 0 or above. A class that is never a reference
            may be predicted: it counts as a miss.
        references (`list` of `int`): true class of each example, 0 or above. Pass `scores.argmax(-1)`: `evaluate`
            truncates floats.

    Returns:
        worst_class_recall (`float`): in [0, 1].

    Raises:
        ValueError: no examples, a missing value, or a negative label such as the padding value -100.

    Example:
        >>> import evaluate
        >>> from metricopt_hf.metrics import path
        >>> worst_class_recall = evaluate.load(path("worst_class_recall"))
        >>> worst_class_recall.compute(predictions=[0, 0, 1, 0], references=[0, 0, 1, 1])
        {'worst_class_recall': 0.5}
    """

    def _info(self):
        return evaluate.MetricInfo(
            description=__doc__,
            citation="H. Narasimhan, A. K. Menon: "
            "Training Over-parameterized Models with Non-decomposable Objectives. NeurIPS 2021, arXiv 2107.04641.",
            inputs_description=self.__doc__,
            features=datasets.Features({name: datasets.Value("int64") for name in ("predictions", "references")}),
            format="numpy",  # arrays from Arrow at once, instead of lists of Python integers
        )

    def _compute(self, predictions, references):
        predictions, references = _integers(predictions=predictions, references=references)
        _, classes = np.unique(references, return_inverse=True)
        recalls = np.bincount(classes, weights=predictions == references) / np.bincount(classes)
        return {"worst_class_recall": float(recalls.min())}


def _integers(**columns):
    """The columns as integer arrays, [n] each; ValueError where there is no example or a value is missing."""
    columns = {name: np.asarray(column) for name, column in columns.items()}
    for name, column in columns.items():
        if column.size == 0:
            raise ValueError(f"got no {name}, so the metric is undefined: pass at least one example.")
        if column.dtype.kind not in "iu":
            raise ValueError(f"{name} hold missing or non-integer values: pass an integer for every example.")
        if column.min() < 0:
            raise ValueError(
                f"{name} hold the label {column.min()}, but classes count from 0. If this is padding, drop it first: "
                "`keep = references >= 0`."
            )
    return columns.values()
