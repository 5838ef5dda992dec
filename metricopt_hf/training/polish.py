"""Polish: a bias per logit, tuned on the observation split behind the last step, as a candidate like any other.

It is the cheap rival of every method here. Where a threshold is all that the metric asks for, it is also the last step
that training in small steps does not reach.
"""

from __future__ import annotations

from time import perf_counter

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor
from transformers import EvalPrediction

from ..evaluation.evaluator import Evaluator
from ..evaluation.ledger import Ledger
from ..phi import PhiSpace
from ..posthoc import logits_of, tune_bias
from .selection import Selection

TOLERANCE = 1e-2  # of the logits, relative to the bias: what a half-precision model rounds off


def polish(evaluator: Evaluator, selection: Selection, start: Tensor, step: int) -> None:
    """Tune a bias at the start and at the best phi so far, and consider both. phi is left anywhere.

    Nothing happens where phi holds no output bias, or where that moves no logit as it should.

    Args:
        start: [d] phi at the start of the phase.
        step: optimizer steps taken so far.
    """
    if selection.phi is None or evaluator.phi.output_bias is None:
        return
    for point in [start] if selection.phi.equal(start) else [start, selection.phi]:
        tuned = _tuned(evaluator, point)
        if tuned is None:
            return
        evaluator.phi.write(tuned)
        selection.consider(step, bias_tuned=True)


def _tuned(evaluator: Evaluator, point: Tensor) -> Tensor | None:
    """phi [d] with its output bias tuned from `point` on; None where that cannot be."""
    where = _output_bias(evaluator.phi)
    prediction = _predictions(evaluator, point)
    before = logits_of(prediction) if evaluator.concat else np.empty(0)
    if before.ndim != 2 or before.shape[-1] != where.stop - where.start:
        return None
    ledger = Ledger()
    outcome = [(tune_bias(evaluator.metric, prediction, ledger), ledger.state_dict()) if evaluator.rank == 0 else None]
    if evaluator.world_size > 1:  # one rank calls the metric, since it may answer otherwise the next time
        broadcast_object_list(outcome)
    ((bias, spent),) = outcome
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


def _output_bias(phi: PhiSpace) -> slice:
    """Where in phi the output bias stands."""
    start = 0
    for name, parameter in zip(phi.names, phi.parameters, strict=True):
        if name == phi.output_bias:
            return slice(start, start + parameter.numel())
        start += parameter.numel()
    raise AssertionError("phi names a bias that it does not hold")
