"""The rivals, each with its grid: what is chosen, on development seeds and the selection split, by `benchmarks.tune`.

All start from the same model, with the same phi, data, steps and selection rounds. Grids are of one size. MetricOpt
and its controls have the library's defaults, and no grid; all but their last steps are by the loss alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from typing import Any

from torch import Tensor
from torch.utils.data import ConcatDataset

from metricopt_hf import Ledger
from metricopt_hf.guides import PairsGuide

from . import informed
from .by_loss import train_by_loss, trained_first
from .problem import Problem, Task
from .searchers import CMAES, SPSA, search, search_linearised
from .surrogates import SURROGATES, surrogate_loss
from .training import Budget, Outcome, train

Config = Mapping[str, Any]
RANKINGS = ("macro_auprc", "recall_at_precision", "spearman")  # metrics that see more of a row than its decision


class NegatedGuide(PairsGuide):
    """Says the opposite of what its pairs say: what a real pass behind each step is there to find out."""

    def gradient(self, z: Tensor) -> Tensor:
        return -super().gradient(z)


@dataclass(frozen=True)
class Rival:
    """A method of the benchmark.

    Attributes:
        title: row of the table.
        run: (task, problem, seed, budget, folder, config) -> outcome.
        grid: settings to choose from; empty: there is nothing to choose.
        settings_of: method whose setting it takes.
        setting: its only one, where there is nothing to choose; empty: the defaults.
        soup: whether the mean of its last rounds is shown too.
        reads_labels: whether it is given the labels of the observation split, and not only the metric.
        reads_groups: whether it is given the groups of the observation split.
        needs_group: whether it must be told the group of every example that it decides about.
        knows_formula: whether it is given the metric's formula.
        seeds: of the final runs.
        after_loss: whether it makes the last steps of a run by the loss; its config has the settings of that, those of
            loss only and of loss only in small steps, as "by_loss".
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
    after_loss: bool = False
    applies: Callable[[Task], bool] = lambda task: True


def _grid(**values: tuple) -> tuple[Config, ...]:
    return tuple(dict(zip(values, combination, strict=True)) for combination in product(*values.values()))


def _after_loss(run: Callable[..., Outcome]) -> Callable[..., Outcome]:
    """`run` as the last steps of a run by the loss, whose settings stand in the config as "by_loss"."""

    def whole(task, problem, seed, budget, folder, config) -> Outcome:
        trained, ledger, seconds = trained_first(task, problem, seed, budget, config["by_loss"])
        own = {name: value for name, value in config.items() if name != "by_loss"}
        outcome = run(task, trained, seed, budget, folder, own)
        for purpose, calls in outcome.ledger.calls.items():
            ledger.add(purpose, calls, outcome.ledger.seconds[purpose], outcome.ledger.passes[purpose])
        steps = budget.steps - budget.metric_steps
        curve = [
            {**look, "step": steps + look["step"], "seconds": round(seconds + look["seconds"], 2)}
            for look in outcome.curve
        ]
        return replace(
            outcome,
            step=steps + outcome.step,
            curve=curve,
            ledger=ledger,
            seconds=seconds + outcome.seconds,
            outputs=trained.outputs(outcome.phi),
        )

    return whole


@_after_loss
def _metricopt(task, problem, seed, budget, folder, config) -> Outcome:
    return train(task, problem, seed, budget, folder, config)


@_after_loss
def _negated(task, problem, seed, budget, folder, config) -> Outcome:
    return train(task, problem, seed, budget, folder, config, guide=NegatedGuide())


def _stay(task, problem, seed, budget, folder, config) -> Outcome:
    return Outcome(problem.start(), 0, float("nan"), [], Ledger(), 0.0)


def _loss_only(task, problem, seed, budget, folder, config) -> Outcome:
    return train_by_loss(task, problem, seed, budget, config)


def _train_and_observation(task, problem, seed, budget, folder, config) -> Outcome:
    both = ConcatDataset([problem.train, problem.observation.as_training()])
    return train_by_loss(task, problem, seed, budget, config, both)


def _observation(task, problem, seed, budget, folder, config) -> Outcome:
    return train_by_loss(task, problem, seed, budget, config, problem.observation.as_training())


def _formula(task, problem, seed, budget, folder, config) -> Outcome:
    loss = surrogate_loss(task.metric.__name__, config["task_loss_weight"])
    return train_by_loss(task, problem, seed, budget, config, loss=loss)


def _cma(flat: bool, task, problem, seed, budget, folder, config) -> Outcome:
    population = config["population"] * budget.calls
    make = partial(CMAES, perturbation_std=config["perturbation_std"], population=population, diagonal=flat, seed=seed)
    return search(task, problem, seed, budget, flat, make)


@_after_loss
def _cma_virtual(task, problem, seed, budget, folder, config) -> Outcome:
    make = partial(CMAES, **config, diagonal=False, seed=seed)
    return search_linearised(task, problem, seed, budget, config["population"], make)


def _spsa(task, problem, seed, budget, folder, config) -> Outcome:
    numbers = {name: config[name] for name in ("perturbation_std", "step")}
    make = partial(SPSA, **numbers, rounds=budget.rounds, seed=seed)
    return search(task, problem, seed, budget, config["space"] == "flat", make)


LEARNING_RATES = (1e-3, 3e-3, 1e-2)
# Where a first look found the best at an edge, the grid was moved, not grown. For the loss alone that went up to 0.1,
# and no further: such steps are jumps, among which the selection split picks. So small steps are run beside it.
LOSS_GRID = _grid(phi_learning_rate=(3e-3, 1e-2, 3e-2, 1e-1), lr_scheduler_type=("constant",)) + _grid(
    phi_learning_rate=(1e-2, 3e-2), lr_scheduler_type=("linear",)
)

RIVALS: dict[str, Rival] = {
    "start": Rival("pretrained", _stay, seeds=10),
    "loss_only": Rival("loss only", _loss_only, LOSS_GRID, soup=True, seeds=10),
    "loss_small": Rival("loss only, small steps", _loss_only, setting={"phi_learning_rate": 3e-3}, seeds=10),
    "metricopt": Rival("MetricOpt", _metricopt, seeds=10, after_loss=True),
    "pairs": Rival("MetricOpt, pairs alone", _metricopt, setting={"guide": "pairs"}, seeds=3, after_loss=True),
    "rows": Rival(
        "MetricOpt, row moves alone",
        _metricopt,
        setting={"guide": "rows"},
        seeds=3,
        after_loss=True,
        applies=lambda task: task.metric.__name__ not in RANKINGS,
    ),
    "shuffled": Rival("control: shuffled", _metricopt, setting={"guide": "shuffled"}, seeds=10, after_loss=True),
    "random": Rival("control: random", _metricopt, setting={"guide": "random"}, seeds=10, after_loss=True),
    "negated": Rival("control: negated", _negated, after_loss=True),
    "train_obs": Rival("loss on train + observation", _train_and_observation, LOSS_GRID, reads_labels=True),
    "cma": Rival(
        "CMA-ES, same coordinates", partial(_cma, False), _grid(perturbation_std=(0.06, 0.2, 0.6), population=(1, 2))
    ),
    "cma_virtual": Rival(
        "CMA-ES on linearised predictions",
        _cma_virtual,
        _grid(perturbation_std=(0.06, 0.2, 0.6), population=(8, 16)),
        after_loss=True,
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
