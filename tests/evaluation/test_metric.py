"""Metric: what goes into the black box, and what may come out."""

import threading
import time

import numpy as np
import pytest
import torch
from transformers import EvalPrediction

from metricopt_hf.errors import MetricError
from metricopt_hf.evaluation.metric import Metric, takes_batches
from metricopt_hf.evaluation.modules import resolve

LOGITS = np.array([[2.0, 0.0, -1.0], [0.0, 1.0, 0.5], [0.1, 0.0, 3.0], [1.0, 0.0, 0.9]], np.float32)
LABELS = np.array([0, 1, 2, 2])
PREDICTION = EvalPrediction(LOGITS, LABELS)


def returning(result, **kwargs):
    return Metric(lambda prediction: result, "f1", **kwargs)


# ---- what comes out


@pytest.mark.parametrize(
    "result",
    [
        0.5,
        np.float32(0.5),
        np.array(0.5),
        np.array([[0.5]]),
        torch.tensor(0.5, requires_grad=True),
        torch.tensor([0.5], dtype=torch.bfloat16),
        {"f1": 0.5, "loss": 2.0},
        {"eval_f1": 0.5, "loss": 2.0},
        {"whatever": 0.5},
    ],
    ids=repr,
)
def test_one_number_is_a_python_float(result):
    score = returning(result)(PREDICTION)
    assert type(score) is float and score == 0.5


def test_the_name_may_carry_trainers_prefix():
    assert Metric(lambda p: {"f1": 1, "loss": 2}, "eval_f1")(PREDICTION) == 1.0


def test_a_key_that_was_asked_for_must_be_there():
    def accuracy(prediction):
        return {"accuracy": 0.5}

    assert resolve(accuracy, True)(PREDICTION) == Metric(accuracy, "accuracy", exact=True)(PREDICTION) == 0.5
    with pytest.raises(MetricError, match=r"none of which is 'other'.*metric_for_best_model"):
        Metric(accuracy, "other", exact=True)(PREDICTION)


def test_whole_numbers_and_decisions_count_as_numbers():
    assert returning(3)(PREDICTION) == 3.0 and returning(np.bool_(True))(PREDICTION) == 1.0


@pytest.mark.parametrize(
    ("result", "remedy"),
    [
        ("0.5", "one number, got '0.5'"),
        (None, "one number, got None"),
        (1j, "one number"),
        ([0.1, 0.2], "one number per class, return the mean"),
        (np.zeros(3), "average"),
        ([[1.0, 2.0], [3.0]], "average"),
        ({"f1": [0.1, 0.2]}, "average"),
        ([], "one number"),
        (float("nan"), "nan.*not defined.*zero_division"),
        (-np.inf, "-inf.*not a finite number"),
        ({"recall": 1.0, "loss": 2.0}, "keys.*recall.*metric_for_best_model"),
        ({}, "keys"),
        ({"a": 1.0, 2: 2.0}, "keys"),
    ],
    ids=repr,
)
def test_anything_else_is_refused_with_a_remedy(result, remedy):
    with pytest.raises(MetricError, match=remedy):
        returning(result)(PREDICTION)


def test_an_error_of_the_metric_is_told_with_its_name():
    with pytest.raises(MetricError, match="'f1' raised ZeroDivisionError") as caught:
        Metric(lambda p: 1 / 0, "f1")(PREDICTION)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_a_metric_that_changes_its_inputs_changes_a_copy():
    def spoil(prediction):
        prediction.predictions[:] = 0
        prediction.label_ids[:] = 0
        return 0.0

    prediction = EvalPrediction(LOGITS.copy(), LABELS.copy())
    Metric(spoil, "spoil")(prediction)
    assert np.array_equal(prediction.predictions, LOGITS) and np.array_equal(prediction.label_ids, LABELS)


@pytest.mark.parametrize(("greater_is_better", "sign"), [(True, 1), (False, -1)])
def test_the_sign_says_which_way_is_better(greater_is_better, sign):
    assert returning(0.5, greater_is_better=greater_is_better).sign == sign


# ---- time limit


def test_a_call_in_time_gives_its_result_or_its_error():
    assert returning(0.5, timeout=30)(PREDICTION) == 0.5
    with pytest.raises(MetricError, match="ZeroDivisionError"):
        Metric(lambda p: 1 / 0, "f1", timeout=30)(PREDICTION)


def test_a_call_that_takes_too_long_is_abandoned_and_not_repeated_before_it_is_back():
    release, calls = threading.Event(), []

    def stuck(prediction):
        calls.append(prediction)
        return 0.5 if release.wait(30) else None

    metric = Metric(stuck, "stuck", timeout=0.05)
    start = time.perf_counter()
    with pytest.raises(MetricError, match="metric_timeout=0.05"):
        metric(PREDICTION)
    with pytest.raises(MetricError, match="has not come back"):
        metric(PREDICTION)
    assert len(calls) == 1 and time.perf_counter() - start < 10

    release.set()
    for thread in threading.enumerate():
        if thread.name == "metric stuck":
            thread.join(30)
    metric.timeout = 30
    assert metric(PREDICTION) == 0.5


# ---- compute_metrics written for batch_eval_metrics


class Batchwise:
    """Accuracy, gathered over batches as for Trainer's `batch_eval_metrics`; it fails on the calls in `faulty`."""

    def __init__(self, faulty=()):
        self.right, self.rows, self.calls, self.faulty = 0, [], 0, faulty

    def __call__(self, prediction, compute_result):
        assert isinstance(prediction.predictions, torch.Tensor) and isinstance(prediction.label_ids, torch.Tensor)
        self.calls += 1
        if self.calls - 1 in self.faulty:
            raise RuntimeError("down")
        self.right += int((prediction.predictions.argmax(-1) == prediction.label_ids).sum())
        self.rows.append(len(prediction.label_ids))
        if compute_result:
            result = {"accuracy": self.right / sum(self.rows)}
            self.right, self.rows = 0, []
            return result


def batches():
    logits, labels = torch.as_tensor(LOGITS), torch.as_tensor(LABELS)
    return (EvalPrediction(logits[i : i + 3], labels[i : i + 3]) for i in (0, 3))


def test_a_batchwise_metric_is_given_batch_by_batch_or_the_whole_set_as_its_last():
    assert takes_batches(Batchwise()) and not takes_batches(lambda prediction: 0.5)
    metric = Metric(Batchwise(), "accuracy", batchwise=True)
    assert metric.over(batches()) == 0.75 and metric.function.calls == 2
    assert metric(PREDICTION) == 0.75 and metric.function.calls == 3


@pytest.mark.parametrize("call", [0, 1])
def test_after_a_failed_batch_nothing_is_left_for_the_next_set(call):
    metric = Metric(Batchwise(faulty={call}), "accuracy", batchwise=True)
    with pytest.raises(MetricError, match="RuntimeError: down"):
        metric.over(batches())
    assert metric.over(batches()) == 0.75


def test_what_is_made_of_predictions_first_is_made_of_a_copy_and_its_errors_are_the_metric_s():
    def spoil(prediction):
        prediction.predictions[:] = 0
        return EvalPrediction(["a"], ["a"])

    prediction = EvalPrediction(LOGITS.copy(), LABELS)
    assert Metric(lambda p: float(p.predictions == ["a"]), "same")(prediction, spoil) == 1.0
    assert np.array_equal(prediction.predictions, LOGITS)
    with pytest.raises(MetricError, match="'same' raised ZeroDivisionError"):
        Metric(lambda p: 0.5, "same")(prediction, lambda p: 1 / 0)
