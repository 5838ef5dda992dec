"""The metrics of the benchmark's tasks: `EvalPrediction -> number`, from logits."""

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
