"""How much a classifier's error rates differ between groups."""

import datasets
import evaluate
import numpy as np

_DESCRIPTION = """\
The equalized odds gap is the greatest difference between two groups in the rate at which examples of one true class are
predicted to be of another, or of the same. Of two classes it is the greater of the differences in true and in false
positive rate: fairlearn's `equalized_odds_difference`. It is 0 when the prediction says nothing of the group beyond
what the true class says, and 1 at most. Lower is better; a classifier that always answers the same reaches 0, so
combine it with accuracy.
"""

_CITATION = """\
@inproceedings{hardt2016equality,
  title={Equality of Opportunity in Supervised Learning},
  author={Hardt, Moritz and Price, Eric and Srebro, Nathan},
  booktitle={Advances in Neural Information Processing Systems},
  year={2016}
}
"""

_INPUTS_DESCRIPTION = """
Args:
    predictions (`list` of `int`): predicted class of each example.
    references (`list` of `int`): true class of each example. `evaluate` cuts floats down to integers before this
        module sees them: pass `scores.argmax(-1)`, not scores.
    groups (`list` of `int`): group of each example; any integers.

Returns:
    equalized_odds_gap (`float`): in [0, 1]. Of each true class the groups are compared that have an example of it.

Raises:
    ValueError: no examples, a missing value, or no true class of which two groups have an example.

Example:
    >>> import evaluate
    >>> from metricopt_hf.metrics import path
    >>> equalized_odds_gap = evaluate.load(path("equalized_odds_gap"))
    >>> equalized_odds_gap.compute(predictions=[1, 1, 0, 1], references=[1, 1, 1, 1], groups=[0, 0, 1, 1])
    {'equalized_odds_gap': 0.5}
"""


class EqualizedOddsGap(evaluate.Metric):
    """The greatest difference between groups in a rate; see `inputs_description`."""

    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS_DESCRIPTION,
            features=datasets.Features(
                {name: datasets.Value("int64") for name in ("predictions", "references", "groups")}
            ),
            format="numpy",  # arrays from Arrow at once, instead of lists of Python integers
            reference_urls=[
                "https://arxiv.org/abs/1610.02413",
                "https://fairlearn.org/main/api_reference/generated/fairlearn.metrics.equalized_odds_difference.html",
            ],
        )

    def _compute(self, predictions, references, groups):
        columns = _checked(predictions, references, groups)
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


def _checked(predictions, references, groups):
    """The three as arrays [n] int, or a ValueError that says why not.

    worst_group_accuracy.py holds the same function: `evaluate` loads each script on its own.
    """
    columns = {"predictions": predictions, "references": references, "groups": groups}
    columns = {name: np.asarray(column) for name, column in columns.items()}
    if columns["references"].size == 0:
        raise ValueError("got no examples, and no group has a rate: pass at least one example.")
    for name, column in columns.items():
        if column.dtype.kind not in "iu":
            raise ValueError(f"{name} hold missing or non-integer values: pass an integer for every example.")
    return tuple(columns.values())
