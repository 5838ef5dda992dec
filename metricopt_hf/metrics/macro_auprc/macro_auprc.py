"""Macro AUPRC: average precision of each class against the rest, averaged over classes.

It is the area under the precision-recall curve (as average precision: no interpolation) of each class against the rest,
averaged over the classes present in the references with equal weight. Only the order of a class's scores over the
examples matters, so logits serve as well as probabilities. Higher is better. Guessing gives each class its share of the
examples: about 1 / (number of classes) on average.
"""

import datasets
import evaluate
import numpy as np
from sklearn.metrics import average_precision_score

_LABEL, _SCORE = datasets.Value("int64"), datasets.Value("float64")


class MacroAuprc(evaluate.Metric):
    """
    Args:
        prediction_scores (`list` of `list` of `float`, or `list` of `float`): for each example the score of every
            class, two classes or more; or, in a binary task, the score of class 1 alone. With scores of class 1 alone,
            the result is the average precision of class 1; with two scores per example it is the mean over both.
        references (`list` of `int`): true class of each example, from 0 to the number of classes - 1. `evaluate`
            truncates floats.

    Returns:
        macro_auprc (`float`): in (0, 1]. It is 1 where all examples are of one class: nothing can be confused with it.

    Raises:
        ValueError: no examples; a missing, NaN or infinite score; rows of different lengths; a label out of range;
            binary scores without an example of class 1, whose average precision is undefined.

    Examples:
        >>> import evaluate
        >>> from metricopt_hf.metrics import path
        >>> macro_auprc = evaluate.load(path("macro_auprc"))
        >>> scores = [[0.8, 0.1, 0.1], [0.2, 0.5, 0.3], [0.1, 0.6, 0.3]]
        >>> round(macro_auprc.compute(prediction_scores=scores, references=[0, 1, 2])["macro_auprc"], 4)
        0.6667
        >>> macro_auprc.compute(prediction_scores=[0.9, 0.2, 0.6, 0.4], references=[1, 0, 0, 0])
        {'macro_auprc': 1.0}
    """

    def _info(self):
        scores = (datasets.List(_SCORE), _SCORE)  # of every class, or of class 1
        return evaluate.MetricInfo(
            description=__doc__,
            citation="J. Davis, M. Goadrich: The Relationship Between Precision-Recall and ROC Curves. ICML 2006.",
            inputs_description=self.__doc__,
            features=[datasets.Features({"prediction_scores": kind, "references": _LABEL}) for kind in scores],
        )

    def _infer_feature_from_batch(self, batch):
        # `evaluate` chooses between the two formats by the first example, and fails without a reason where none is.
        if len(batch["prediction_scores"]) == 0:
            raise ValueError("got no prediction_scores, so the metric is undefined: pass at least one example.")
        return super()._infer_feature_from_batch(batch)

    def _compute(self, prediction_scores, references):
        scores, references = _checked(prediction_scores, references)
        # From class to its scores. Binary scores speak of class 1 only.
        columns = {1: scores} if scores.ndim == 1 else dict(enumerate(scores.T))
        precisions = [
            average_precision_score(references == label, column)
            for label, column in columns.items()
            if (references == label).any()
        ]
        if not precisions:
            raise ValueError(
                "no reference is of class 1, so its average precision is undefined: pass at least one such example, "
                "or the scores of both classes."
            )
        return {"macro_auprc": float(np.mean(precisions))}


def _checked(prediction_scores, references):
    """(scores, references): [n] or [n, classes] float and [n] int; ValueError where these are undefined."""
    try:
        scores = np.asarray(prediction_scores, dtype=np.float64)
    except ValueError as error:
        widths = sorted({np.size(row) for row in prediction_scores})
        raise ValueError(f"examples have {widths} scores: each needs one score for every class.") from error
    references = np.asarray(references)
    if not np.isfinite(scores).all():
        first = int(np.argwhere(~np.isfinite(scores))[0, 0])
        raise ValueError(f"the scores of example {first} are {scores[first]}: missing, NaN or infinite.")
    if references.dtype.kind not in "iu":
        raise ValueError("references hold missing or non-integer values: pass an integer class for every example.")
    classes = 2 if scores.ndim == 1 else scores.shape[1]
    if classes < 2:
        raise ValueError(
            f"each example has a row of {classes} scores, but two is the least: pass a score for every class, "
            "or the scores of class 1 as a flat list."
        )
    if references.min() < 0 or references.max() >= classes:
        raise ValueError(
            f"references run from {references.min()} to {references.max()}, but there are scores for classes "
            f"0 to {classes - 1}. If -100 is padding, drop it first: `keep = references >= 0`."
        )
    return scores, references
