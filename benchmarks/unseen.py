"""Two tasks whose metric reads a column that no training example shows: money per row, and the uplift of a treatment.

Amounts, outcomes and treatments are made from the features with fixed seeds, so that a row has the same ones in every
run. Train has neither amounts nor treatments.
"""

from __future__ import annotations

import functools
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from . import scores, tabular
from .problem import Problem, Sizes, Task

LIMIT = 3.0  # without it, single amounts of bank marketing are beyond 1e16: some of its numbers have very long tails
Splits = tuple[dict[str, Tensor], dict[str, Tensor]]


def projections(splits: Splits, seed: int) -> tuple[Tensor, Tensor]:
    """A random projection of the features of train [n] and test [m], standardised over train, at most `LIMIT`
    from 0."""
    train, test = (split["features"].double() for split in splits)
    direction = torch.from_numpy(np.random.default_rng(seed).normal(size=train.shape[1]))
    train, test = train @ direction, test @ direction
    mean, std = train.mean(), train.std()
    return tuple(((values - mean) / std).clamp(-LIMIT, LIMIT) for values in (train, test))


@functools.cache
def with_amounts() -> Splits:
    """Bank marketing, with the `amount` that each row's sale earns: log-normal, and a function of the features."""
    splits = tabular.load("bank_marketing")
    return tuple(
        {**split, "amount": (25 * torch.exp(0.9 * z - 0.4)).float()}
        for split, z in zip(splits, projections(splits, seed=0), strict=True)
    )


@functools.cache
def with_treatments() -> Splits:
    """The features of a9a, with a `treatment` by a fair coin, and as labels an outcome that depends on it."""
    splits, generator = tabular.load("a9a"), np.random.default_rng(0)

    def made(split: dict[str, Tensor], a: Tensor, b: Tensor) -> dict[str, Tensor]:
        treatment = torch.from_numpy(generator.integers(2, size=len(a)))
        chance = torch.sigmoid(-0.5 + 1.5 * a + 0.9 * treatment * b)
        outcome = (torch.from_numpy(generator.random(len(a))) < chance).long()
        return {"features": split["features"], "labels": outcome, "treatment": treatment}

    return tuple(map(made, splits, projections(splits, seed=7), projections(splits, seed=10)))


@functools.lru_cache(maxsize=1)
def problem(name: str, column: str, sizes: Sizes, seed: int) -> Problem:
    """As `tabular.problem`, with `column` in what is measured on.

    Args:
        column: "amount" of bank marketing, or "treatment" of a9a.
    """
    train, test = tabular.thinned({"amount": with_amounts, "treatment": with_treatments}[column](), sizes)
    values = {"observation": train.pop(column), "report": test.pop(column)}
    values["selection"] = values["observation"]
    plain = tabular.cut(name, train, test, sizes.observation, 0.0, seed)
    return replace(plain, **{part: rows.with_column(column, values[part]) for part, rows in plain.measured.items()})


def tasks(sizes: Sizes) -> tuple[Task, ...]:
    return (
        Task(
            "money",
            "Bank marketing (without duration), MLP, money per row",
            scores.profit,
            f"mean profit, {scores.CALL_COST:g} a call",
            True,
            False,
            "binary",
            functools.partial(problem, "bank_marketing", "amount", sizes),
            note="A sale earns the row's amount: 25 exp(0.9 z - 0.4), z a fixed random projection of the features, "
            f"standardised, and at most {LIMIT:g} from 0. No training example shows its amount.",
            kind="beyond threshold",
            why="The best threshold of a row is the cost of a call over the row's amount; a bias is one for all rows.",
        ),
        Task(
            "uplift",
            "a9a with random treatments, MLP, value of the policy",
            scores.policy_value,
            f"policy value, {scores.TREATMENT_COST:g} a treatment",
            True,
            False,
            "binary",
            functools.partial(problem, "a9a", "treatment", sizes),
            note="Label 1 is the outcome y ~ Bernoulli(sigmoid(-0.5 + 1.5 a + 0.9 t b)): a and b are fixed random "
            "projections of the features, standardised, and correlate at -0.29: whose outcome is good gains less. "
            "The treatment t is a fair coin. The decision is whom to treat. No training example shows its treatment.",
            kind="beyond threshold",
            why="The loss ranks rows by their outcome, the metric by what a treatment changes about it.",
        ),
    )
