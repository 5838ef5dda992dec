"""Metrics of decisions and of scores of classes: against scikit-learn, by hand, and at the edges."""

import numpy as np
import pytest
from metric_names import PER_CLASS
from sklearn.metrics import average_precision_score, recall_score, zero_one_loss
from sklearn.preprocessing import label_binarize

# ---- worst_class_recall and g_mean


@pytest.mark.parametrize("classes, examples", [(2, 30), (7, 400), (40, 200)])
def test_per_class_recall_matches_scikit_learn(metrics, rng, classes, examples):
    references = rng.integers(0, classes, examples)
    predictions = np.where(rng.random(examples) < 0.7, references, rng.integers(0, classes, examples))
    recalls = recall_score(references, predictions, labels=np.unique(references), average=None)
    worst = metrics["worst_class_recall"].compute(predictions=predictions, references=references)
    g_mean = metrics["g_mean"].compute(predictions=predictions, references=references)
    assert worst == {"worst_class_recall": pytest.approx(recalls.min())}
    assert g_mean == {"g_mean": pytest.approx(recalls.prod() ** (1 / len(recalls)))}


def test_per_class_recall_by_hand(metrics):
    # Recalls: class 0 3/4, class 1 1/2, class 2 1.
    batch = {"predictions": [0, 0, 0, 1, 1, 2, 2], "references": [0, 0, 0, 0, 1, 1, 2]}
    assert metrics["worst_class_recall"].compute(**batch) == {"worst_class_recall": 0.5}
    assert metrics["g_mean"].compute(**batch)["g_mean"] == pytest.approx(0.375 ** (1 / 3))


@pytest.mark.parametrize("name", PER_CLASS)
@pytest.mark.parametrize(
    "predictions, references, value",
    [
        ([0, 3, 3], [0, 3, 3], 1.0),  # classes 1 and 2 are absent
        ([0, 1], [0, 0], 0.5),  # class 1 is predicted but absent: a miss, not a class
        ([5], [5], 1.0),  # a single class, a single example
        ([0, 0, 0], [0, 0, 1], 0.0),  # one class missed altogether
    ],
)
def test_per_class_recall_at_the_edges(metrics, name, predictions, references, value):
    assert metrics[name].compute(predictions=predictions, references=references) == {name: pytest.approx(value)}


def test_g_mean_of_many_classes_does_not_underflow(metrics):
    references = np.repeat(np.arange(2000), 10)
    predictions = np.where(np.arange(20000) % 10 == 0, references, references + 1)  # recall 0.1, 2000 times
    g_mean = metrics["g_mean"].compute(predictions=predictions, references=references)
    assert g_mean == {"g_mean": pytest.approx(0.1)}


@pytest.mark.parametrize("name", PER_CLASS)
@pytest.mark.parametrize(
    "predictions, references, message",
    [
        ([0, 1], [0, -100], "references hold the label -100"),
        ([0, -100], [0, 1], "predictions hold the label -100"),
        ([0, None], [0, 1], "predictions hold missing"),
        ([0, 1], [None, 1], "references hold missing"),
        ([float("nan"), 1], [0, 1], "NaN"),
        ([0, 1, 1], [0, 1], "Mismatch"),
    ],
)
def test_per_class_recall_refuses(metrics, name, predictions, references, message):
    with pytest.raises(ValueError, match=message):
        metrics[name].compute(predictions=predictions, references=references)
    assert metrics[name].compute(predictions=[0, 1], references=[0, 1]) == {name: 1.0}  # still usable


def test_batches_add_up(metrics):
    metrics["g_mean"].add_batch(predictions=[0, 0], references=[0, 1])
    metrics["g_mean"].add_batch(predictions=[1], references=[1])
    assert metrics["g_mean"].compute() == {"g_mean": pytest.approx(0.5**0.5)}


# ---- macro_auprc


@pytest.mark.parametrize("classes, examples", [(3, 50), (10, 500)])
@pytest.mark.parametrize("decimals", [1, 12])  # one decimal: many ties
def test_macro_auprc_matches_scikit_learn(metrics, rng, classes, examples, decimals):
    references = np.r_[np.arange(classes), rng.integers(0, classes, examples - classes)]
    scores = (rng.normal(size=(examples, classes)) + 1.5 * np.eye(classes)[references]).round(decimals)
    expected = average_precision_score(label_binarize(references, classes=range(classes)), scores, average="macro")
    result = metrics["macro_auprc"].compute(prediction_scores=scores, references=references)
    assert result == {"macro_auprc": pytest.approx(expected)}


def test_macro_auprc_of_binary_scores_is_that_of_class_1(metrics, rng):
    references = rng.integers(0, 2, 200)
    scores = rng.normal(size=200) + references
    one = metrics["macro_auprc"].compute(prediction_scores=scores, references=references)
    both = metrics["macro_auprc"].compute(prediction_scores=np.c_[-scores, scores], references=references)
    of_1, of_0 = average_precision_score(references, scores), average_precision_score(1 - references, -scores)
    assert one == {"macro_auprc": pytest.approx(of_1)}
    assert both == {"macro_auprc": pytest.approx((of_0 + of_1) / 2)}


def test_macro_auprc_by_hand(metrics):
    # In order of score: hit, miss, hit. Precision 1 at recall 1/2, then 2/3 at recall 1.
    result = metrics["macro_auprc"].compute(prediction_scores=[0.9, 0.5, 0.1], references=[1, 0, 1])
    assert result == {"macro_auprc": pytest.approx((1 + 2 / 3) / 2)}


def test_macro_auprc_leaves_absent_classes_out(metrics):
    scores = np.array([[0.9, 0.0, 0.3], [0.8, 0.0, 0.9], [0.7, 1.0, 0.2]])
    result = metrics["macro_auprc"].compute(prediction_scores=scores, references=[0, 2, 0])
    assert result == {"macro_auprc": pytest.approx(((1 + 2 / 3) / 2 + 1) / 2)}


def test_macro_auprc_of_a_single_class_is_1(metrics):
    result = metrics["macro_auprc"].compute(prediction_scores=[[0.1, 0.9], [0.7, 0.3]], references=[0, 0])
    assert result == {"macro_auprc": 1.0}


@pytest.mark.parametrize(
    "scores, references, message",
    [
        ([0.1, 0.2], [0, 0], "no reference is of class 1"),
        ([0.1, 0.2], [0, 2], "run from 0 to 2"),
        ([[0.1, 0.2], [0.1, 0.2]], [0, -100], "run from -100 to 0"),
        ([[0.1, 0.2], [0.1, 0.2]], [0, None], "references hold missing"),
        ([[0.1, 0.2], [0.1, float("nan")]], [0, 1], r"scores of example 1 are \[0\.1 nan\]"),
        ([0.1, float("inf")], [0, 1], "scores of example 1 are inf"),
        ([[0.1, 0.2], [0.1, None]], [0, 1], "scores of example 1"),
        ([[0.1, 0.2], [0.1]], [0, 1], r"have \[1, 2\] scores"),
        ([[0.1], [0.2]], [0, 0], "row of 1 scores"),
    ],
)
def test_macro_auprc_refuses(metrics, scores, references, message):
    with pytest.raises(ValueError, match=message):
        metrics["macro_auprc"].compute(prediction_scores=scores, references=references)


# ---- misclassification


def test_misclassification(metrics, rng):
    references, predictions = rng.integers(0, 5, 200), rng.integers(0, 5, 200)
    result = metrics["misclassification"].compute(predictions=predictions, references=references)
    assert result == {"misclassification": pytest.approx(zero_one_loss(references, predictions))}
    with pytest.raises(ValueError, match="references hold missing"):
        metrics["misclassification"].compute(predictions=[0, 1], references=[None, 1])
