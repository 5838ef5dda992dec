"""The rivals, each with its grid: what is chosen, on development seeds and the selection split, by `benchmarks.tune`.

All start from the same model, with the same phi, data, steps and selection rounds. Grids are of one size. Controls take
MetricOpt's own setting.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset

from examples.comparison.methods import LOSS_ONLY, METHODS
from metricopt_hf import DirectionGuide, GuideContext, Ledger, Trajectory, ValueFunctionGuide

from . import informed
from .problem import Problem, Task
from .searchers import CMAES, SPSA, search
from .surrogates import SURROGATES, surrogate_loss
from .training import NO_GUIDE, PREDICTIONS, Budget, Outcome, coordinates, train

Config = Mapping[str, Any]


class EvolutionGuide(DirectionGuide):
    """Evolution with the loss blended in: follows the slopes of the last rounds' antithetic pairs, always as far.

    Args:
        rounds: how many to average over.
    """

    TRUST = 0.5  # about what MetricOpt's guide comes to; `value_weight` is tuned on top

    def __init__(self, rounds: int):
        self.rounds, self.slope = rounds, None

    def start(self, context: GuideContext) -> None:
        super().start(context)
        self.slope = None

    def predict(self, z: np.ndarray) -> np.ndarray | None:
        return None if self.slope is None else z @ self.slope.numpy()

    def fit(self, trajectory: Trajectory) -> None:
        steps, slope = trajectory.steps, torch.zeros(self.context.coordinates.dim)
        for step in np.unique(steps)[-self.rounds :]:
            z, scores = trajectory.z[steps == step], trajectory.scores[steps == step]
            slope += torch.as_tensor((scores - scores.mean()) @ (z - z.mean(0)), dtype=torch.float32)
        self.slope = slope

    @property
    def standing(self) -> tuple[float, str]:
        return (0.0, "no slope yet") if self.slope is None or self.off else (self.TRUST, "fixed")

    def ascent(self, phi: Tensor) -> Tensor:
        return self.context.coordinates.lift(self.slope)


class NegatedGuide(ValueFunctionGuide):
    """Says the opposite of all that MetricOpt's guide says: what trust is there to find out."""

    def predict(self, z: np.ndarray) -> np.ndarray | None:
        predicted = super().predict(z)
        return None if predicted is None else -predicted

    def ascent(self, phi: Tensor) -> Tensor:
        return -super().ascent(phi)


@dataclass(frozen=True)
class Rival:
    """A method of the benchmark.

    Attributes:
        title: row of the table.
        run: (task, problem, seed, budget, folder, config) -> outcome.
        grid: settings to choose from; empty: it takes those of `settings_of`.
        settings_of: method whose setting it takes.
        setting: its only one, where there is nothing to choose.
        soup: whether the mean of its last rounds is shown too.
        reads_labels: whether it is given the labels of the observation split, and not only the metric.
        reads_groups: whether it is given the groups of the observation split.
        needs_group: whether it must be told the group of every example that it decides about.
        knows_formula: whether it is given the metric's formula.
        seeds: of the final runs.
        applies: whether it can be run on a task.
    """

    title: str
    run: Callable[[Task, Problem, int, Budget, str, Config], Outcome]
    grid: tuple[Config, ...] = ()
    settings_of: str | None = None
    setting: Config = field(default_factory=dict)
    soup: bool = False
    reads_labels: bool = False
    reads_groups: bool = False
    needs_group: bool = False
    knows_formula: bool = False
    seeds: int = 5
    applies: Callable[[Task], bool] = lambda task: True


def _grid(**values: tuple) -> tuple[Config, ...]:
    return tuple(dict(zip(values, combination, strict=True)) for combination in product(*values.values()))


def _guided(method: str, task, problem, seed, budget, folder, config) -> Outcome:
    return train(task, problem, seed, budget, folder, {**PREDICTIONS, **config, **METHODS[method].changes})


def _stay(task, problem, seed, budget, folder, config) -> Outcome:
    return Outcome(problem.start(), 0, float("nan"), [], Ledger(), 0.0)


def _loss_only(task, problem, seed, budget, folder, config) -> Outcome:
    return train(task, problem, seed, budget, folder, {**NO_GUIDE, **config})


def _unguided(task, problem, seed, budget, folder, config) -> Outcome:
    return train(task, problem, seed, budget, folder, {**PREDICTIONS, **config, **NO_GUIDE})


def _train_and_observation(task, problem, seed, budget, folder, config) -> Outcome:
    both = ConcatDataset([problem.train, problem.observation.as_training()])
    return train(task, problem, seed, budget, folder, {**NO_GUIDE, **config}, train_dataset=both)


def _observation(task, problem, seed, budget, folder, config) -> Outcome:
    observed = problem.observation.as_training()
    return train(task, problem, seed, budget, folder, {**NO_GUIDE, **config}, train_dataset=observed)


def _formula(task, problem, seed, budget, folder, config) -> Outcome:
    numbers = {**NO_GUIDE, "phi_learning_rate": config["phi_learning_rate"]}
    loss = surrogate_loss(task.metric.__name__, config["task_loss_weight"])
    return train(task, problem, seed, budget, folder, numbers, compute_loss_func=loss)


def _evolution(task, problem, seed, budget, folder, config) -> Outcome:
    # with larger steps, and fewer, it was worse
    numbers = {"phi_learning_rate": 3e-3, **{name: value for name, value in config.items() if name != "memory"}}
    return train(task, problem, seed, budget, folder, numbers, guide=EvolutionGuide(config["memory"]))


def _negated(task, problem, seed, budget, folder, config) -> Outcome:
    return train(task, problem, seed, budget, folder, {**PREDICTIONS, **config}, guide=NegatedGuide())


def _cma(flat: bool, task, problem, seed, budget, folder, config) -> Outcome:
    space = None if flat else coordinates(task, problem, seed, folder)
    population = config["population"] * budget.calls
    make = partial(CMAES, perturbation_std=config["perturbation_std"], population=population, diagonal=flat, seed=seed)
    return search(task, problem, seed, budget, space, make)


def _cma_virtual(task, problem, seed, budget, folder, config) -> Outcome:
    make = partial(CMAES, **config, diagonal=False, seed=seed)
    space = coordinates(task, problem, seed, folder)
    return search(task, problem, seed, budget, space, make, config["population"])


def _spsa(task, problem, seed, budget, folder, config) -> Outcome:
    space = None if config["space"] == "flat" else coordinates(task, problem, seed, folder)
    numbers = {name: config[name] for name in ("perturbation_std", "step")}
    make = partial(SPSA, **numbers, rounds=budget.rounds, seed=seed)
    return search(task, problem, seed, budget, space, make)


LEARNING_RATES = (1e-3, 3e-3, 1e-2)
# Where a first look found the best at an edge, the grid was moved, not grown. For the loss alone that went up to 0.1,
# and no further: such steps are jumps, among which the selection split picks. So "unguided" is run beside it.
LOSS_GRID = _grid(phi_learning_rate=(3e-3, 1e-2, 3e-2, 1e-1), lr_scheduler_type=("constant",)) + _grid(
    phi_learning_rate=(1e-2, 3e-2), lr_scheduler_type=("linear",)
)

RIVALS: dict[str, Rival] = {
    "start": Rival("pretrained", _stay, seeds=10),
    "loss_only": Rival(LOSS_ONLY.title, _loss_only, LOSS_GRID, soup=True, seeds=10),
    "loss_small": Rival("loss only, small steps", _loss_only, setting={"phi_learning_rate": 3e-3}, seeds=10),
    "metricopt": Rival(
        METHODS["metricopt"].title,
        partial(_guided, "metricopt"),
        _grid(phi_learning_rate=(5e-3, 1e-2), value_weight=(10.0, 20.0, 40.0)),
        soup=True,
        seeds=10,
    ),
    "unguided": Rival("MetricOpt without guidance", _unguided, settings_of="metricopt", seeds=10),
    **{
        control: Rival(METHODS[control].title, partial(_guided, control), settings_of="metricopt", seeds=10)
        for control in ("shuffled", "random")
    },
    "negated": Rival("control: negated guide", _negated, settings_of="metricopt"),
    "train_obs": Rival("loss on train + observation", _train_and_observation, LOSS_GRID, reads_labels=True),
    "evolution": Rival(
        "evolution and loss, same coordinates",
        _evolution,
        _grid(value_weight=(3.0, 8.0), memory=(3, 6, 12)),
    ),
    "cma": Rival(
        "CMA-ES, same coordinates", partial(_cma, False), _grid(perturbation_std=(0.06, 0.2, 0.6), population=(1, 2))
    ),
    "cma_virtual": Rival(
        "CMA-ES on interpolated predictions",
        _cma_virtual,
        _grid(perturbation_std=(0.06, 0.2, 0.6), population=(8, 16)),
    ),
    "cma_flat": Rival(
        "separable CMA-ES, flat phi", partial(_cma, True), _grid(perturbation_std=(0.03, 0.1, 0.3), population=(1, 2))
    ),
    "spsa": Rival(
        "SPSA",
        _spsa,
        _grid(space=("coordinates",), perturbation_std=(0.06, 0.2), step=(0.5, 1.5))
        + _grid(space=("flat",), perturbation_std=(0.1,), step=(0.5, 1.5)),
    ),
    "formula": Rival(
        "surrogate of the formula",
        _formula,
        _grid(phi_learning_rate=LEARNING_RATES, task_loss_weight=(0.0, 1.0)),
        knows_formula=True,
        applies=lambda task: task.metric.__name__ in SURROGATES,
    ),
    "obs": Rival("loss on observation", _observation, settings_of="train_obs", reads_labels=True),
    "dfr": Rival(
        "last layer anew on balanced groups (DFR)",
        informed.retrain_last_layer,
        _grid(C=(1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)),
        reads_labels=True,
        reads_groups=True,
        applies=lambda task: bool(task.groups),
    ),
    "group_dro": Rival(
        "group DRO on observation",
        informed.group_dro,
        _grid(phi_learning_rate=(3e-3, 1e-2, 3e-2), group_step=(0.01, 0.1)),
        reads_labels=True,
        reads_groups=True,
        applies=lambda task: bool(task.groups),
    ),
    "thresholds": Rival(
        "fairlearn's ThresholdOptimizer",
        informed.thresholds_by_group,
        _grid(
            constraints=("equalized_odds", "true_positive_rate_parity", "false_positive_rate_parity"),
            objective=("accuracy_score", "balanced_accuracy_score"),
        ),
        reads_labels=True,
        reads_groups=True,
        needs_group=True,
        applies=lambda task: bool(task.groups) and task.labels == "binary",
    ),
    "adabn": Rival(
        "batch norm of observation (AdaBN)",
        informed.batch_norm_of_observation,
        _grid(layers=("last block", "all"), share=(0.3, 0.6, 1.0)),
        applies=lambda task: task.pixels is not None,
    ),
}
OURS = "metricopt"
# Whose settings are tuned, and who runs first
TUNED = [name for name, rival in RIVALS.items() if rival.grid]
FIRST = [name for name, rival in RIVALS.items() if rival.seeds == 10]
