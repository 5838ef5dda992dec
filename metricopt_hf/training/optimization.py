"""The optimizer's share in the two phases: in the metric phase phi has a learning rate and a schedule of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from transformers import TrainingArguments, get_scheduler

from ..errors import ConfigurationError
from ..phi import PhiSpace


class PhiSchedule:
    """phi's learning rate in the metric phase, whoever made optimizer and schedule.

    It runs the schedule of `args` once, over the steps of the phase. It is set before each update of phi, over whatever
    the trainer's schedule has set, which is the first phase's.

    Args:
        start: first step of the metric phase.
        end: the number of steps.
    """

    def __init__(self, args: TrainingArguments, start: int, end: int):
        self.args, self.start = args, start
        # without warm-up behind a first phase: the model is trained already
        self._schedule = _schedule(args, end - start, 0 if start else args.get_warmup_steps(end))

    def rate(self, step: int, peak: float) -> float:
        """At an optimizer step of the metric phase."""
        return peak * self._schedule(step - self.start)

    def apply(
        self, optimizer: Optimizer, scheduler: LRScheduler | None, phi: PhiSpace, moving: PhiSpace, step: int
    ) -> None:
        """Set the rates of the groups that hold what is `moving`; whatever else is in them has no gradient by now.

        Where more than phi moves, the rest runs the schedule from its group's own peak. A schedule that reacts to
        evaluation instead of counting steps begins with phi's peak, and is left to itself then.
        """
        reacts = isinstance(scheduler, ReduceLROnPlateau) or not isinstance(scheduler, LRScheduler)
        of_phi, of_all = ({id(p) for p in space.parameters} for space in (phi, moving))
        for group in _groups(optimizer, moving.parameters):
            shared = group.get("initial_lr", group["lr"])
            if any(id(p) in of_all - of_phi for p in group["params"]):
                if not reacts:
                    group["lr"] = self.rate(step, shared)
                continue
            peak = self.args.phi_learning_rate or shared
            if not reacts:
                group["lr"] = self.rate(step, peak)
            elif step == self.start:
                group["lr"] = peak


def learning_rate(optimizer: Optimizer, parameters: Sequence[nn.Parameter]) -> float:
    """Of the first of `parameters`."""
    return float(_groups(optimizer, parameters[:1])[0]["lr"])


def hold(optimizer: Optimizer, model: nn.Module, parameters: Sequence[nn.Parameter]) -> list[bool]:
    """Let an optimizer, whoever made it, hold all of `parameters`; says of each whether it did before.

    Others come into a group that there is, as a schedule for it may be there too; of several, into that with the least
    weight decay.

    Raises:
        ConfigurationError: it holds nothing of `model`.
    """
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if not any(id(p) in held for p in model.parameters()):
        raise ConfigurationError(
            f"The optimizer given does not hold any parameter of {type(model).__name__}: make it over "
            "model.parameters() of the model that the trainer is given, or let the trainer make it."
        )
    missing = [p for p in parameters if id(p) not in held]
    min(optimizer.param_groups, key=lambda group: group.get("weight_decay") or 0)["params"].extend(missing)
    return [id(p) in held for p in parameters]


def set_apart(optimizer: Optimizer, parameters: Sequence[nn.Parameter]) -> None:
    """Move `parameters` into groups of their own, which differ from those that they were in by nothing else."""
    mine = {id(p) for p in parameters}
    for group in list(optimizer.param_groups):
        moved = [p for p in group["params"] if id(p) in mine]
        if 0 < len(moved) < len(group["params"]):
            group["params"] = [p for p in group["params"] if id(p) not in mine]
            optimizer.add_param_group({**group, "params": moved})


def forget(optimizer: Optimizer, parameters: Sequence[nn.Parameter]) -> None:
    """Let the optimizer begin with `parameters` as if it had not moved them yet."""
    for parameter in parameters:
        optimizer.state.pop(parameter, None)


def _groups(optimizer: Optimizer, parameters: Sequence[nn.Parameter]) -> list[dict]:
    mine = {id(p) for p in parameters}
    return [group for group in optimizer.param_groups if any(id(p) in mine for p in group["params"])]


def _schedule(args: TrainingArguments, steps: int, warmup_steps: int) -> Callable[[int], float]:
    """step -> factor on the peak learning rate."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    scheduler = get_scheduler(
        args.lr_scheduler_type,
        optimizer,
        num_warmup_steps=warmup_steps,
        num_training_steps=steps,
        scheduler_specific_kwargs=args.lr_scheduler_kwargs,
    )
    # one that reacts to evaluation has none
    return scheduler.lr_lambdas[0] if hasattr(scheduler, "lr_lambdas") else lambda step: 1.0
