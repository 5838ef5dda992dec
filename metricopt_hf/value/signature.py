"""Signature: the meaning of a value function's inputs, and the metric that it predicts."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..errors import ValueFunctionError

MAX_NAME = 500  # characters of a name in a signature


def readable(name: str) -> str:
    """A name as a signature holds it: one printable line of 1 to `MAX_NAME` characters; other names are escaped.

    Different names stay different: one that is too long ends with a hash of the whole.

    Example:
        >>> readable("macro f1"), readable("a\\nb"), readable("")
        ('macro f1', 'a\\\\nb', 'unnamed')
    """
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)
    if len(shown) > MAX_NAME:
        tail = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:16]
        shown = f"{shown[: MAX_NAME - 20]}...{tail}"
    return shown or "unnamed"


def _readable_phi(phi: dict[str, Any]) -> dict[str, Any]:
    rows = [[readable(name), list(shape)] for name, shape in phi["parameters"]]
    return {"kind": readable(phi["kind"]), "parameters": rows}


@dataclass(frozen=True)
class Signature:
    """The map of a value function: phi -> z = basis^T (phi - origin) -> the metric.

    Attributes:
        model: class of the model, for the reader.
        phi: `PhiSpace.description`: its kind, and name and shape of every parameter in phi's order.
        coordinates: how their basis was found, such as "jacobian".
        metric: name of the metric, `readable` as all names here.
        greater_is_better: which way it is better.
        origin: [d] float32, phi_0, on the CPU.
        basis: [d, k] float32 with orthonormal columns, on the CPU.
    """

    model: str
    phi: dict[str, Any]
    coordinates: str
    metric: str
    greater_is_better: bool
    origin: Tensor
    basis: Tensor

    def __post_init__(self):
        values: dict[str, Any] = {name: readable(getattr(self, name)) for name in ("model", "coordinates", "metric")}
        values.update(phi=_readable_phi(self.phi), greater_is_better=bool(self.greater_is_better))
        for name, value in values.items():
            object.__setattr__(self, name, value)  # it is frozen for everybody else

    def check(self, phi: dict[str, Any], metric: str, greater_is_better: bool) -> None:
        """Can the value function serve a run with this phi space and this metric?

        Raises:
            ValueFunctionError: names what differs, and what to do.
        """
        phi = _readable_phi(phi)
        if self.phi != phi:
            raise ValueFunctionError(
                f"The value function was learned on another phi space ({self.model}): {_difference(self.phi, phi)}. "
                "Take the model and the `phi` that it was learned with, or start without it."
            )
        metric, theirs = readable(metric), (self.metric, self.greater_is_better)
        if theirs != (metric, greater_is_better):
            raise ValueFunctionError(
                f"The value function predicts {_metric(*theirs)}, this run is judged by "
                f"{_metric(metric, greater_is_better)}. Start without it; or, if the two are one metric under two "
                f"names, name it here as it is named there: metric=Metric(function, {self.metric!r}, "
                f"{self.greater_is_better})."
            )


def _difference(there: dict[str, Any], here: dict[str, Any]) -> str:
    theirs, ours = (dict(map(tuple, phi["parameters"])) for phi in (there, here))
    lists = {
        "only there": [name for name in theirs if name not in ours],
        "only here": [name for name in ours if name not in theirs],
        "of another shape": [
            f"{n} {theirs[n]} there, {ours[n]} here" for n in theirs if ours.get(n, theirs[n]) != theirs[n]
        ],
    }
    parts = [f"{what}: {', '.join(names[:3])}{' ...' * (len(names) > 3)}" for what, names in lists.items() if names]
    return "; ".join([f"{there['kind']} there, {here['kind']} here", *parts])


def _metric(name: str, greater_is_better: bool) -> str:
    return f"{name} ({'greater' if greater_is_better else 'smaller'} is better)"
