"""Recall of the class that fares worst."""

import datasets
import evaluate
import numpy as np

_DESCRIPTION = """\
Worst-class recall is the smallest per-class recall, over the classes present in the references. It is 1 when every
example is classified correctly and 0 as soon as one class is missed altogether. Higher is better.
"""

_CITATION = """\
@inproceedings{narasimhan2021training,
  title={Training Over-parameterized Models with Non-decomposable Objectives},
  author={Narasimhan, Harikrishna and Menon, Aditya K.},
  booktitle={Advances in Neural Information Processing Systems},
  year={2021}
}
"""

_INPUTS_DESCRIPTION = """
Args:
    predictions (`list` of `int`): predicted class of each example, 0 or above. A class that is never a reference may
        be predicted: it counts as a miss.
    references (`list` of `int`): true class of each example, 0 or above. `evaluate` cuts floats down to integers
        before this module sees them: pass `scores.argmax(-1)`, not scores.

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


class WorstClassRecall(evaluate.Metric):
    """The smallest per-class recall; see `inputs_description`."""

    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS_DESCRIPTION,
            features=datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}),
            format="numpy",  # arrays from Arrow at once, instead of lists of Python integers
            reference_urls=["https://arxiv.org/abs/2107.04641"],
        )

    def _compute(self, predictions, references):
        return {"worst_class_recall": float(_recalls(predictions, references).min())}


def _recalls(predictions, references):
    """Recall of every class present in the references, in order of class. predictions, references: [n] int.

    g_mean.py holds the same function: `evaluate` loads each script on its own.
    """
    predictions, references = np.asarray(predictions), np.asarray(references)
    if references.size == 0:
        raise ValueError("got no examples, and the recall of no class is undefined: pass at least one example.")
    for name, labels in (("predictions", predictions), ("references", references)):
        if labels.dtype.kind not in "iu":
            raise ValueError(f"{name} hold missing or non-integer values: pass an integer class for every example.")
        if labels.min() < 0:
            raise ValueError(
                f"{name} hold the label {labels.min()}, but classes count from 0. If this is padding, drop it first: "
                "`keep = references >= 0`."
            )
    _, classes = np.unique(references, return_inverse=True)
    return np.bincount(classes, weights=predictions == references) / np.bincount(classes)
