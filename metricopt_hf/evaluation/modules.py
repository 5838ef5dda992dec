"""Metrics from `evaluate` modules: how predictions become their inputs, and their computation without Arrow files.

A module's `compute` writes and reads Arrow files. For 10,000 rows these take 20 ms and the arithmetic less than one; a
run makes a thousand calls (see `DirectModule`).
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import evaluate
import numpy as np
import torch
from transformers import EvalPrediction

from .. import metrics as shipped_metrics
from ..errors import ConfigurationError, MetricError
from .metric import Metric

INPUTS = ("auto", "argmax", "scores", "identity")
TRIED = 3  # calls that are made both ways before the short one is trusted


def resolve(
    metric: Any,
    greater_is_better: bool,
    inputs: str | Callable[[EvalPrediction], dict[str, Any]] = "auto",
    kwargs: dict[str, Any] | None = None,
    timeout: float | None = None,
) -> Metric:
    """A `Metric` from whatever a user may name: one, an `evaluate` module, a callable, or a module's name or path.

    A name is looked up as a path, among the modules shipped with this package, then on the Hub.

    Raises:
        ConfigurationError: nothing of that name can be loaded, or `metric` is none of these.
    """
    if isinstance(metric, Metric):
        return metric
    if isinstance(metric, (str, os.PathLike)):
        metric = load(os.fspath(metric))
    if isinstance(metric, evaluate.EvaluationModule):
        return from_evaluate(metric, greater_is_better, inputs, kwargs, timeout)
    if callable(metric):
        name = getattr(metric, "__name__", type(metric).__name__)
        return Metric(metric, name, greater_is_better, timeout)
    raise ConfigurationError(
        f"metric={metric!r} must be an evaluate module, its name or path, or a callable EvalPrediction -> number."
    )


def load(name: str) -> evaluate.EvaluationModule:
    """The module of a name or path, see `resolve`."""
    if not os.path.exists(name) and name in shipped_metrics.names():
        name = shipped_metrics.path(name)
    try:
        # in memory: the lock of a cache file would outlive an error, and hold up the next call
        return evaluate.load(name, keep_in_memory=True)
    except Exception as error:
        raise ConfigurationError(
            f"The evaluate module {name!r} could not be loaded ({type(error).__name__}: {error}). Give a path to a "
            f"local module, a name on the Hub, or one of those that come along: {', '.join(shipped_metrics.names())}."
        ) from error


def from_evaluate(
    module: evaluate.EvaluationModule,
    greater_is_better: bool = True,
    inputs: str | Callable[[EvalPrediction], dict[str, Any]] = "auto",
    kwargs: dict[str, Any] | None = None,
    timeout: float | None = None,
) -> Metric:
    """A metric from an `evaluate` module.

    Args:
        module: for instance `evaluate.load("f1")`.
        inputs: how predictions become the module's inputs.
            "argmax": class indices; token labels of -100 are left out. Multi-label: 1 where the logit is positive.
            "scores": softmax over the last axis (of two classes the second column; of a single logit, and multi-label,
            the sigmoid).
            "identity": predictions as they are, a trailing axis of 1 dropped.
            A function `EvalPrediction -> dict` gives the arguments of `module.compute` itself.
            "auto" reads the module's features: "scores" if it takes `prediction_scores`, "argmax" if it takes
            integer predictions, else "identity".
            Of several label columns (`label_names`) the first is the references; a module that takes `groups`, as
            `worst_group_accuracy` does, gets the second.
        kwargs: passed on to `module.compute`, for instance `{"average": "macro"}`.

    Raises:
        ConfigurationError: `inputs` is unknown, or the module takes texts and `inputs` is no function.
    """
    features = module.features[0] if isinstance(module.features, list) else module.features
    if not callable(inputs) and inputs not in INPUTS:
        raise ConfigurationError(f"metric_inputs={inputs!r} is none of {', '.join(INPUTS)}, nor a function.")
    wants = {name: getattr(feature, "feature", feature) for name, feature in features.items()}
    argument = "prediction_scores" if "prediction_scores" in wants else "predictions"
    dtype = str(getattr(wants.get(argument), "dtype", ""))
    if inputs == "auto":
        if dtype == "string":
            raise ConfigurationError(
                f"The evaluate module {module.name!r} compares texts: pass metric_inputs as a function "
                "EvalPrediction -> {'predictions': [...], 'references': [...]} that decodes them, "
                "or use a compute_metrics of your own."
            )
        if argument == "prediction_scores":
            inputs = "scores"
        else:
            inputs = "argmax" if dtype.startswith("int") else "identity"

    direct = DirectModule(module)

    def function(prediction: EvalPrediction) -> dict[str, float]:
        if callable(inputs):
            arguments = inputs(prediction)
        else:
            columns = prediction.label_ids if isinstance(prediction.label_ids, tuple) else (prediction.label_ids,)
            predictions, labels = _select(prediction.predictions, columns[0], inputs)
            arguments = {argument: predictions, "references": labels}
            if "groups" in wants:
                arguments["groups"] = _groups(module.name, columns)
        return direct.compute(**arguments, **(kwargs or {}))

    return Metric(function, module.name, greater_is_better, timeout)


def _groups(name: str, columns: Sequence[np.ndarray]) -> np.ndarray:
    """The label column of a prediction that holds the groups."""
    if len(columns) != 2:
        raise MetricError(
            f"The evaluate module {name!r} takes groups, beside labels, and got {len(columns)} label column(s): "
            'say label_names=["labels", "group"] in the config, and give observation and selection such a column.'
        )
    return columns[1]


def _select(predictions: Any, labels: np.ndarray, how: str) -> tuple[np.ndarray, np.ndarray]:
    if isinstance(predictions, (tuple, list)):
        predictions = predictions[0]  # models that also return hidden states put the logits first
    floating = np.issubdtype(predictions.dtype, np.floating)
    # a row of answers per example and a logit for each
    multilabel = floating and predictions.ndim > 1 < predictions.shape[-1] and predictions.shape == np.shape(labels)
    if how == "argmax":
        if multilabel:
            return (predictions > 0).astype(np.int64), labels.astype(np.int64)
        if predictions.ndim == labels.ndim + 1 and predictions.shape[-1] > 1:
            predictions = predictions.argmax(-1)
        elif floating:  # one logit
            predictions = (predictions.reshape(labels.shape) > 0).astype(np.int64)
        kept = labels != -100
        return predictions[kept], labels[kept]
    if how == "scores":
        if predictions.ndim == 1 or predictions.shape[-1] == 1:
            return _sigmoid(predictions.reshape(-1)), labels
        if multilabel:
            return _sigmoid(predictions), labels
        scores = torch.as_tensor(predictions).softmax(-1).numpy()
        return (scores[..., 1] if scores.shape[-1] == 2 else scores), labels
    if predictions.ndim > 1 and predictions.shape[-1] == 1:
        predictions = predictions.squeeze(-1)
    return predictions, labels


def _sigmoid(logits: np.ndarray) -> np.ndarray:
    return torch.as_tensor(logits).sigmoid().numpy()


class DirectModule:
    """An `evaluate` module whose `compute` takes the short way where that gives the same.

    The first calls are made both ways. If a result differs, or the short way raises, `compute` makes all calls.
    """

    def __init__(self, module: evaluate.EvaluationModule):
        self.module = module
        # where inputs may have several forms, the first one's types
        self._features = module.features[0] if isinstance(module.features, list) else module.features
        # calls that are still made both ways; inf: all are made the long way
        self._left = TRIED if callable(getattr(module, "_compute", None)) else math.inf

    def compute(self, **arguments: Any) -> Any:
        """The result of `module.compute`."""
        if self._left == 0:
            return self._direct(arguments)
        result = self.module.compute(**arguments)
        if self._left < math.inf:
            try:
                same = _equal(self._direct(arguments), result)
            except Exception:
                same = False
            self._left = self._left - 1 if same else math.inf
        return result

    def _direct(self, arguments: dict[str, Any]) -> Any:
        return self.module._compute(**{name: self._cast(name, value) for name, value in arguments.items()})

    def _cast(self, name: str, value: Any) -> Any:
        """An input as Arrow would hand it over, rounded to the type that the features say; other arguments as given."""
        if name not in self._features or not isinstance(value, np.ndarray):
            return value
        feature = self._features[name]
        dtype = getattr(getattr(feature, "feature", feature), "dtype", None)
        if not isinstance(dtype, str) or dtype == "string":
            return value
        value = value.astype(dtype)  # and then Python's numbers, which have the double width
        return value.astype(np.float64 if np.issubdtype(value.dtype, np.floating) else np.int64)


def _equal(first: Any, second: Any) -> bool:
    if isinstance(first, dict) and isinstance(second, dict):
        return first.keys() == second.keys() and all(_equal(first[key], second[key]) for key in first)
    return bool(np.array_equal(np.asarray(first), np.asarray(second), equal_nan=True))
