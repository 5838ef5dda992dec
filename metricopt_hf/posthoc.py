"""Post-hoc tuning without training: a bias per logit, searched on given predictions.

It is the cheap rival of every method that tunes a model for its metric. For classification it moves the decision
thresholds; where loss and metric disagree about nothing else, it suffices.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from time import perf_counter

import numpy as np
import torch
from torch import Tensor
from transformers import EvalPrediction
from transformers.trainer_utils import PredictionOutput

from .errors import ConfigurationError, MetricError
from .evaluation.evaluator import Evaluator, agreed
from .evaluation.ledger import Ledger
from .evaluation.metric import Metric

# The first step, in standard deviations of the logits: wide, because a metric of decisions is flat close by.
FIRST_STEP = 2.0
HALVINGS = 6
TOLERANCE = 1e-2  # of the logits, relative to the bias, for the rounding of half precision


def tune_bias(
    metric: Metric,
    prediction: EvalPrediction | PredictionOutput,
    ledger: Ledger | None = None,
    max_calls: int = 160,
    complete: Callable[[EvalPrediction], EvalPrediction] | None = None,
) -> np.ndarray:
    """The bias per logit that makes `metric` best on `prediction`, by coordinate search from zero.

    Each logit's bias in turn is moved up, else down, by a step if that improves the metric; after a sweep without any
    improvement the step is halved. No forward pass is needed, but every trial is a metric call like any other, charged
    to "post-hoc". It fits the split it is given: measure it on another one.

    Args:
        metric: the black box; a call that fails is no improvement.
        prediction: what `trainer.predict` returns, or an `EvalPrediction`. Its `predictions` [..., classes] are logits
            (a model's tuple of outputs: its first), or [n] one logit.
        ledger: charged with the calls.
        max_calls: the most metric calls to make.
        complete: maps predictions to the metric's input; see `Metric.__call__`.

    Returns:
        [classes] float64, to be given to `add_bias`; [1] for one logit.

    Raises:
        ConfigurationError: the predictions are in a dict, where nothing says which logits a bias is for.

    Example:
        >>> accuracy = Metric(lambda p: float((p.predictions.argmax(-1) == p.label_ids).mean()), "accuracy")
        >>> prediction = EvalPrediction(np.array([[1.5, 0.0], [1.2, 0.0], [3.0, 0.0]]), np.array([1, 1, 0]))
        >>> bias = tune_bias(accuracy, prediction)
        >>> accuracy(prediction) < 0.5, accuracy(add_bias(prediction, bias))
        (True, 1.0)
    """
    logits, ledger = _logits(prediction), ledger or Ledger()
    bias = np.zeros(logits.shape[-1] if logits.ndim > 1 else 1)
    calls = 0

    def score(candidate: np.ndarray) -> float:
        nonlocal calls
        calls += 1
        try:
            with ledger.charge("post-hoc"):
                return metric.sign * metric(add_bias(prediction, candidate), complete)
        except MetricError:
            return -np.inf

    best = score(bias) if max_calls > 0 else np.inf
    centred = logits - logits.mean(-1, keepdims=True) if len(bias) > 1 else logits
    step, halvings = FIRST_STEP * float(centred.std()), 0
    while halvings < HALVINGS:
        improved = False
        for i in range(len(bias)):
            for move in (step, -step):
                if calls >= max_calls:
                    return bias
                candidate = bias.copy()
                candidate[i] += move
                if (value := score(candidate)) > best:
                    bias, best, improved = candidate, value, True
                    break
        if not improved:
            step, halvings = step / 2, halvings + 1
    return bias


def add_bias(prediction: EvalPrediction | PredictionOutput, bias: np.ndarray) -> EvalPrediction:
    """`prediction` with `bias` [classes] added to its logits; the original is left as it is.

    Raises:
        ConfigurationError: see `tune_bias`.
    """
    logits = _logits(prediction) + bias
    if isinstance(prediction.predictions, (tuple, list)):
        logits = (logits, *prediction.predictions[1:])
    inputs, losses = (getattr(prediction, name, None) for name in ("inputs", "losses"))
    return EvalPrediction(logits, prediction.label_ids, inputs=inputs, losses=losses)


def _logits(prediction: EvalPrediction | PredictionOutput) -> np.ndarray:
    if isinstance(heads := prediction.predictions, Mapping):
        raise ConfigurationError(
            f"There is no bias for predictions in a dict ({', '.join(heads)}): tune one per head, as in "
            f"EvalPrediction(output.predictions[{next(iter(heads), '')!r}], output.label_ids)."
        )
    return logits_of(prediction)


def logits_of(prediction: EvalPrediction | PredictionOutput) -> np.ndarray:
    """The logits: the predictions, or the first of a model's tuple of outputs."""
    predictions = prediction.predictions
    return np.asarray(predictions[0] if isinstance(predictions, (tuple, list)) else predictions)


def with_tuned_bias(evaluator: Evaluator, point: Tensor) -> Tensor | None:
    """phi [d] with its output bias tuned from `point` on; None where phi holds none, or it moves no logit as it should.

    Args:
        evaluator: the metric on the observation set.
    """
    where = evaluator.phi.output_bias_slice
    if where is None or not evaluator.metric.of_predictions or not evaluator.concat or evaluator.metric.batchwise:
        return None
    with evaluator.phi.restored():
        prediction = _predictions(evaluator, point)
        before = logits_of(prediction)
        if before.ndim != 2 or before.shape[-1] != where.stop - where.start:
            return None
        ledger, complete = evaluator.ledger, evaluator.complete
        bias, calls = agreed(
            evaluator.rank,
            evaluator.world_size,
            lambda: (tune_bias(evaluator.metric, prediction, ledger, complete=complete), ledger.calls["post-hoc"]),
        )
        if evaluator.rank:
            ledger.add("post-hoc", calls - ledger.calls["post-hoc"], 0.0)
        tuned = point.clone()
        tuned[where] += torch.as_tensor(bias, dtype=point.dtype, device=point.device)
        off = np.abs(logits_of(_predictions(evaluator, tuned)) - before - bias).max(initial=0.0)
    return tuned if off <= TOLERANCE * max(1.0, np.abs(bias).max(initial=0.0)) else None


def _predictions(evaluator: Evaluator, point: Tensor) -> EvalPrediction:
    """Predictions of the observation set at a phi."""
    start = perf_counter()
    evaluator.phi.write(point)
    prediction = evaluator.predictions()
    evaluator.ledger.add("post-hoc", 0, perf_counter() - start, passes=1)
    return prediction
