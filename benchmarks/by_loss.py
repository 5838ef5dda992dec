"""Training phi by a loss alone: what anybody would do first, and the rival of everything that sees the metric.

Adam on the vector phi, the same phi that MetricOpt moves; the metric does nothing but choose among the looks.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import count
from time import process_time
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from metricopt_hf import Ledger, Metric
from metricopt_hf.posthoc import add_bias, tune_bias

from .looks import evaluator, frozen_phi
from .problem import Problem, Rows, Task, inputs_of
from .training import Budget, Outcome

POST_HOC_CALLS = 160  # to tune a bias
MAX_NORM = 1.0  # of a gradient, as Trainer clips it
Loss = Callable[[dict[str, Tensor], Tensor], Tensor]  # outputs, labels -> scalar


def batches(dataset: Dataset, size: int, seed: int) -> Iterator[dict[str, Tensor]]:
    """Without end; every epoch in another order, the one in which Trainer would have them."""
    for epoch in count():
        order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed + epoch))
        for rows in order.split(size):
            yield default_collate([dataset[i] for i in rows.tolist()])


def train_by_loss(
    task: Task,
    problem: Problem,
    seed: int,
    budget: Budget,
    config: Mapping[str, Any],
    dataset: Dataset | None = None,
    loss: Loss | None = None,
    judge: Rows | None = None,
) -> Outcome:
    """Train phi.

    Args:
        config: "phi_learning_rate", and "lr_scheduler_type": constant (default) or linear, down to zero.
        dataset: to train on; default: train.
        loss: default: the model's own.
        judge: on which the looks are; default: selection.
    """
    start, ledger, phi = process_time(), Ledger(), frozen_phi(problem)
    selection = evaluator(task, problem, phi, judge or problem.selection, ledger)
    point = phi.read().requires_grad_()
    optimizer = torch.optim.Adam([point], config["phi_learning_rate"])
    linear = config.get("lr_scheduler_type") == "linear"
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: 1 - s / budget.steps if linear else 1.0)
    every, curve, visited = budget.steps // budget.rounds, [], []

    def look(step: int) -> None:
        score, spent = selection.evaluate("select"), round(process_time() - start, 2)
        curve.append({"step": step, "passes": 0, "seconds": spent, "selection": float(score)})
        visited.append(phi.read())

    look(0)
    drawn = batches(problem.train if dataset is None else dataset, budget.batch_size, seed)
    for step in range(budget.steps):
        batch = next(drawn)

        def of_batch(batch: dict[str, Tensor] = batch) -> Tensor:
            if loss is None:
                return phi.model(**batch)["loss"]
            return loss(phi.model(**inputs_of(batch)), batch["labels"])

        point.grad = phi.gradient(of_batch)
        torch.nn.utils.clip_grad_norm_([point], MAX_NORM)
        optimizer.step()
        schedule.step()
        phi.write(point.detach())
        if (step + 1) % every == 0:
            look(step + 1)
    best = max(range(len(curve)), key=lambda i: task.sign * curve[i]["selection"])
    return Outcome(
        visited[best],
        curve[best]["step"],
        curve[best]["selection"],
        curve,
        ledger,
        process_time() - start,
        torch.stack(visited[len(visited) // 2 :]).mean(0),
    )


def trained_first(
    task: Task, problem: Problem, seed: int, budget: Budget, configs: Sequence[Mapping[str, Any]]
) -> tuple[Problem, Ledger, float]:
    """All steps of a run but its metric steps, once with each setting of the loss, of which the better one is taken.

    Both are judged by the observation split, each at its best look, and with a bias per logit where that makes sense:
    the selection split has yet to say whether the metric steps pay, and would favour what was chosen by it.

    Returns:
        The problem with that look as its model; what choosing has cost; and seconds of processor time.
    """
    start, every, ledger = process_time(), budget.steps // budget.rounds, Ledger()
    steps = budget.steps - budget.metric_steps
    first = replace(budget, steps=steps, rounds=steps // every)
    metric, made = Metric(task.metric, task.metric_name, task.greater_is_better), []
    for config in configs:
        outcome = train_by_loss(task, problem, seed, first, config, judge=problem.observation)
        ledger.add("select", outcome.ledger.calls["select"], outcome.ledger.seconds["select"])
        model = copy.deepcopy(problem.model)
        problem.phi(model).write(outcome.phi)
        prediction = problem.predict(model, problem.observation)
        if task.decides:
            prediction = add_bias(prediction, tune_bias(metric, prediction, ledger, POST_HOC_CALLS))
        made.append((task.sign * metric(prediction), model))
    _, model = max(made, key=lambda pair: pair[0])
    return replace(problem, model=model), ledger, process_time() - start
