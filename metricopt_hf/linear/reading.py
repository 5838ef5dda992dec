"""Which outputs of a model a metric reads, found by asking it about predictions in which others stand there."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor
from transformers import EvalPrediction

from ..evaluation.evaluator import Evaluator, agreed
from .cost import MOST_LARGEST
from .differences import floats
from .linearization import Linearization

DRAWS = 5  # of random numbers: a coarse metric may have the same value by chance


def reads_all(evaluator: Evaluator, prediction: EvalPrediction) -> bool:
    """Whether the metric changes if each row's outputs but the largest trade places: an embedding is read whole.

    Args:
        prediction: one array [..., outputs]. It takes two of the calls to observe; without them, the answer is no.
    """
    if evaluator.ledger.remaining < 2:
        return False
    ((position, outputs),) = floats(prediction).items()
    others = np.sort(np.argsort(outputs, -1)[..., :-MOST_LARGEST], -1)
    traded = outputs.copy()
    np.put_along_axis(traded, others, np.take_along_axis(outputs, np.roll(others, 1, -1), -1), -1)
    return _changes(evaluator, prediction, position, [torch.as_tensor(traded)])


def arrays_read(evaluator: Evaluator, prediction: EvalPrediction) -> list[int]:
    """Which of several arrays of floating-point outputs the metric reads: those that random numbers may not replace.

    Returns:
        Their places in the order of `floats`.
    """
    generator, found = torch.Generator().manual_seed(0), []
    for place, (position, leaf) in enumerate(floats(prediction).items()):
        mean, spread = float(leaf.mean()), float(leaf.std() or 1)
        drawn = (mean + spread * torch.randn(leaf.shape, generator=generator) for _ in range(DRAWS))
        if _changes(evaluator, prediction, position, drawn):
            found.append(place)
    return found


def _changes(evaluator: Evaluator, prediction: EvalPrediction, position: int, others: Iterable[Tensor]) -> bool:
    """Whether the metric is another number, or fails, with one of the others in an array's place; on every rank."""
    planted = (Linearization(prediction, {}).planted({position: other}) for other in others)

    def ask() -> bool:
        here = evaluator.value(prediction, "observe")
        return any(not np.isclose(evaluator.value(other, "observe"), here, equal_nan=True) for other in planted)

    return agreed(evaluator.rank, evaluator.world_size, ask)
