"""Signature: what the inputs of a value function mean, and what it predicts. Without it, it is just numbers.

There are two kinds: over phi, for one model and what is tuned of it; and over behaviour, for one kind of predictions.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from ..errors import ValueFunctionError
from .behaviour import Behaviour

OVER_PHI, OVER_BEHAVIOUR = "phi", "behaviour"
MAX_NAME = 500  # characters of a name in a signature
REMEDIES = {
    OVER_PHI: 'take guide="value_function"',
    OVER_BEHAVIOUR: 'take guide="behaviour"',
}


def readable(name: str) -> str:
    """A name as a signature has it: in one line, printable, of 1 to `MAX_NAME` characters; other names are escaped.

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


def _set(signature: Signature | BehaviourSignature, **values: Any) -> None:
    for name, value in values.items():
        object.__setattr__(signature, name, value)  # it is frozen for everybody else


def check_over(value_function: Any, over: str) -> None:
    """Is a value function, None for none, over what its guide reads? One without a signature says nothing of it.

    Raises:
        ValueFunctionError: it is over something else.
    """
    found = getattr(getattr(value_function, "signature", None), "over", over)
    if found != over:
        raise ValueFunctionError(
            f"The value function given is one over {found}, and the guide takes one over {over}: {REMEDIES[found]}, "
            "or start without it."
        )


@dataclass(frozen=True)
class Signature:
    """What a value function over phi maps: phi -> z = basis^T (phi - origin) -> the metric.

    Attributes:
        model: class of the model, for the reader.
        phi: `PhiSpace.description`: its kind, and name and shape of every parameter in phi's order.
        coordinates: kind of the coordinates, such as "gradient_pca".
        metric: name of the metric, `readable` as all names here.
        greater_is_better: which way it is better.
        origin: [d] float32, phi_0, on the CPU.
        basis: [d, k] float32 with orthonormal columns, on the CPU; None for the identity (k = d).
    """

    over: ClassVar[str] = OVER_PHI

    model: str
    phi: dict[str, Any]
    coordinates: str
    metric: str
    greater_is_better: bool
    origin: Tensor
    basis: Tensor | None

    def __post_init__(self):
        names = {name: readable(getattr(self, name)) for name in ("model", "coordinates", "metric")}
        _set(self, **names, phi=_readable_phi(self.phi), greater_is_better=bool(self.greater_is_better))

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
        _check_metric(self, metric, greater_is_better)


@dataclass(frozen=True)
class BehaviourSignature:
    """What a value function over behaviour maps: a summary of predictions -> the metric.

    Attributes:
        model: class of the model that it was learned on, for the reader.
        behaviour: which summary.
        metric: name of the metric, `readable` as all names here.
        greater_is_better: which way it is better.
    """

    over: ClassVar[str] = OVER_BEHAVIOUR

    model: str
    behaviour: Behaviour
    metric: str
    greater_is_better: bool

    def __post_init__(self):
        names = {name: readable(getattr(self, name)) for name in ("model", "metric")}
        _set(self, **names, greater_is_better=bool(self.greater_is_better))

    def check(self, phi: dict[str, Any], metric: str, greater_is_better: bool) -> None:
        """Can it serve a run with this metric? Any phi will do, and whether the predictions do is told by the first.

        Raises:
            ValueFunctionError: names what differs, and what to do.
        """
        _check_metric(self, metric, greater_is_better)


def _check_metric(signature: Signature | BehaviourSignature, metric: str, greater_is_better: bool) -> None:
    metric, theirs = readable(metric), (signature.metric, signature.greater_is_better)
    if theirs != (metric, greater_is_better):
        raise ValueFunctionError(
            f"The value function predicts {_metric(*theirs)}, this run is judged by "
            f"{_metric(metric, greater_is_better)}. Start without it; or, if the two are one metric under two "
            f"names, name it here as it is named there: metric=Metric(function, {signature.metric!r}, "
            f"{signature.greater_is_better})."
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
    told = [f"{what}: {', '.join(names[:3])}{' ...' * (len(names) > 3)}" for what, names in lists.items() if names]
    return "; ".join([f"{there['kind']} there, {here['kind']} here", *told])


def _metric(name: str, greater_is_better: bool) -> str:
    return f"{name} ({'greater' if greater_is_better else 'smaller'} is better)"
