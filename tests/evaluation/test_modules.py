"""Metrics from `evaluate` modules: what they are fed, how they are found, and their short way without Arrow files."""

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
from metricopt_hf.evaluation.modules import TRIED, DirectModule, from_evaluate, resolve

LOGITS = np.array([[2.0, 0.0, -1.0], [0.0, 1.0, 0.5], [0.1, 0.0, 3.0], [1.0, 0.0, 0.9]], np.float32)
LABELS = np.array([0, 1, 2, 2])
PREDICTION = EvalPrediction(LOGITS, LABELS)


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
        with pytest.raises(MetricError, match="no predictions"):
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


# ---- the short way


RNG = np.random.default_rng(0)
CLASSES, SCORES = RNG.integers(0, 3, (2, 200)), RNG.random((200, 3))
EMBEDDINGS, GROUPS = RNG.normal(size=(60, 4)), RNG.integers(0, 2, 200)
BINARY = {"predictions": CLASSES[0] % 2, "references": CLASSES[1] % 2, "groups": GROUPS}
ARGUMENTS = {
    "worst_group_accuracy": BINARY,
    "equalized_odds_gap": BINARY,
    "macro_auprc": {"prediction_scores": SCORES / SCORES.sum(1, keepdims=True), "references": CLASSES[1]},
    "map_at_r": {"predictions": EMBEDDINGS, "references": CLASSES[1][:60]},
    "recall_at_k": {"predictions": EMBEDDINGS, "references": CLASSES[1][:60]},
}


def long_calls(module):
    """A list that grows with each call of the module's own `compute`."""
    calls, compute = [], module.compute
    module.compute = lambda **arguments: (calls.append(0), compute(**arguments))[1]
    return calls


@pytest.mark.parametrize("name", metrics.names())
def test_every_shipped_module_takes_the_short_way_with_the_same_result(name):
    module = evaluate.load(metrics.path(name), keep_in_memory=True)
    arguments = ARGUMENTS.get(name, {"predictions": CLASSES[0], "references": CLASSES[1]})
    expected, direct = module.compute(**arguments), DirectModule(module)
    calls = long_calls(module)
    results = [direct.compute(**arguments) for _ in range(TRIED + 2)]
    assert len(calls) == TRIED and all(result == expected for result in results)


class Own(evaluate.Metric):
    """Truncates nothing by itself; `kind` says what it does with its inputs."""

    kind = "count"

    def _info(self):
        features = datasets.Features({"predictions": datasets.Value("int32"), "references": datasets.Value("int32")})
        return evaluate.MetricInfo(description="", citation="", inputs_description="", features=features)

    def _compute(self, predictions, references, scale=1.0):
        if self.kind == "lists":
            return {"own": float(isinstance(predictions, list))}
        if self.kind == "fails on arrays" and isinstance(predictions, np.ndarray):
            raise TypeError("no arrays, please")
        return {"own": scale * float(np.mean(np.asarray(predictions) == np.asarray(references)))}


@pytest.mark.parametrize("kind", ["lists", "fails on arrays"])
def test_where_the_short_way_differs_or_fails_the_long_one_is_taken(kind):
    module = Own()
    module.kind = kind
    direct = DirectModule(module)
    arguments = {"predictions": CLASSES[0], "references": CLASSES[1]}
    expected, calls = module.compute(**arguments), long_calls(module)
    results = [direct.compute(**arguments) for _ in range(TRIED + 2)]
    assert len(calls) == TRIED + 2 and all(result == expected for result in results)


def test_values_are_cast_as_the_features_say_and_other_arguments_go_through():
    module, halves = Own(), CLASSES[0] + 0.4
    direct = DirectModule(module)
    expected = module.compute(predictions=halves, references=CLASSES[1], scale=2.0)
    calls = long_calls(module)
    for _ in range(TRIED + 2):
        assert direct.compute(predictions=halves, references=CLASSES[1], scale=2.0) == expected
    assert len(calls) == TRIED
