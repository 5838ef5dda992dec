"""Share of examples that are classified wrongly."""

import datasets
import evaluate
import numpy as np

_DESCRIPTION = """\
Misclassification is the share of examples whose predicted class is not the true one: 1 - accuracy, the zero-one loss.
Lower is better.
"""

_CITATION = """\
@book{hastie2009elements,
  title={The Elements of Statistical Learning},
  author={Hastie, Trevor and Tibshirani, Robert and Friedman, Jerome},
  publisher={Springer},
  year={2009}
}
"""

_INPUTS_DESCRIPTION = """
Args:
    predictions (`list` of `int`): predicted class of each example.
    references (`list` of `int`): true class of each example. `evaluate` cuts floats down to integers before this
        module sees them: pass `scores.argmax(-1)`, not scores.

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


class Misclassification(evaluate.Metric):
    """1 - accuracy; see `inputs_description`."""

    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS_DESCRIPTION,
            features=datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}),
            format="numpy",  # arrays from Arrow at once, instead of lists of Python integers
        )

    def _compute(self, predictions, references):
        predictions, references = np.asarray(predictions), np.asarray(references)
        if references.size == 0:
            raise ValueError("got no examples, and the share of none is undefined: pass at least one example.")
        for name, labels in (("predictions", predictions), ("references", references)):
            if labels.dtype.kind not in "iu":
                raise ValueError(f"{name} hold missing or non-integer values: pass an integer class for every example.")
        return {"misclassification": float((predictions != references).mean())}
