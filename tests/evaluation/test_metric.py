"""Metric: what goes into the black box, and what may come out."""

import threading
import time

import datasets
import evaluate
import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score
from transformers import EvalPrediction

from metricopt_hf import metrics
from metricopt_hf.errors import ConfigurationError, MetricError
from metricopt_hf.evaluation.metric import Metric, from_evaluate, resolve, takes_batches

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
    metric._abandoned.join(30)
    metric.timeout = 30
    assert metric(PREDICTION) == 0.5


# ---- evaluate modules


class Echo(evaluate.Metric):
    """Keeps what it was called with."""

    features = datasets.Features({"predictions": datasets.Value("int32"), "references": datasets.Value("int32")})

    def _info(self):
        return evaluate.MetricInfo(
            description="", citation="", inputs_description="", features=type(self).features, module_name="echo"
        )

    def _compute(self, references, scale=1.0, **columns):
        (self.predictions,) = columns.values()
        self.references = references
        return {"echo": scale * len(references), "other": 2.0}


def takes(**features):
    return type("Echo", (Echo,), {"features": datasets.Features({**features, "references": datasets.Value("int32")})})


INTEGERS = Echo
NUMBERS = takes(predictions=datasets.Value("float32"))
SCORES = takes(prediction_scores=datasets.Value("float32"))
SCORES_PER_CLASS = takes(prediction_scores=datasets.List(datasets.Value("float32")))
TEXTS = takes(predictions=datasets.Value("string"))
SEVERAL = type(
    "Echo",
    (Echo,),
    {
        "features": datasets.Features(
            {
                "predictions": datasets.List(datasets.Value("int32")),
                "references": datasets.List(datasets.Value("int32")),
            }
        )
    },
)


def named(module, key="echo", **options):
    """A metric from a module of which one number is wanted."""
    metric = from_evaluate(module, **options)
    metric.name = key
    return metric


def fed(kind, predictions, labels, inputs="auto"):
    """What an evaluate module of this kind gets of predictions and labels."""
    module = kind(keep_in_memory=True)
    metric = named(module, inputs=inputs)
    metric(EvalPrediction(np.asarray(predictions, np.float32), np.asarray(labels)))
    return np.asarray(module.predictions), np.asarray(module.references)


SOFTMAX = torch.softmax(torch.tensor(LOGITS), -1).numpy()


@pytest.mark.parametrize(
    ("kind", "predictions", "labels", "expected"),
    [
        (INTEGERS, LOGITS, LABELS, [0, 1, 2, 0]),
        (INTEGERS, [[0.2], [-0.2]], [1, 1], [1, 0]),  # a single logit
        (INTEGERS, [0.2, -0.2], [1, 1], [1, 0]),
        (NUMBERS, [[0.2], [-0.2]], [1, 1], [0.2, -0.2]),  # regression
        (NUMBERS, [0.2, -0.2], [1, 1], [0.2, -0.2]),
        (SCORES, LOGITS[:, :2], LABELS, torch.sigmoid(torch.tensor(LOGITS[:, 1] - LOGITS[:, 0])).numpy()),
        (SCORES, [[0.0], [20.0]], [1, 1], [0.5, 1.0]),
        (SCORES_PER_CLASS, LOGITS, LABELS, SOFTMAX),
        (SEVERAL, [[3.0, -1.0], [-2.0, 4.0]], [[1.0, 0.0], [1.0, 1.0]], [[1, 0], [0, 1]]),  # multi-label
    ],
)
def test_predictions_become_what_the_module_takes(kind, predictions, labels, expected):
    got, references = fed(kind, predictions, labels)
    assert got.shape == np.shape(expected) and np.allclose(got, expected, atol=1e-6)
    assert references.tolist() == np.asarray(labels).tolist()


def test_scores_of_several_labels_are_a_sigmoid_each():
    several = takes(prediction_scores=datasets.List(datasets.Value("float32")))
    several.features["references"] = datasets.List(datasets.Value("int32"))
    got, _ = fed(several, [[0.0, 20.0], [-20.0, 0.0]], [[1, 0], [0, 1]])
    assert np.allclose(got, [[0.5, 1.0], [0.0, 0.5]])


def test_ignored_tokens_are_left_out():
    logits = np.zeros((2, 3, 4), np.float32)
    logits[:, :, 1] = 1
    got, references = fed(INTEGERS, logits, [[0, 1, -100], [2, -100, -100]])
    assert got.tolist() == [1, 1, 1] and references.tolist() == [0, 1, 2]


def test_decisions_made_before_are_taken_as_they_are():
    module = INTEGERS(keep_in_memory=True)
    named(module)(EvalPrediction(np.array([2, 1, 0, 0]), LABELS))
    assert np.asarray(module.predictions).tolist() == [2, 1, 0, 0]


def test_logits_are_the_first_of_several_outputs():
    module = INTEGERS(keep_in_memory=True)
    named(module)(EvalPrediction((LOGITS, np.zeros((4, 9))), LABELS))
    assert np.asarray(module.predictions).tolist() == [0, 1, 2, 0]


def test_inputs_can_be_asked_for_or_made_by_a_function():
    got, _ = fed(NUMBERS, LOGITS, LABELS, inputs="argmax")
    assert got.tolist() == [0, 1, 2, 0]
    got, _ = fed(NUMBERS, LOGITS, LABELS, lambda p: {"predictions": p.predictions[:, 0], "references": p.label_ids})
    assert np.allclose(got, LOGITS[:, 0])


def test_kwargs_reach_the_module_and_of_several_numbers_one_must_be_named():
    assert named(INTEGERS(), "other")(PREDICTION) == 2.0
    assert named(INTEGERS(), kwargs={"scale": 0.5})(PREDICTION) == 2.0
    with pytest.raises(MetricError, match=r"echo.*other.*metric_for_best_model"):
        named(INTEGERS(), "third")(PREDICTION)


def test_texts_need_a_function_and_unknown_inputs_are_listed():
    with pytest.raises(ConfigurationError, match="metric_inputs as a function"):
        from_evaluate(TEXTS())
    with pytest.raises(ConfigurationError, match="argmax, scores, identity"):
        from_evaluate(INTEGERS(), inputs="logits")


# ---- whatever a user may name


@pytest.mark.parametrize("how", ["name", "path", "module"])
def test_a_module_is_found_by_name_path_or_as_itself(how):
    path = metrics.path("worst_class_recall")
    named = {"name": "worst_class_recall", "path": path, "module": lambda: evaluate.load(path)}[how]
    metric = resolve(named() if callable(named) else named, greater_is_better=True)
    assert metric.name == "worst_class_recall"
    assert metric(PREDICTION) == 0.5


@pytest.mark.parametrize("name", metrics.names())
def test_every_shipped_module_takes_logits(name):
    told_groups = name in ("worst_group_accuracy", "equalized_odds_gap")
    labels = (LABELS, np.arange(len(LABELS)) % 2) if told_groups else LABELS
    assert 0 <= resolve(name, greater_is_better=True)(EvalPrediction(PREDICTION.predictions, labels)) <= 1


def test_after_an_error_a_loaded_module_is_right_again_and_at_once():
    metric = resolve("worst_class_recall", greater_is_better=True, timeout=30)
    for _ in range(2):
        with pytest.raises(MetricError, match="no examples"):
            metric(EvalPrediction(LOGITS[:0], LABELS[:0]))
        start = time.perf_counter()
        assert metric(PREDICTION) == 0.5
        assert time.perf_counter() - start < 0.9  # waiting for a stale lock takes a second


def test_a_callable_is_named_after_itself_and_a_metric_stays():
    def macro_f1(prediction):
        return f1_score(prediction.label_ids, prediction.predictions.argmax(-1), average="macro")

    metric = resolve(macro_f1, greater_is_better=False, timeout=3)
    assert (metric.name, metric.greater_is_better, metric.timeout) == ("macro_f1", False, 3)
    assert metric(PREDICTION) == pytest.approx((2 / 3 + 1 + 2 / 3) / 3)
    assert resolve(metric, greater_is_better=True) is metric


def test_what_cannot_be_resolved_is_answered_with_what_can(monkeypatch):
    def not_found(*args, **kwargs):
        raise FileNotFoundError("nowhere")

    monkeypatch.setattr(evaluate, "load", not_found)  # without the seconds that it looks about
    with pytest.raises(ConfigurationError, match="nowhere.*recall_at_k"):
        resolve("no_such_metric", greater_is_better=True)
    with pytest.raises(ConfigurationError, match="metric=3 must be"):
        resolve(3, greater_is_better=True)


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
