"""The rehearsal: what only the metric phase does is tried on one batch before the first step."""

from __future__ import annotations

import copy
import logging
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from accelerate.utils import gather_object
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor, nn
from transformers import Trainer

from ..errors import ConfigurationError, MetricOptError
from ..evaluation.evaluator import undisturbed

logger = logging.getLogger(__name__)

GUIDE_STATE = "Let the guide's state_dict() hold tensors, numbers, texts, lists and dicts."
# what trainers keep losses in until they are logged
COLLECTIONS = (list, dict, set, deque, defaultdict, Counter, OrderedDict)


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
        remedy = "Look at the error above; a run without a metric shows whether Trainer can take this step."
        if None in errors:
            remedy = 'Choose a phi that it depends on: phi="a regular expression over parameter names".'
        raise ConfigurationError(
            "A training step as the metric phase takes it, with everything but phi frozen and in eval mode, was tried "
            f"on one batch and failed ({why}). Nothing was trained. It fails also without freezing, and with "
            f"dropout and batch statistics alone switched off. {remedy}"
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
def told(what: str, remedy: str) -> Iterator[None]:
    """Inside, `what` is rehearsed: an error that nobody has explained yet says so, and the remedy."""
    try:
        yield
    except Exception as error:
        if isinstance(error, MetricOptError) or should_reduce_batch_size(error):
            raise
        raise ConfigurationError(
            f"{what[0].upper() + what[1:]}, as the metric phase will need, was tried before training and failed "
            f"({type(error).__name__}: {error}). Nothing was trained. {remedy}"
        ) from error


@contextmanager
def attributes_kept(trainer: Trainer) -> Iterator[None]:
    """On leaving, a trainer's attributes are what they were, and so is what a subclass keeps in them: numbers, tensors,
    lists of losses to be logged, modules with buffers. Data sets are left alone, and so is what other objects hold."""
    attributes = dict(vars(trainer))
    others = {id(trainer.train_dataset), id(trainer.eval_dataset), id(trainer.model), id(trainer.model_wrapped)}
    put_back = [put for value in attributes.values() if id(value) not in others and (put := _putting_back(value))]
    try:
        yield
    finally:
        vars(trainer).clear()
        vars(trainer).update(attributes)
        for put in put_back:
            put()


@contextmanager
def untouched(trainer: Trainer, weights: bool) -> Iterator[None]:
    """On leaving, trainer and model are as before: random states, modes, gradients, buffers, attributes; logs are off.

    Args:
        weights: whether weights and optimizer may be written to inside, as by a training step of the user's own.
    """
    model, optimizer = trainer.model, trainer.optimizer
    held = [p for group in optimizer.param_groups for p in group["params"]]  # also of a loss, outside the model
    parameters = list(dict.fromkeys([*model.parameters(), *held]))
    flags = [(p, p.requires_grad, p.grad) for p in parameters]
    tensors = [*model.buffers(), *(parameters if weights else ())]
    before = [tensor.detach().cpu().clone() for tensor in tensors]
    state = copy.deepcopy(optimizer.state_dict()) if weights else None
    try:
        with attributes_kept(trainer), undisturbed(model), torch.enable_grad():
            trainer.log = lambda *args, **kwargs: None
            for parameter in parameters:
                parameter.grad = None
            yield
    finally:
        for parameter, flag, grad in flags:
            parameter.requires_grad_(flag)
            parameter.grad = grad
        with torch.no_grad():
            for tensor, value in zip(tensors, before, strict=True):
                tensor.copy_(value)
        if weights and (state["state"] or optimizer.state):
            optimizer.load_state_dict(state)


def _putting_back(value: Any) -> Callable[[], None] | None:
    """For what can change in itself: puts back, in itself, what it holds now; collections in a dict included."""
    if isinstance(value, nn.Module):
        put_back = [_putting_back(buffer) for buffer in value.buffers()]
        return (lambda: [put_buffer() for put_buffer in put_back]) if put_back else None
    if isinstance(value, Tensor):
        return partial(_fill, value, value.detach().clone())
    if type(value) not in COLLECTIONS:
        return None
    before = copy.copy(value)
    inner = [_putting_back(item) for item in value.values()] if isinstance(value, dict) else []

    def put() -> None:
        value.clear()
        value.update(before) if isinstance(value, (dict, set)) else value.extend(before)
        for put_item in filter(None, inner):
            put_item()

    return put


def _fill(tensor: Tensor, value: Tensor) -> None:
    with torch.no_grad():
        tensor.copy_(value)
