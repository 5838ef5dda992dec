"""How far the metric can be improved near the present phi, by moving phi along the slopes of observations.

Where the outputs are still about linear in phi, scores come from interpolated predictions, without a forward pass each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch
from torch import Tensor
from transformers import EvalPrediction

from ..errors import MetricError
from ..evaluation.evaluator import Evaluator
from ..evaluation.interpolator import NotInterpolable
from ..evaluation.observer import Observed, Observer
from ..evaluation.virtual_observer import VirtualObserver
from ..phi import Coordinates
from .rounds import LARGE_ERROR

EXPANSIONS = 2
# How far phi may go from where the outputs were expanded, in units of the coordinates: farther as long as it goes to
# the edge, and the interpolation is not off by more than this share of how far the outputs have moved
RADII, SMALL_ERROR = (1.0, 2.0, 4.0), 0.25
# rounds, and antithetic pairs in each, on interpolated predictions; and where a metric call takes a pass
INTERPOLATED, PASSED = (16, 6), (4, 4)
STEPS_TO_EDGE = 8
MOMENTUM = 0.7


def climbs(
    observer: Observer, virtual: VirtualObserver, coordinates: Coordinates
) -> Iterator[tuple[float, Tensor, EvalPrediction, float | None]]:
    """Move phi uphill from where it is; at each stop (score, phi [d], predictions, interpolation error).

    Scores and predictions are real ones of the observation split. If the outputs are no smooth function of phi, scores
    are observed instead, one pass for each.
    """
    evaluator, phi = observer.evaluator, observer.evaluator.phi
    try:
        for _ in range(EXPANSIONS):
            virtual.expand(coordinates, 0)
            rounds, pairs = INTERPOLATED
            for radius in RADII:
                observe = partial(virtual.observe, coordinates, 0, pairs)
                distance = _climb(coordinates, evaluator, observe, rounds, virtual.centre, radius)
                score, there = measured(evaluator, phi.read(), "observe")
                error = virtual.interpolator.error(_offset(coordinates, phi.read(), virtual.centre), there)
                yield score, phi.read(), there, error
                if error > SMALL_ERROR or distance < 0.8 * radius:
                    break
            if error > LARGE_ERROR:  # beyond what the interpolation is good for
                phi.write((virtual.centre + phi.read()) / 2)
    except NotInterpolable:
        rounds, pairs = PASSED
        observe = partial(observer.observe, coordinates, 0, 2 * pairs)
        _climb(coordinates, evaluator, observe, rounds, phi.read(), RADII[0])
        score, there = measured(evaluator, phi.read(), "observe")
        yield score, phi.read(), there, None


def _climb(
    coordinates: Coordinates,
    evaluator: Evaluator,
    observe: Callable[[], Observed],
    rounds: int,
    centre: Tensor,
    radius: float,
) -> float:
    """Move phi uphill along the slopes of rounds of pairs, to the mean of the last half of the steps.

    Args:
        observe: evaluates points around phi.
        centre: [d], from which phi goes no farther than `radius`.

    Returns:
        Its distance from the centre.
    """
    phi, sign, origin = evaluator.phi, evaluator.metric.sign, coordinates.encode(centre).cpu().numpy()
    z, direction, visited = _offset(coordinates, phi.read(), centre), np.zeros(coordinates.dim, np.float32), []

    def go(z: np.ndarray) -> None:
        phi.write(centre + coordinates.lift(torch.as_tensor(z, dtype=centre.dtype, device=centre.device)))

    for _ in range(rounds):
        if observations := observe().observations:
            scores = np.array([o.score for o in observations])
            slope = sign * (scores - scores.mean()) @ (np.stack([o.z for o in observations]) - origin - z)
            if (norm := np.linalg.norm(slope)) > 0:
                direction = MOMENTUM * direction + slope / norm
        if (norm := np.linalg.norm(direction)) > 0:
            z = z + radius / STEPS_TO_EDGE * direction / norm
            z = z * min(1.0, radius / np.linalg.norm(z))
        visited.append(z)
        go(z)
    z = np.mean(visited[rounds // 2 :], axis=0)
    go(z)
    return float(np.linalg.norm(z))


def _offset(coordinates: Coordinates, phi: Tensor, centre: Tensor) -> np.ndarray:
    """[k] where phi is, relative to a centre."""
    return (coordinates.encode(phi) - coordinates.encode(centre)).cpu().numpy()


def measured(evaluator: Evaluator, phi: Tensor, purpose: str) -> tuple[float, EvalPrediction]:
    """The metric and the predictions at phi: [d].

    Raises:
        MetricError: the metric fails there.
    """
    scores = evaluator.evaluate_many(phi[None], purpose, predictions=True)
    if scores.errors[0] is not None:
        raise MetricError(scores.errors[0])
    return float(scores.values[0]), scores.predictions[0]
