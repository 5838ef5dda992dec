"""G-mean: the geometric mean of the per-class recalls, over the classes present in the references.

It is 1 when every example is classified correctly and 0 as soon as one class is missed altogether: a rare class weighs
as much as a common one, and no class can make up for a lost one. Higher is better.
"""

import datasets
import evaluate
import numpy as np


class GMean(evaluate.Metric):
    """
    Args:
        predictions (`list` of `int`): predicted class of each example, 0 or above. A class that is never a reference
            may be predicted: it counts as a miss.
        references (`list` of `int`): true class of each example, 0 or above. Pass `scores.argmax(-1)`: `evaluate`
            truncates floats.

    Returns:
        g_mean (`float`): in [0, 1].

    Raises:
        ValueError: no examples, a missing value, or a negative label such as the padding value -100.

    Example:
        >>> import evaluate
        >>> from metricopt_hf.metrics import path
        >>> g_mean = evaluate.load(path("g_mean"))
        >>> round(g_mean.compute(predictions=[0, 0, 1, 0], references=[0, 0, 1, 1])["g_mean"], 4)
        0.7071
    """

    def _info(self):
        return evaluate.MetricInfo(
            description=__doc__,
            citation="M. Kubat, S. Matwin: "
            "Addressing the Curse of Imbalanced Training Sets: One-Sided Selection. ICML 1997.",
            inputs_description=self.__doc__,
            features=datasets.Features({name: datasets.Value("int64") for name in ("predictions", "references")}),
            format="numpy",  # arrays from Arrow at once, instead of lists of Python integers
        )

    def _compute(self, predictions, references):
        predictions, references = _integers(predictions=predictions, references=references)
        _, classes = np.unique(references, return_inverse=True)
        recalls = np.bincount(classes, weights=predictions == references) / np.bincount(classes)
        # Through logarithms: the plain product of a thousand recalls underflows to 0.
        return {"g_mean": float(np.exp(np.log(recalls).mean())) if recalls.all() else 0.0}


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
