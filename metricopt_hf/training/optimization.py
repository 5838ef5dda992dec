"""The optimizer's and the schedule's share in the two phases: phi has a learning rate and a schedule of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import TrainingArguments, get_scheduler

# in an optimizer's group: the peak learning rate that its parameters would have as part of the whole model
SHARED_RATE = "shared_lr"


def give_own_learning_rate(optimizer: Optimizer, parameters: Sequence[nn.Parameter], learning_rate: float) -> None:
    """Move `parameters` out of their groups into groups that differ by the learning rate alone."""
    mine = {id(p) for p in parameters}
    groups = []
    for group in optimizer.param_groups:
        moved = [p for p in group["params"] if id(p) in mine]
        group["params"] = [p for p in group["params"] if id(p) not in mine]
        if moved:
            groups.append({**group, "params": moved, "lr": learning_rate, SHARED_RATE: group["lr"]})
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
    for group in groups:
        optimizer.add_param_group(group)


def restart_schedule(
    scheduler: LRScheduler, parameters: Sequence[nn.Parameter], args: TrainingArguments, start: int, end: int
) -> None:
    """Let the groups of `parameters` run the schedule once more, from `start` to `end`.

    Before `start` they follow, as part of the whole model, the learning rate that they would have had without one of
    their own. Schedules that react to evaluation instead of counting steps are left as they are.
    """

    def change(before: Callable[[int], float], group: dict[str, Any]) -> Callable[[int], float]:
        again = _schedule(args, end - start)
        ratio = group.get(SHARED_RATE, group["initial_lr"]) / group["initial_lr"]
        return lambda step: ratio * before(step) if step < start else again(step - start)

    _change_schedule(scheduler, parameters, change)


def raise_learning_rate(
    scheduler: LRScheduler, parameters: Sequence[nn.Parameter], start: int, end: int, learning_rate: float
) -> None:
    """From `start` to `end`, let the groups of `parameters` go from their own learning rate up to another.

    It rises exponentially over the first third, as in a range test (Smith, 2017, "Cyclical learning rates"), so that
    small steps are tried too, and stays there. Schedules that react to evaluation are left as they are.
    """
    rising = max(1, (end - start) // 3)

    def change(before: Callable[[int], float], group: dict[str, Any]) -> Callable[[int], float]:
        ratio = learning_rate / group["initial_lr"]
        return lambda step: before(step) if step < start else ratio ** min(1, (step - start) / rising)

    _change_schedule(scheduler, parameters, change)


def forget(optimizer: Optimizer, parameters: Sequence[nn.Parameter]) -> None:
    """Let the optimizer begin with `parameters` as if it had not moved them yet."""
    for parameter in parameters:
        optimizer.state.pop(parameter, None)


def _change_schedule(
    scheduler: LRScheduler,
    parameters: Sequence[nn.Parameter],
    change: Callable[[Callable[[int], float], dict[str, Any]], Callable[[int], float]],
) -> None:
    """Replace the step -> factor of the groups of `parameters`, given the old one and the group."""
    if not isinstance(scheduler, LambdaLR):
        return
    mine = {id(p) for p in parameters}
    for i, group in enumerate(scheduler.optimizer.param_groups):
        if any(id(p) in mine for p in group["params"]):
            scheduler.lr_lambdas[i] = change(scheduler.lr_lambdas[i], group)
            group["lr"] = group["initial_lr"] * scheduler.lr_lambdas[i](0)


def _schedule(args: TrainingArguments, steps: int) -> Callable[[int], float]:
    """step -> factor on the peak learning rate, without warm-up: the model is trained already."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    scheduler = get_scheduler(
        args.lr_scheduler_type,
        optimizer,
        num_warmup_steps=0,
        num_training_steps=steps,
        scheduler_specific_kwargs=args.lr_scheduler_kwargs,
    )
    return scheduler.lr_lambdas[0]
