"""Guide: which way the metric improves, in compact coordinates. The one extension point of the trainer.

A guide goes through `start` once a run; then, for each update, `fit` and `gradient`. It makes metric calls through the
`LocalMetric` that it gets, and knows nothing of budgets, devices, trust or selection: the phase decides how far to
follow it. Every guide, ours, the controls and yours, is judged by the score of the model behind its step.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..linear.local_metric import LocalMetric
from ..value import ValueNetwork


@dataclass(frozen=True)
class GuideContext:
    """The context of a guide, which it gets at the start of a metric phase.

    Attributes:
        dim: k, the number of coordinates.
        generator: the guide's only randomness, the same on every rank.
        network: a value network to start from, in these coordinates; None without one.
    """

    dim: int
    generator: torch.Generator
    network: ValueNetwork | None = None


class Guide(ABC):
    """Learns from metric calls which way the metric improves."""

    context: GuideContext

    def start(self, context: GuideContext) -> None:
        """A metric phase begins: forget everything."""
        self.context = context

    def applies(self, metric: LocalMetric) -> bool:
        """Whether the guide works for this metric and these predictions; called once, at the start."""
        return True

    @abstractmethod
    def fit(self, metric: LocalMetric, z: Tensor) -> None:
        """Learn from metric calls near z: [k], relative to phi."""

    @abstractmethod
    def gradient(self, z: Tensor) -> Tensor:
        """A direction, [k], in which the metric improves at z. Its length is ignored."""

    def state_dict(self) -> dict[str, Any]:
        """The guide's knowledge as nested dicts of tensors and numbers, without the context."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027, a guide may remember nothing
        """After a `start`: go on with a state of `state_dict`."""
