"""What a subclass keeps of losses and batches is of training: the guidance's own passes leave no trace in it."""

from __future__ import annotations

from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from transformers import Trainer

COLLECTIONS = (dict, list, set, deque, defaultdict, Counter, OrderedDict)
DATA = ("train_dataset", "eval_dataset", "eval_examples")  # may be lists of all rows, which no step changes
PLAIN = (int, float, complex, str, bool, type(None), tuple)


@contextmanager
def bookkeeping_kept(trainer: Trainer) -> Iterator[None]:
    """On leaving, numbers, texts, tensors and collections of the trainer are as before; each in itself.

    Inside, the trainer logs nothing, whatever its subclass logs in its loss.
    """
    attributes = vars(trainer)
    log = attributes.get("log")
    plain = {name: value for name, value in attributes.items() if isinstance(value, (*PLAIN, Tensor))}
    undo = [undo_of(value) for name, value in attributes.items() if type(value) in COLLECTIONS and name not in DATA]
    tensors = [(value, value.detach().clone()) for value in plain.values() if isinstance(value, Tensor)]
    attributes["log"] = lambda *args, **kwargs: None
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
    """Puts back, in itself, what a collection holds now, collections inside of it included."""
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
