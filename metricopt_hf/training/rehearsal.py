"""The rehearsal: what only the metric phase does is tried on one batch before the first step."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from accelerate.utils import gather_object
from accelerate.utils.memory import should_reduce_batch_size
from transformers import Trainer

from ..errors import ConfigurationError, MetricOptError
from ..evaluation.evaluator import undisturbed

logger = logging.getLogger(__name__)


def is_trainers(method: Callable) -> bool:
    """Whether a trainer's method is Trainer's own or this library's, and not a user's or one set on the instance."""
    function = getattr(method, "__func__", None)
    if function is None:
        return False
    return function is getattr(Trainer, function.__name__, None) or function.__module__.startswith("metricopt_hf.")


@dataclass(frozen=True)
class Stillness:
    """How the metric phase holds still what is not tuned.

    Attributes:
        frozen: whether it needs no gradients. Else it gets them, and they are dropped before the update: a training
            step of the user's own may look at them, and DistributedDataParallel waits for them.
        eval_mode: whether everything is in eval mode, or only dropout and batch statistics (see `modes.pinned`).
    """

    frozen: bool = True
    eval_mode: bool = True


def first_that_works(
    candidates: Sequence[Stillness], attempt: Callable[[Stillness], int], wanted: int, world_size: int
) -> Stillness:
    """The first candidate with which the loss reaches all of phi, or else most of it; the same on every rank.

    Args:
        attempt: takes one training step without an update, and returns how many of phi's parameters got a gradient.
        wanted: how many there are.

    Raises:
        ConfigurationError: none works; with what the first raised as its cause.
    """
    reached: list[int] = []
    errors: list[Exception | None] = []
    for candidate in candidates:
        try:
            count, error = attempt(candidate), None
        except Exception as failure:
            if should_reduce_batch_size(failure):  # auto_find_batch_size waits for it
                raise
            count, error = 0, failure
        reached.append(min(gather_object([count])) if world_size > 1 else count)
        errors.append(error)
        if reached[-1] == wanted:
            break
    if max(reached) == 0:
        why = "the loss does not reach phi" if None in errors else f"{type(errors[0]).__name__}: {errors[0]}"
        raise ConfigurationError(
            "A training step as the metric phase takes it, with everything but phi frozen and in eval mode, was tried "
            f"on one batch and failed ({why}). Nothing was trained. It fails also without freezing, and with "
            "dropout and batch statistics alone switched off."
        ) from errors[0]
    chosen = reached.index(max(reached))
    if chosen > 0:
        error = errors[0]
        why = "reaches less of phi" if error is None else f"fails ({type(error).__name__}: {error})"
        logger.warning(
            f"In the metric phase a step with everything but phi frozen and in eval mode {why}: what is not tuned "
            + ("keeps its gradients, which are dropped" if not candidates[chosen].frozen else "is frozen")
            + (", and is in eval mode." if candidates[chosen].eval_mode else ", and only dropout and batch statistics "
            "are in eval mode.")
        )
    return candidates[chosen]


@contextmanager
def told(what: str) -> Iterator[None]:
    """Inside, `what` is rehearsed: an error that nobody has explained yet says so."""
    try:
        yield
    except Exception as error:
        if isinstance(error, MetricOptError) or should_reduce_batch_size(error):
            raise
        raise ConfigurationError(
            f"{what[0].upper() + what[1:]}, as the metric phase will need, was tried before training and failed "
            f"({type(error).__name__}: {error}). Nothing was trained."
        ) from error


@contextmanager
def untouched(trainer: Trainer, weights: bool) -> Iterator[None]:
    """On leaving, trainer and model are as before: random states, modes, gradients, buffers, attributes; logs are off.

    Args:
        weights: whether weights and optimizer may be written to inside, as by a training step of the user's own.
    """
    model, optimizer = trainer.model, trainer.optimizer
    attributes = dict(vars(trainer))
    flags = [(p, p.requires_grad) for p in model.parameters()]
    tensors = [*model.buffers(), *(model.parameters() if weights else ())]
    before = [tensor.detach().cpu().clone() for tensor in tensors]
    state = copy.deepcopy(optimizer.state_dict()) if weights else None
    trainer.log = lambda *args, **kwargs: None
    try:
        with undisturbed(model), torch.enable_grad():
            yield
    finally:
        vars(trainer).clear()
        vars(trainer).update(attributes)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
            parameter.grad = None
        with torch.no_grad():
            for tensor, value in zip(tensors, before, strict=True):
                tensor.copy_(value)
        if weights and (state["state"] or optimizer.state):
            optimizer.load_state_dict(state)
