"""A scale and a bias per logit, searched as `metricopt_hf.posthoc` searches a bias: the next cheapest rival."""

from __future__ import annotations

import numpy as np
from transformers import EvalPrediction

from metricopt_hf import Ledger, Metric
from metricopt_hf.posthoc import tune_bias


def scaled(prediction: EvalPrediction, scale: np.ndarray, bias: np.ndarray) -> EvalPrediction:
    """`prediction` with its logits times `scale` [classes] plus `bias` [classes]."""
    return EvalPrediction(prediction.predictions * scale + bias, prediction.label_ids)


def tune_scale_and_bias(
    metric: Metric, prediction: EvalPrediction, ledger: Ledger, max_calls: int
) -> tuple[np.ndarray, np.ndarray]:
    """The same coordinate search, of twice as many numbers: of each logit the bias, and the logarithm of its scale.

    Args:
        metric, prediction, ledger, max_calls: see `tune_bias`.

    Returns:
        scale and bias, [classes] each.
    """
    classes = prediction.predictions.shape[-1]
    unit = float((prediction.predictions - prediction.predictions.mean(-1, keepdims=True)).std()) or 1.0

    def unpacked(packed: EvalPrediction) -> EvalPrediction:
        logits, logarithm = np.split(packed.predictions, [classes], axis=-1)
        return EvalPrediction(unit * logits * np.exp(logarithm), packed.label_ids)

    def split(numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        scale = np.exp(numbers[classes:])
        return scale, unit * numbers[:classes] * scale

    packed = np.concatenate([prediction.predictions / unit, np.zeros_like(prediction.predictions)], axis=-1)
    inner = Metric(lambda p: metric(unpacked(p)), metric.name, metric.greater_is_better)
    return split(tune_bias(inner, EvalPrediction(packed, prediction.label_ids), ledger, max_calls))
