"""Subclasses of Trainer: the methods that they override, and the records that they keep on themselves."""

from __future__ import annotations

from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor
from transformers import Trainer

COLLECTIONS = (dict, list, set, deque, defaultdict, Counter, OrderedDict)
DATA = ("train_dataset", "eval_dataset", "eval_examples")  # may be lists of all rows, which no step changes
PLAIN = (int, float, complex, str, bool, type(None), tuple)


@contextmanager
def bookkeeping_kept(trainer: Trainer, quiet: bool = True) -> Iterator[None]:
    """On leaving, numbers, texts, tensors and collections on the trainer have their values from before.

    Subclasses keep records of losses and batches there, which passes of the metric phase must not change. Inside,
    the trainer logs nothing, whatever its subclass logs in its loss; unless `quiet` is False.
    """
    attributes = vars(trainer)
    log = attributes.get("log")
    plain = {name: value for name, value in attributes.items() if isinstance(value, (*PLAIN, Tensor))}
    undo = [undo_of(value) for name, value in attributes.items() if type(value) in COLLECTIONS and name not in DATA]
    tensors = [(value, value.detach().clone()) for value in plain.values() if isinstance(value, Tensor)]
    attributes["log"] = (lambda *args, **kwargs: None) if quiet else partial(type(trainer).log, trainer)
    try:
        yield
    finally:
        attributes["log"] = log
        if log is None:
            del attributes["log"]
        for name, value in plain.items():
            if attributes.get(name) is not value:
                attributes[name] = value
        for tensor, value in tensors:
            tensor.data.copy_(value)
        for put_back in undo:
            put_back()


def undo_of(collection: Any) -> Callable[[], None]:
    """A function that puts the present items back into a collection, and into collections inside of it."""
    items = list(collection.items()) if isinstance(collection, dict) else list(collection)
    inner = [
        undo_of(value)
        for value in (collection.values() if isinstance(collection, dict) else items)
        if type(value) in COLLECTIONS
    ]

    def put_back() -> None:
        collection.clear()
        if isinstance(collection, dict):
            for key, value in items:
                collection[key] = value
        elif isinstance(collection, set):
            collection.update(items)
        else:
            collection.extend(items)
        for put in inner:
            put()

    return put_back


def is_overridden(trainer: Trainer, name: str) -> bool:
    """Whether a method is neither Trainer's own nor this library's."""
    method = getattr(trainer, name)
    module = getattr(getattr(method, "__func__", method), "__module__", "") or ""
    return module.partition(".")[0] not in ("transformers", __name__.partition(".")[0])


def without_super(trainer: Trainer, name: str, base: type) -> str | None:
    """The class before `base` in the order of resolution whose method never calls the one that it overrides.

    Such a method would keep `base`'s own from being called. What a class's source does not show is not found.
    """
    for cls in type(trainer).__mro__[: type(trainer).__mro__.index(base)]:
        method = vars(cls).get(name)
        code: Any = getattr(method, "__code__", None)
        if code is not None and not _calls_further(code, name):
            return cls.__qualname__
    return None


def _calls_further(code: Any, name: str) -> bool:
    """Whether `super`, or the method of a named class, is among the names of a function or of those inside of it."""
    if "super" in code.co_names or "__class__" in code.co_freevars or name in code.co_names:
        return True
    return any(_calls_further(inner, name) for inner in code.co_consts if hasattr(inner, "co_names"))
