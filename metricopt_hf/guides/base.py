"""Guide: which way the metric improves, and how far to follow. The one extension point of the trainer.

A guide goes through `start`, then `observe` once a round, and between rounds is asked at every optimizer step: for a
`direction` of phi, or for a `loss` instead of the task's. How far it is followed is not its own to say: every guide,
ours, the controls and yours, is judged by the same `Trust`, by what it predicted before a score was known.

`DirectionGuide` is the usual kind: it says what it predicts (`predict`), what it makes of the observations (`fit`), and
in which direction of phi the metric rises (`ascent`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from transformers import EvalPrediction

from ..evaluation.trajectory import Trajectory
from ..phi import Coordinates
from ..value import OVER_PHI, Behaviour, ValueNetwork
from .trust import Trust

OFF = "switched off"


@dataclass(frozen=True)
class GuideContext:
    """What a guide is given at the start of a phase.

    Attributes:
        coordinates: of the metric phase; their origin is phi at its start.
        greater_is_better: which way the metric is better.
        generator: the guide's only randomness, the same on every rank.
        metric: the black box, on predictions that the guide has from a `Round` or has made of them; every call is
            charged as an observation. Raises `MetricError`.
        value_weight: lambda, the length of the guide's gradient against the task's at full trust. Of a direction the
            phase sees to it (see `blend`), of a loss the guide.
    """

    coordinates: Coordinates
    greater_is_better: bool
    generator: torch.Generator
    metric: Callable[[EvalPrediction], float]
    value_weight: float = 1.0


@dataclass(frozen=True)
class Round:
    """One round of observations, as a guide gets it.

    Attributes:
        trajectory: all real observations so far; where the round is real, the new ones are its `last_round`.
        interpolated: observations on interpolated predictions (see `VirtualObserver`), the latest ones.
        predictions: predictions and labels behind each of the new ones, real or interpolated, where the guide
            `wants_predictions`.
        scores: [n] the metric on each of `predictions`: of an interpolated one not what its observation says, as that
            is moved (see `VirtualObserver.observe`).
        z: [n, k] where each of `predictions` was made; None: where the last n real observations were.
        is_real: whether the round's own observations are real ones, by which the guide is judged.
    """

    trajectory: Trajectory
    interpolated: Trajectory = field(default_factory=Trajectory)
    predictions: Sequence[EvalPrediction] | None = None
    scores: np.ndarray | None = None
    is_real: bool = True
    z: np.ndarray | None = None

    @property
    def everything(self) -> Trajectory:
        """All of them, the real ones first."""
        return self.trajectory.joined(self.interpolated)


@dataclass(frozen=True)
class Direction:
    """A guide's answer.

    Attributes:
        vector: v, [d], in phi; a step *against* it improves the metric, as with a loss gradient. Its length is ignored.
        trust: in [0, 1]; how far to follow the guide here. A number, or a scalar tensor where phi is, so that no step
            waits for the device.
        reason: why the trust is what it is, in a few words.
    """

    vector: Tensor
    trust: float | Tensor
    reason: str


class Guide(ABC):
    """Is shown observations, answers a direction of phi or a loss.

    Class attributes that a guide may set:
        scope: "phi", or "all" for a guide whose loss shall move every trainable parameter.
        in_first_phase: whether it is started with the run and asked in its first phase too, before phi alone is tuned.
        wants_predictions: whether rounds bring predictions and labels.
        over: what a value function that it starts from, or makes, is a function of: "phi" or "behaviour".

    `coverage` is the share of the last round inside the 90 % intervals predicted for it, None without intervals.
    """

    scope: Literal["phi", "all"] = "phi"
    in_first_phase = False
    wants_predictions = False
    over = OVER_PHI

    context: GuideContext
    trust: Trust
    off: str | None = None
    coverage: float | None = None

    def start(self, context: GuideContext) -> None:
        """Begin a phase, forgetting any earlier one."""
        self.context, self.trust, self.off = context, Trust(), None

    def observe(self, observed: Round) -> None:
        """Be judged on a real round, then learn from it."""
        if observed.is_real:
            latest = observed.trajectory.last_round
            predicted = self.predict_round(observed)
            if predicted is not None:
                self.trust.update(predicted, latest.scores)
        self.learn(observed)

    def predict(self, z: np.ndarray) -> np.ndarray | None:
        """Scores expected at z: [n, k] -> [n], in any unit that rises with the metric; None before there is a fit."""
        return None

    def predict_round(self, observed: Round) -> np.ndarray | None:
        """The same for the observations of a round that are to be judged: by default from where they were taken.

        One that learns from predictions says it of these, of which there are as many, and needs no `predict`.
        """
        return self.predict(observed.trajectory.last_round.z)

    @abstractmethod
    def learn(self, observed: Round) -> None:
        """Learn from a round, and from all that came before it."""

    @property
    def standing(self) -> tuple[float, str]:
        """Trust in [0, 1], 0 when switched off, and its reason."""
        return self.trust.value() if self.off is None else (0.0, self.off)

    def direction(self, phi: Tensor) -> Direction | None:
        """Where to go from phi: [d]; None of a guide that speaks through the loss."""
        return None

    def loss(self, inputs: dict[str, Any], outputs: Any, task_loss: Tensor) -> Tensor | None:
        """What to minimise instead of the task's loss, a mean over the batch as that is; None of one that does not.

        The trainer goes from the one to the other by trust: `task_loss + trust * (loss - task_loss)`.

        Args:
            inputs: the batch, labels included.
            outputs: of the model.
            task_loss: of the batch, differentiable.
        """
        return None

    def gradient_agreement(self, phi: Tensor) -> float:
        """How sure it is of its direction at phi: [d] -> [0, 1], by which its trust is multiplied."""
        return 1.0

    def switch_off(self, reason: str) -> None:
        """Follow this guide no more; `reason` is what it answers from now on."""
        self.off = f"{OFF}: {reason}"

    @property
    def network(self) -> ValueNetwork | None:
        """What it has fitted to the metric and can be shared, once it is fitted; None without such a thing."""
        return None

    @property
    def behaviour(self) -> tuple[Behaviour, Trajectory] | None:
        """Of a network over behaviour: which, and the summaries and scores that it was fitted to. None over phi."""
        return None

    def expect(self, phi: Tensor) -> tuple[float, float] | None:
        """Mean and standard deviation of the metric at phi: [d]; None of a guide that has no such thing."""
        if self.network is None:
            return None
        mean, std = self.network.predict(self.context.coordinates.encode(phi).cpu())
        return float(mean), float(std)

    def state_dict(self) -> dict[str, Any]:
        """Nested dicts and lists of tensors and JSON values; with `load_state_dict` after `start`, all to go on."""
        return {"trust": self.trust.state_dict(), "generator": self.context.generator.get_state(), "off": self.off}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.trust.load_state_dict(state["trust"])
        self.context.generator.set_state(state["generator"].to(torch.uint8))
        self.off = state["off"]


class AscendingGuide(Guide):
    """A guide that answers the direction of phi in which what it has learned improves, as far as it is trusted."""

    @abstractmethod
    def ascent(self, phi: Tensor) -> Tensor:
        """A direction of phi, [d] -> [d], in which the metric's value rises (whether or not that is better)."""

    def direction(self, phi: Tensor) -> Direction:
        trust, reason = self.standing
        if trust == 0:
            return Direction(torch.zeros_like(phi), 0.0, reason)
        ascent, agreement = self.ascent_and_agreement(phi)
        vector = -ascent if self.context.greater_is_better else ascent
        return Direction(vector, trust * agreement, reason)

    def ascent_and_agreement(self, phi: Tensor) -> tuple[Tensor, float | Tensor]:
        """`ascent` and `gradient_agreement`, for a guide that has both from one computation."""
        return self.ascent(phi), self.gradient_agreement(phi)


class DirectionGuide(AscendingGuide):
    """A guide that is fitted to the observations and answers the direction in which its fit improves."""

    def learn(self, observed: Round) -> None:
        self.fit(observed.everything)

    @abstractmethod
    def fit(self, trajectory: Trajectory) -> None:
        """Learn from all observations so far."""
