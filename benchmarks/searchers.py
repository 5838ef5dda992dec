"""Black-box searchers: they see nothing but the metric, on flat phi or in MetricOpt's coordinates, without any loss."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from time import process_time
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.trainer_utils import set_seed

from metricopt_hf import Ledger, MetricOptConfig
from metricopt_hf.evaluation.evaluator import Evaluator
from metricopt_hf.linear.linearizer import Linearizer
from metricopt_hf.phase.plan import default_calls
from metricopt_hf.phase.selection import Selection
from metricopt_hf.phi import Coordinates, PhiSpace

from .looks import evaluator, frozen_phi
from .problem import Problem, Task
from .training import Budget, Outcome


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


def linearizer(observation: Evaluator, seed: int) -> Linearizer:
    """As MetricOpt has it by default."""
    return Linearizer(observation, MetricOptConfig.phi_dim, None, torch.Generator().manual_seed(seed))


def place(space: Coordinates, z: np.ndarray) -> Tensor:
    """phi at coordinates: [d]."""
    return space.origin + space.lift(torch.as_tensor(z, dtype=torch.float32))


def opened(task: Task, problem: Problem) -> tuple[PhiSpace, Ledger, Evaluator, Evaluator]:
    """phi, an empty ledger, and what charges it: the metric on the observation and on the selection split."""
    phi, ledger = frozen_phi(problem), Ledger()
    return (
        phi,
        ledger,
        *(evaluator(task, problem, phi, rows, ledger) for rows in (problem.observation, problem.selection)),
    )


def search(
    task: Task, problem: Problem, seed: int, budget: Budget, flat: bool, make: Callable[[int], Searcher]
) -> Outcome:
    """Let a searcher run for the budget's rounds; every call to observe is a pass.

    Args:
        flat: whether phi itself is searched; else the coordinates that MetricOpt would take at the start.
        make: dim -> the searcher.
    """
    start = process_time()
    set_seed(seed)
    phi, ledger, observation, selection = opened(task, problem)
    space = Coordinates(phi.read(), torch.eye(phi.dim))
    if not flat:
        space = linearizer(observation, seed).coordinates(observation.predictions())
    searcher = make(space.dim)
    every, curve, visited = budget.steps // budget.rounds, [], []
    for turn in range(budget.rounds + 1):
        phi.write(place(space, searcher.centre))
        spent, visited = round(process_time() - start, 2), [*visited, phi.read()]
        score = float(selection.evaluate("select"))
        curve.append({"step": turn * every, "passes": ledger.passes["observe"], "seconds": spent, "selection": score})
        if turn < budget.rounds:
            points, scores = searcher.ask(budget.calls), []
            for point in points:
                phi.write(place(space, point))
                scores.append(float(observation.evaluate("observe")))
            searcher.tell(points, task.sign * np.array(scores))
    best = max(range(len(curve)), key=lambda i: task.sign * curve[i]["selection"])
    chosen = curve[best]
    return Outcome(visited[best], chosen["step"], chosen["selection"], curve, ledger, process_time() - start)


def search_linearised(
    task: Task, problem: Problem, seed: int, budget: Budget, population: int, make: Callable[[int], Searcher]
) -> Outcome:
    """Let a searcher climb what MetricOpt climbs: the metric on linearised predictions of the whole observation split.

    The linearisation is made anew, at the searcher's centre, as often as MetricOpt makes it, with as many metric calls
    in all, in the same coordinates; and what comes out is chosen by the same rule among the same kinds of candidates.

    Args:
        population: points of a generation; as many whole generations to a linearisation as the calls allow.
        make: dim -> the searcher.
    """
    start = process_time()
    set_seed(seed)
    phi, ledger, observation, selection = opened(task, problem)
    made = linearizer(observation, seed)
    space = made.coordinates(observation.predictions())
    searcher, choice = make(space.dim), Selection(selection, phi)
    choice.start(0)
    spent = [(0, 0.0)]  # passes and seconds behind each step
    for _ in range(budget.metric_steps):
        centre, prediction = searcher.centre.copy(), observation.predictions()
        ledger.add("observe", 0, 0.0, passes=1 + made.cost(prediction, space.dim).passes)
        linear = made.linearize(space.basis, prediction)
        for _ in range(default_calls(linear) // budget.metric_steps // population):
            points, scores = searcher.ask(population), []
            for point in points:
                predicted = linear.at(torch.as_tensor(point - centre, dtype=torch.float32))
                scores.append(observation.value(predicted, "observe"))
            searcher.tell(points, np.array(scores, dtype=float))
        phi.write(place(space, searcher.centre))
        choice.visit()
        spent.append((ledger.passes["observe"], round(process_time() - start, 2)))
    choice.finish(budget.metric_steps, observation)
    curve: list[dict[str, Any]] = [
        {
            "step": candidate.step,
            "passes": spent[candidate.step][0],
            "seconds": spent[candidate.step][1],
            "selection": candidate.score,
            "kind": candidate.kind,
        }
        for candidate in choice.candidates
    ]
    chosen = choice.chosen
    return Outcome(chosen.phi, chosen.step, chosen.score, curve, ledger, process_time() - start)
