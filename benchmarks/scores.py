"""The metrics of the benchmark's tasks: `EvalPrediction -> number`, from logits.

Metrics that read another column are given `label_ids` as a tuple: labels [n] and group [n], both counted from 0;
labels and amount [n]; labels and treatment [n].
"""

from __future__ import annotations

import functools
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
from scipy.special import softmax
from scipy.stats import spearmanr
from sklearn.metrics import average_precision_score, precision_recall_curve
from transformers import EvalPrediction

PRECISION = 0.6  # of `recall_at_precision`
TOLERATED_GAP = 0.05  # of `fair_accuracy`
CALL_COST = 10.0  # of `profit`, in the unit of the amounts
TREATMENT_COST, PROPENSITY = 0.02, 0.5  # of `policy_value`; the propensity is the share of treated rows


def _decisions(prediction: EvalPrediction) -> tuple[np.ndarray, np.ndarray]:
    return prediction.predictions.argmax(-1), prediction.label_ids


def _recalls(prediction: EvalPrediction) -> np.ndarray:
    """[classes]; of the classes that occur."""
    decided, labels = _decisions(prediction)
    totals = np.bincount(labels)
    hits = np.bincount(labels[decided == labels], minlength=len(totals))
    return hits[totals > 0] / totals[totals > 0]


def misclassification(prediction: EvalPrediction) -> float:
    decided, labels = _decisions(prediction)
    return float((decided != labels).mean())


def worst_class_recall(prediction: EvalPrediction) -> float:
    return float(_recalls(prediction).min())


def g_mean(prediction: EvalPrediction) -> float:
    """The geometric mean of the classes' recalls."""
    return float(_recalls(prediction).prod() ** (1 / prediction.predictions.shape[-1]))


def macro_auprc(prediction: EvalPrediction) -> float:
    """Average precision of each class against the rest, averaged over the classes."""
    scores, labels = softmax(prediction.predictions, -1), prediction.label_ids
    return float(np.mean([average_precision_score(labels == c, scores[:, c]) for c in np.unique(labels)]))


def _counts(prediction: EvalPrediction) -> tuple[int, ...]:
    """True negatives, false positives, false negatives, true positives. Much faster than scikit-learn's checks."""
    decided, labels = _decisions(prediction)
    return tuple(np.bincount(2 * labels + decided, minlength=4).tolist())


def f1(prediction: EvalPrediction) -> float:
    """0 where nothing is positive, neither in truth nor by decision."""
    _, fp, fn, tp = _counts(prediction)
    return 2 * tp / max(2 * tp + fp + fn, 1)


def mcc(prediction: EvalPrediction) -> float:
    """Matthews' correlation; 0 where it is not defined."""
    tn, fp, fn, tp = _counts(prediction)
    return (tp * tn - fp * fn) / math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn) or 1)


def recall_at_precision(prediction: EvalPrediction) -> float:
    """The greatest recall of any threshold whose precision is at least `PRECISION`."""
    margin = prediction.predictions[:, 1] - prediction.predictions[:, 0]
    precision, recall, _ = precision_recall_curve(prediction.label_ids, margin)
    return float(recall[precision >= PRECISION].max())


def spearman(prediction: EvalPrediction) -> float:
    """Rank correlation of predicted and true numbers; 0 where all predictions are equal."""
    predicted = prediction.predictions.reshape(-1)
    return float(spearmanr(predicted, prediction.label_ids).statistic) if np.ptp(predicted) else 0.0


def each_label_in_each_group(labels: np.ndarray, group: np.ndarray) -> np.ndarray:
    """[n]: another number for every label in every group."""
    return labels * (group.max() + 1) + group


def _worst_accuracy(right: np.ndarray, of: np.ndarray) -> float:
    """The least share of `right` [n] among the examples of one number in `of` [n]; of the numbers that occur."""
    totals = np.bincount(of)
    return float((np.bincount(of, right)[totals > 0] / totals[totals > 0]).min())


def worst_group_accuracy(prediction: EvalPrediction) -> float:
    """The worst of the accuracies of each label in each group (Sagawa et al. 2020)."""
    labels, group = prediction.label_ids
    right = prediction.predictions.argmax(-1) == labels
    return _worst_accuracy(right, each_label_in_each_group(labels, group))


def worst_camera_accuracy(prediction: EvalPrediction) -> float:
    """The worst of the groups' accuracies, over all labels."""
    labels, group = prediction.label_ids
    return _worst_accuracy(prediction.predictions.argmax(-1) == labels, group)


def equalized_odds_gap(decided: np.ndarray, labels: np.ndarray, group: np.ndarray) -> float:
    """The greater of the groups' greatest differences in true and in false positive rate.

    As fairlearn's `equalized_odds_difference`, and a hundred times as fast.

    Args:
        decided, labels: [n] 0 or 1.
        group: [n]; each of them has examples of both labels.
    """
    cells = 2 * group + labels
    totals, positive = np.bincount(cells), np.bincount(cells, decided)
    rates = (positive[totals > 0] / totals[totals > 0]).reshape(-1, 2)
    return float(np.ptp(rates, axis=0).max())


def fair_accuracy(prediction: EvalPrediction) -> float:
    """Accuracy, minus how far the equalised-odds gap between the groups exceeds `TOLERATED_GAP`."""
    (labels, group), decided = prediction.label_ids, prediction.predictions.argmax(-1)
    gap = equalized_odds_gap(decided, labels, group)
    return float((decided == labels).mean()) - max(0.0, gap - TOLERATED_GAP)


def profit(prediction: EvalPrediction) -> float:
    """Mean profit per row: a call costs `CALL_COST`, and a call to a row of label 1 earns the row's amount."""
    (labels, amount), decided = prediction.label_ids, prediction.predictions.argmax(-1)
    return float((decided * (labels * amount - CALL_COST)).mean())


def policy_value(prediction: EvalPrediction) -> float:
    """Mean outcome if the rows of decision 1, and no others, are treated, minus `TREATMENT_COST` for each of these.

    The mean is estimated by inverse propensity weighting (Horvitz and Thompson 1952): a row counts where its random
    treatment is the decision. The labels are the outcomes.
    """
    (outcomes, treatment), decided = prediction.label_ids, prediction.predictions.argmax(-1)
    propensity = np.where(decided == 1, PROPENSITY, 1 - PROPENSITY)
    return float((outcomes * (treatment == decided) / propensity - TREATMENT_COST * decided).mean())


@functools.cache
def _accountant() -> subprocess.Popen:
    """One process for all questions of this one; it ends when its input is closed."""
    script = Path(__file__).with_name("opaque_cost.py")
    return subprocess.Popen(
        [sys.executable, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    )


def opaque_cost(prediction: EvalPrediction) -> float:
    """What another process answers; see `opaque_cost.py`."""
    digits = ("".join(column.astype(int).astype(str)) for column in _decisions(prediction))
    process = _accountant()
    process.stdin.write(" ".join(digits) + "\n")
    process.stdin.flush()
    return float(process.stdout.readline())
