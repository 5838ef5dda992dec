"""Observer: rounds of observations at phi and round about it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import EvalPrediction

from ..phi import Coordinates
from .evaluator import Evaluator
from .observation import Observation


def pair_variance(scores: np.ndarray) -> float:
    """Variance of an observation that no slope explains, from antithetic pairs [pairs, 2]; nan for fewer than two.

    The mean of a pair at +d and -d does not depend on the slope, so the scatter of the pairs' means is noise (of the
    metric as a function of phi: ties, thresholds, few examples) and curvature; each mean holds half a point's variance.
    """
    complete = scores[np.isfinite(scores).all(axis=1)] if len(scores) else scores
    return 2 * float(complete.mean(axis=1).var(ddof=1)) if len(complete) > 1 else float("nan")


@dataclass(frozen=True)
class Observed:
    """A round, the same on every rank.

    Attributes:
        observations: in a fixed order, without those that failed.
        errors: a message for each call that failed.
        predictions: one for each of the observations, where they were asked for.
        scores: [n] the metric on each of these predictions, where it is not what the observation says.
    """

    observations: list[Observation]
    errors: list[str]
    predictions: Sequence[EvalPrediction] | None
    scores: np.ndarray | None = None


class Observer:
    """Takes rounds of observations.

    Args:
        evaluator: gives the metric on the observation set.
        perturbation_std: standard deviation of the perturbation on each coordinate.
        seed: of the private generator of the perturbations, the same on every rank.
    """

    def __init__(self, evaluator: Evaluator, perturbation_std: float, seed: int):
        self.evaluator, self.perturbation_std = evaluator, perturbation_std
        self.generator = torch.Generator().manual_seed(seed)

    def offsets(self, count: int, dim: int) -> Tensor:
        """[count, dim] perturbations of the coordinates: antithetic pairs, and first, if `count` is odd, phi itself."""
        draws = torch.randn(count // 2, dim, generator=self.generator) * self.perturbation_std
        pairs = torch.stack([draws, -draws], dim=1).reshape(-1, dim)
        return torch.cat([torch.zeros(count % 2, dim), pairs])

    def observe(self, coordinates: Coordinates, step: int, count: int, predictions: bool = False) -> Observed:
        """One round of `count` metric calls over all ranks.

        Args:
            predictions: whether to return them too.
        """
        centre = self.evaluator.phi.read()
        z = coordinates.encode(centre).cpu()
        offsets = self.offsets(count, coordinates.dim)
        points = torch.stack([centre + coordinates.lift(offset.to(centre.device)) for offset in offsets])
        scores = self.evaluator.evaluate_many(points, "observe", predictions)
        variance = pair_variance(scores.values[count % 2 :].reshape(-1, 2))
        fine = [i for i, error in enumerate(scores.errors) if error is None]
        observations = [
            Observation(
                (z + offsets[i]).numpy(),
                float(scores.values[i]),
                variance,
                step,
                float(scores.seconds[i]),
                tuple(scores.raw[i]),
            )
            for i in fine
        ]
        return Observed(
            observations,
            [error for error in scores.errors if error is not None],
            None if scores.predictions is None else [scores.predictions[i] for i in fine],
        )

    @contextmanager
    def moved(self, coordinates: Coordinates) -> Iterator[None]:
        """phi somewhere else, for trying things out."""
        phi = self.evaluator.phi
        with phi.restored():
            offset = torch.randn(coordinates.dim, generator=torch.Generator().manual_seed(0)) * self.perturbation_std
            phi.write(phi.read() + coordinates.lift(offset.to(phi.read().device)))
            yield
