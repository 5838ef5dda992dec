"""A bias per logit, tuned on the observation split: the cheap rival of every method, and a candidate like any other."""

from __future__ import annotations

from time import perf_counter

import numpy as np
import torch
from torch import Tensor
from transformers import EvalPrediction

from ..evaluation.evaluator import Evaluator, agreed
from ..evaluation.ledger import Ledger
from ..posthoc import logits_of, tune_bias

TOLERANCE = 1e-2  # of the logits, relative to the bias: what a half-precision model rounds off


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
        ledger = Ledger()
        bias, spent = agreed(
            evaluator.rank,
            evaluator.world_size,
            lambda: (tune_bias(evaluator.metric, prediction, ledger, complete=evaluator.complete), ledger.state_dict()),
        )
        evaluator.ledger.add("post-hoc", spent["calls"]["post-hoc"], spent["seconds"]["post-hoc"])
        tuned = point.clone()
        tuned[where] += torch.as_tensor(bias, dtype=point.dtype, device=point.device)
        off = np.abs(logits_of(_predictions(evaluator, tuned)) - before - bias).max(initial=0.0)
    return tuned if off <= TOLERANCE * max(1.0, np.abs(bias).max(initial=0.0)) else None


def _predictions(evaluator: Evaluator, point: Tensor) -> EvalPrediction:
    """Of the observation set at a phi."""
    start = perf_counter()
    evaluator.phi.write(point)
    prediction = evaluator.predictions()
    evaluator.ledger.add("post-hoc", 0, perf_counter() - start, passes=1)
    return prediction
