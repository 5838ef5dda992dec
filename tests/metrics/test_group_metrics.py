"""Metrics that are given groups: against fairlearn, by hand, at the edges, and as a run calls them."""

import evaluate
import numpy as np
import pytest
from metric_names import OF_GROUPS
from sklearn.metrics import accuracy_score
from transformers import EvalPrediction

from metricopt_hf import MetricError
from metricopt_hf.evaluation.modules import resolve
from metricopt_hf.metrics import greater_is_better, path


def grouped(rng, classes, groups, examples=300):
    references, of = rng.integers(0, classes, examples), rng.integers(0, groups, examples)
    right = rng.random(examples) < 0.9 - 0.15 * of  # some groups fare worse
    predictions = np.where(right, references, rng.integers(0, classes, examples))
    return {"predictions": predictions, "references": references, "groups": of}


@pytest.mark.parametrize("classes, groups", [(2, 2), (2, 4), (5, 3)])
def test_worst_group_accuracy_matches_fairlearn(metrics, rng, classes, groups):
    frames = pytest.importorskip("fairlearn.metrics")
    batch = grouped(rng, classes, groups)
    columns = [batch["groups"], np.c_[batch["groups"], batch["references"]]]
    for by_label, features in zip([False, True], columns, strict=True):
        frame = frames.MetricFrame(
            metrics=accuracy_score,
            y_true=batch["references"],
            y_pred=batch["predictions"],
            sensitive_features=features,
        )
        result = metrics["worst_group_accuracy"].compute(**batch, by_label=by_label)
        assert result == {"worst_group_accuracy": pytest.approx(frame.group_min())}


@pytest.mark.parametrize("groups", [2, 3, 5])
def test_equalized_odds_gap_matches_fairlearn(metrics, rng, groups):
    fairlearn_metrics = pytest.importorskip("fairlearn.metrics")
    batch = grouped(rng, 2, groups)
    expected = fairlearn_metrics.equalized_odds_difference(
        batch["references"], batch["predictions"], sensitive_features=batch["groups"]
    )
    assert expected > 0.05
    assert metrics["equalized_odds_gap"].compute(**batch) == {"equalized_odds_gap": pytest.approx(expected)}


def test_group_metrics_by_hand(metrics):
    # Group 0: right, right, wrong. Group -7 (any integer will do): wrong, right.
    batch = {"predictions": [0, 2, 1, 2, 1], "references": [0, 2, 2, 0, 1], "groups": [0, 0, 0, -7, -7]}
    assert metrics["worst_group_accuracy"].compute(**batch) == {"worst_group_accuracy": 0.5}
    assert metrics["worst_group_accuracy"].compute(**batch, by_label=True) == {"worst_group_accuracy": 0.0}
    # Of class 0 both groups have an example: predicted 0 always in one, never in the other. Classes 1 and 2: one group.
    assert metrics["equalized_odds_gap"].compute(**batch) == {"equalized_odds_gap": 1.0}


@pytest.mark.parametrize("name", OF_GROUPS)
def test_group_metrics_refuse(metrics, name):
    with pytest.raises(ValueError, match="groups hold missing"):
        metrics[name].compute(predictions=[0, 1], references=[0, 1], groups=[0, None])
    with pytest.raises(ValueError, match="groups"):
        metrics[name].compute(predictions=[0, 1], references=[0, 1])


def test_equalized_odds_gap_needs_something_to_compare(metrics):
    with pytest.raises(ValueError, match="no true class has examples in two groups"):
        metrics["equalized_odds_gap"].compute(predictions=[0, 1], references=[0, 1], groups=[0, 1])


@pytest.mark.parametrize("name", OF_GROUPS)
def test_group_metrics_read_the_second_label_column(rng, name):
    batch = grouped(rng, 3, 2)
    logits = np.eye(3)[batch["predictions"]]
    metric = resolve(name, greater_is_better(name))
    value = metric(EvalPrediction(logits, (batch["references"], batch["groups"])))
    assert value == pytest.approx(evaluate.load(path(name)).compute(**batch)[name])
    with pytest.raises(MetricError, match=r"got 1 label column\(s\): say label_names=\["):
        metric(EvalPrediction(logits, batch["references"]))
    # a metric without groups looks at the first column
    accuracy = 1 - resolve("misclassification", False)(EvalPrediction(logits, (batch["references"], batch["groups"])))
    assert accuracy == pytest.approx((batch["predictions"] == batch["references"]).mean())
