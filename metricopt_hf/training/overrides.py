"""What a subclass of Trainer has overridden, as far as it can be seen before a run."""

from __future__ import annotations

from typing import Any

from transformers import Trainer


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
