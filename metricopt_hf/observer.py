"""Observer: the metric at phi and round about it, shared out over the ranks, with phi left as it was."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from time import perf_counter

import numpy as np
import torch
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor
from tqdm.auto import tqdm

from .errors import MetricError
from .evaluator import Evaluator
from .observation import Observation
from .phi import Coordinates, PhiSpace


def pair_variance(scores: np.ndarray) -> float:
    """Variance of an observation that no slope explains, from antithetic pairs [pairs, 2]; nan for fewer than two.

    The mean of a pair at +d and -d does not depend on the slope, so the scatter of the pairs' means is noise (of the
    metric as a function of phi: ties, thresholds, few examples) and curvature; each mean holds half a point's variance.
    """
    complete = scores[np.isfinite(scores).all(axis=1)] if len(scores) else scores
    return 2 * float(complete.mean(axis=1).var(ddof=1)) if len(complete) > 1 else float("nan")


class Observer:
    """Takes rounds of observations.

    Args:
        phi: the space that is moved and put back.
        evaluators: give the metric on each fold of the observation set. A point is looked at on one of them, both of a
            pair on the same.
        explore_std: standard deviation of the exploration on each coordinate.
        seed: of the private generator of the exploration, the same on every rank.
        rank, world_size: this process and how many there are; a round's points are dealt out in turn.
        progress: whether to show a bar for rounds that take more than a few seconds.
    """

    def __init__(
        self,
        phi: PhiSpace,
        evaluators: Sequence[Evaluator],
        explore_std: float,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        progress: bool = False,
    ):
        self.phi, self.evaluators, self.explore_std = phi, evaluators, explore_std
        self.rank, self.world_size, self.progress = rank, world_size, progress
        self.generator = torch.Generator().manual_seed(seed)

    def offsets(self, count: int, dim: int) -> Tensor:
        """[count, dim] exploration in the coordinates: antithetic pairs, and first, if `count` is odd, phi itself."""
        draws = torch.randn(count // 2, dim, generator=self.generator) * self.explore_std
        pairs = torch.stack([draws, -draws], dim=1).reshape(-1, dim)
        return torch.cat([torch.zeros(count % 2, dim), pairs])

    def folds(self, count: int) -> np.ndarray:
        """[count] the fold on which each of the points of `offsets` is looked at: in turn, the first by lot."""
        number = len(self.evaluators)
        first = int(torch.randint(number, (), generator=self.generator)) if number > 1 else 0
        pairs = np.arange(first, first + count // 2).repeat(2)
        return np.concatenate([np.full(count % 2, first + count // 2), pairs]) % number

    def observe(self, coordinates: Coordinates, step: int, count: int) -> tuple[list[Observation], list[str]]:
        """One round of `count` metric calls over all ranks.

        Returns:
            The observations in a fixed order, the same on every rank, and a message for each call that failed.
        """
        centre = self.phi.read()
        z = coordinates.encode(centre).cpu()
        offsets, folds = self.offsets(count, coordinates.dim), self.folds(count)
        mine = range(self.rank, count, self.world_size)
        taken: list[tuple[int, float, float, str | None]] = []
        with self.phi.restored():
            for i in tqdm(mine, desc="observing the metric", leave=False, delay=3, disable=not self.progress):
                self.phi.write(centre + coordinates.lift(offsets[i].to(centre.device)))
                start = perf_counter()
                try:
                    score, error = self.evaluators[folds[i]].evaluate("observe"), None
                except MetricError as failure:
                    score, error = float("nan"), str(failure)
                taken.append((i, score, perf_counter() - start, error))
        if self.world_size > 1:
            others = [t for t in gather_object(taken) if t[0] % self.world_size != self.rank]
            self.evaluators[0].ledger.add("observe", len(others), sum(cost for _, _, cost, _ in others))
            taken += others
        taken.sort(key=lambda t: t[0])
        scores = np.array([score for _, score, _, _ in taken])
        pairs, fold_of_pair = scores[count % 2 :].reshape(-1, 2), folds[count % 2 :: 2]
        known = [v for fold in np.unique(folds) if np.isfinite(v := pair_variance(pairs[fold_of_pair == fold]))]
        variance = float(np.mean(known)) if known else float("nan")
        observations = [
            Observation((z + offsets[i]).numpy(), score, variance, step, cost, int(folds[i]))
            for i, score, cost, error in taken
            if error is None
        ]
        return observations, [error for *_, error in taken if error is not None]

    @contextmanager
    def moved(self, coordinates: Coordinates) -> Iterator[None]:
        """phi somewhere else, for trying things out."""
        with self.phi.restored():
            offset = torch.randn(coordinates.dim, generator=torch.Generator().manual_seed(0)) * self.explore_std
            self.phi.write(self.phi.read() + coordinates.lift(offset.to(self.phi.read().device)))
            yield


def on_main(evaluator: Evaluator, purpose: str, rank: int, world_size: int) -> float:
    """`evaluator.evaluate(purpose)` on rank 0 alone; its answer or its `MetricError`, and the charge, on all ranks."""
    outcome: list = [None]
    if rank == 0:
        try:
            outcome = [evaluator.evaluate(purpose)]
        except MetricError as error:
            outcome = [error]
    else:
        evaluator.ledger.add(purpose, 1, 0.0)
    if world_size > 1:
        broadcast_object_list(outcome)
    if isinstance(outcome[0], MetricError):
        raise outcome[0]
    return outcome[0]
