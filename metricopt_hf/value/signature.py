"""Signature: what the coordinates of a value function mean, and what it predicts. Without it, it is just numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..errors import ValueFunctionError


@dataclass(frozen=True)
class Signature:
    """What a value function maps: phi -> z = basis^T (phi - origin) -> the metric.

    Attributes:
        model: class of the model, for the reader.
        phi: `PhiSpace.description`: its kind, and name and shape of every parameter in phi's order.
        coordinates: kind of the coordinates, such as "gradient_pca".
        metric: name of the metric.
        greater_is_better: which way it is better.
        origin: [d] float32, phi_0, on the CPU.
        basis: [d, k] float32 with orthonormal columns, on the CPU; None for the identity (k = d).
    """

    model: str
    phi: dict[str, Any]
    coordinates: str
    metric: str
    greater_is_better: bool
    origin: Tensor
    basis: Tensor | None

    def check(self, phi: dict[str, Any], metric: str, greater_is_better: bool) -> None:
        """Can the value function serve a run with this phi space and this metric?

        Raises:
            ValueFunctionError: names what differs, and what to do.
        """
        if self.phi != phi:
            raise ValueFunctionError(
                f"The value function was learned on another phi space ({self.model}): {_difference(self.phi, phi)}. "
                "Take the model and the `phi` that it was learned with, or start without it."
            )
        if (self.metric, self.greater_is_better) != (metric, greater_is_better):
            raise ValueFunctionError(
                f"The value function predicts {_metric(self.metric, self.greater_is_better)}, this run is judged by "
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
    told = [f"{what}: {', '.join(names[:3])}{' ...' * (len(names) > 3)}" for what, names in lists.items() if names]
    return "; ".join([f"{there['kind']} there, {here['kind']} here", *told])


def _metric(name: str, greater_is_better: bool) -> str:
    return f"{name} ({'greater' if greater_is_better else 'smaller'} is better)"
