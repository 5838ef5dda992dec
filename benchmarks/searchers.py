"""Black-box searchers: they see nothing but the metric, on flat phi or in MetricOpt's coordinates, without any loss."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from time import process_time

import numpy as np
import torch
from torch import Tensor
from transformers.trainer_utils import set_seed

from metricopt_hf import Ledger, Metric
from metricopt_hf.evaluation.evaluator import BatchOutput, Evaluator
from metricopt_hf.evaluation.virtual_observer import VirtualObserver
from metricopt_hf.phi import Coordinates, PhiSpace
from metricopt_hf.training.plan import OF_PREDICTIONS

from .problem import Problem, Task, inputs_of, label_ids_of
from .training import PREDICTIONS, Budget, Outcome

CACHE_BYTES = 2e9


class Searcher(ABC):
    """Asked for points in the space that is searched, told their scores (greater is better)."""

    @abstractmethod
    def ask(self, count: int) -> np.ndarray:
        """The next points, [count, k]."""

    @abstractmethod
    def tell(self, points: np.ndarray, scores: np.ndarray) -> None:
        """Scores [count] of what was asked for last."""

    @property
    @abstractmethod
    def centre(self) -> np.ndarray:
        """[k], where the search stands."""


class CMAES(Searcher):
    """CMA-ES (Hansen), of the package `cma`.

    Args:
        dim: k.
        perturbation_std: initial step size.
        population: points of a generation, a multiple of what a round asks for.
        diagonal: whether the covariance stays diagonal (separable CMA-ES), as it must for hundreds of coordinates.
        seed: of its own generator.
    """

    def __init__(self, dim: int, perturbation_std: float, population: int, diagonal: bool, seed: int):
        import cma

        options = {"popsize": population, "CMA_diagonal": diagonal, "seed": seed + 1, "verbose": -9}
        self.strategy = cma.CMAEvolutionStrategy(np.zeros(dim), perturbation_std, options)
        self.waiting, self.points, self.scores = [], [], []

    def ask(self, count: int) -> np.ndarray:
        if not self.waiting:
            self.waiting = self.strategy.ask()
        points, self.waiting = self.waiting[:count], self.waiting[count:]
        return np.array(points)

    def tell(self, points: np.ndarray, scores: np.ndarray) -> None:
        self.points += list(points)
        self.scores += list(-scores)
        if not self.waiting:
            self.strategy.tell(self.points, self.scores)
            self.points, self.scores = [], []

    @property
    def centre(self) -> np.ndarray:
        return np.asarray(self.strategy.mean)


class SPSA(Searcher):
    """Zeroth-order ascent: slopes of the metric along antithetic pairs, averaged, and a step of a set length.

    As SPSA (Spall, 1992) and MeZO (Malladi et al., 2023), but for the step: its length is given, not the metric's unit,
    so that one setting can serve all metrics. It falls linearly to nothing.

    Args:
        dim: k.
        perturbation_std: standard deviation of a probe on each coordinate.
        step: length of the first step, in lengths of a probe.
        rounds: of the whole search.
        seed: of its own generator.
    """

    def __init__(self, dim: int, perturbation_std: float, step: float, rounds: int, seed: int):
        self.generator = np.random.default_rng(seed)
        self.z, self.perturbation_std, self.step = np.zeros(dim), perturbation_std, step
        self.rounds, self.done = rounds, 0

    def ask(self, count: int) -> np.ndarray:
        draws = self.generator.normal(size=(count // 2, len(self.z))) * self.perturbation_std
        return self.z + np.concatenate([draws, -draws])

    def tell(self, points: np.ndarray, scores: np.ndarray) -> None:
        plus, minus = np.split(scores, 2)
        slope = (plus - minus) @ (points[: len(plus)] - self.z)
        length = self.step * self.perturbation_std * len(self.z) ** 0.5 * (1 - self.done / self.rounds)
        if norm := np.linalg.norm(slope):
            self.z = self.z + length * slope / norm
        self.done += 1

    @property
    def centre(self) -> np.ndarray:
        return self.z


class Passes:
    """Scores what a searcher asks for: a forward pass over the observation split and a metric call for each point."""

    def __init__(self, evaluator: Evaluator, place: Callable[[np.ndarray], Tensor], budget: Budget):
        self.evaluator, self.place, self.budget = evaluator, place, budget

    def round(self, turn: int, searcher: Searcher) -> None:
        """One of the budget's rounds, with phi at the searcher's centre."""
        points = searcher.ask(self.budget.calls)
        phis = torch.stack([self.place(point) for point in points])
        searcher.tell(points, self.evaluator.metric.sign * self.evaluator.evaluate_many(phis, "observe").values)


class Interpolation:
    """The same on interpolated predictions, with MetricOpt's budgets: few passes, and as many calls as it makes.

    Args:
        space: what is searched.
        population: points of a generation; as many whole generations to a round as the calls allow.
        seed: of the directions of the expansions.
    """

    def __init__(self, evaluator: Evaluator, space: Coordinates, budget: Budget, population: int, seed: int):
        self.evaluator, self.space, self.population = evaluator, space, population
        self.virtual = VirtualObserver(evaluator, OF_PREDICTIONS.perturbation_std, on_all_rows=False, seed=seed)
        passes = self.virtual.passes(space.dim)
        expansions = PREDICTIONS["forward_pass_budget"] // passes
        self.every = -(-budget.rounds // expansions)  # rounds
        calls = PREDICTIONS["metric_call_budget"] - expansions * passes
        self.generations = calls // budget.rounds // population

    def round(self, turn: int, searcher: Searcher) -> None:
        """One of the budget's rounds, with phi at the searcher's centre."""
        if turn % self.every == 0:
            self.virtual.expand(self.space, turn)
            self.centre = searcher.centre.copy()
        metric, ledger = self.evaluator.metric, self.evaluator.ledger
        for _ in range(self.generations):
            points, scores = searcher.ask(self.population), []
            for prediction in self.virtual.interpolator.at(points - self.centre):
                with ledger.charge("observe"):
                    scores.append(metric(prediction))
            searcher.tell(points, metric.sign * np.array(scores))


def search(
    task: Task, problem: Problem, seed: int, budget: Budget, space: Coordinates | None, make, population: int = 0
) -> Outcome:
    """Let a searcher run for the budget's rounds.

    Args:
        space: what is searched; None: flat phi.
        make: dim -> the searcher.
        population: of a generation that is scored on interpolated predictions; 0: by passes.
    """
    start = process_time()
    set_seed(seed)
    model = copy.deepcopy(problem.model)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    phi = problem.phi(model)
    space = space or Coordinates(phi.read(), None)
    searcher = make(space.dim)
    metric, ledger = Metric(task.metric, task.metric_name, task.greater_is_better), Ledger()
    observation, selection = (
        _evaluator(phi, space, partial(rows.batches, problem.eval_batch), metric, ledger)
        for rows in (problem.observation, problem.selection)
    )

    def place(z: np.ndarray) -> Tensor:
        return space.origin + space.lift(torch.as_tensor(z, dtype=torch.float32))

    scorer = Passes(observation, place, budget)
    if population:
        scorer = Interpolation(observation, space, budget, population, seed)
    every, curve, best = budget.steps // budget.rounds, [], None
    for turn in range(budget.rounds + 1):
        phi.write(place(searcher.centre))
        spent = round(process_time() - start, 2)
        score = selection.evaluate("select")
        step = turn * every
        curve.append({"step": step, "passes": ledger.passes["observe"], "seconds": spent, "selection": score})
        if best is None or metric.sign * (score - best[1]) > 0:
            best = (phi.read(), score, step)
        if turn < budget.rounds:
            scorer.round(turn, searcher)
    return Outcome(best[0], best[2], best[1], curve, ledger, process_time() - start)


def _evaluator(phi: PhiSpace, space: Coordinates, batches: Callable, metric: Metric, ledger: Ledger) -> Evaluator:
    """With the frozen prefix cached, as the trainer's own evaluators have it."""

    def predict(batch) -> BatchOutput:
        return BatchOutput(phi.model(**inputs_of(batch))["logits"], label_ids_of(batch))

    @contextmanager
    def moved():
        with phi.restored():
            phi.write(phi.read() + space.lift(0.1 * torch.ones(space.dim)))
            yield

    evaluator = Evaluator(phi, predict, batches, metric, ledger, CACHE_BYTES)
    evaluator.freeze(moved)
    return evaluator
