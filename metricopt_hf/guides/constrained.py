"""The guide of a metric with constraints: one guide for the metric, and one for each number that must be in bounds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..evaluation.constraints import Constraint
from .base import Direction, Guide, GuideContext, Round
from .trust import Trust


class ConstrainedGuide(Guide):
    """Follows the metric's guide where all constraints hold, and elsewhere those of the constraints that do not.

    Each of the guides learns one number of the same observations, and is judged by how it predicts that one. Whether a
    constraint holds at phi is said by the newest round: its points lie round phi in pairs, so that their mean stands
    for phi itself.

    Args:
        objective: of the metric.
        constraints: the first of the metric's `keys`.
        guards: a guide for each of these.
    """

    def __init__(self, objective: Guide, constraints: Sequence[Constraint], guards: Sequence[Guide]):
        self.objective, self.constraints, self.guards = objective, tuple(constraints), list(guards)
        self.scope, self.in_first_phase = objective.scope, objective.in_first_phase
        self.wants_predictions, self.over = objective.wants_predictions, objective.over

    def start(self, context: GuideContext) -> None:
        self.context, self.off = context, None
        self.values: np.ndarray | None = None  # [m] of the constraints' keys, at about phi
        self.objective.start(context)
        for index, (constraint, guard) in enumerate(zip(self.constraints, self.guards, strict=True)):
            seed = int(torch.randint(2**31, (), generator=context.generator))
            guard.start(
                replace(
                    context,
                    greater_is_better=constraint.greater_is_better,
                    generator=torch.Generator().manual_seed(seed),
                    metric=lambda prediction, index=index: context.metric(prediction).values[index],
                )
            )

    @property
    def trust(self) -> Trust:
        """Of the metric's guide."""
        return self.objective.trust

    @property
    def violated(self) -> list[int]:
        """Which constraints do not hold at about phi; none before anything was observed."""
        if self.values is None:
            return []
        return [i for i, c in enumerate(self.constraints) if c.shortfall(float(self.values[i])) > 0]

    @property
    def active(self) -> list[Guide]:
        """The guides that are followed now."""
        return [self.guards[i] for i in self.violated] or [self.objective]

    def predict(self, z: np.ndarray) -> np.ndarray | None:
        return self.objective.predict(z)

    def observe(self, observed: Round) -> None:
        self.objective.observe(observed)
        for index, guard in enumerate(self.guards):
            real, interpolated = observed.trajectory.of_key(index), observed.interpolated.of_key(index)
            scores = _own_scores(observed, index)
            guard.observe(replace(observed, trajectory=real, interpolated=interpolated, scores=scores))
        newest = (observed.trajectory if observed.is_real else observed.interpolated).last_round
        self.values = newest.raw[:, : len(self.constraints)].mean(0)

    def learn(self, observed: Round) -> None:
        self.observe(observed)

    @property
    def standing(self) -> tuple[float, str]:
        if self.off is not None:
            return 0.0, self.off
        standings = [guide.standing for guide in self.active]
        trust, reason = float(np.mean([trust for trust, _ in standings])), standings[0][1]
        towards = ", ".join(str(self.constraints[i]) for i in self.violated)
        return trust, f"{reason}, towards {towards}" if towards else reason

    def direction(self, phi: Tensor) -> Direction | None:
        """Of several constraints that do not hold: the mean of their directions, each as long as it is trusted."""
        answers = [guide.direction(phi) for guide in self.active]
        if any(answer is None for answer in answers):
            return None
        if self.off is not None:
            return Direction(torch.zeros_like(phi), 0.0, self.off)
        vector = sum(a.trust * a.vector / a.vector.norm().clamp_min(1e-30) for a in answers)
        if len(answers) == 1:
            vector = answers[0].vector
        trust = sum(a.trust for a in answers) / len(answers)  # numbers, or tensors where phi is
        return Direction(vector, trust, self.standing[1])

    def loss(self, inputs: dict[str, Any], outputs: Any, task_loss: Tensor) -> Tensor | None:
        losses = [guide.loss(inputs, outputs, task_loss) for guide in self.active]
        return None if any(loss is None for loss in losses) else sum(losses) / len(losses)

    def gradient_agreement(self, phi: Tensor) -> float:
        return min(guide.gradient_agreement(phi) for guide in self.active)

    @property
    def coverage(self) -> float | None:
        return self.objective.coverage

    @property
    def network(self):
        """Of the metric: what is shared predicts that."""
        return self.objective.network

    @property
    def behaviour(self):
        return self.objective.behaviour

    def expect(self, phi: Tensor) -> tuple[float, float] | None:
        return self.objective.expect(phi)

    def state_dict(self) -> dict[str, Any]:
        return {
            "off": self.off,
            "values": None if self.values is None else torch.as_tensor(self.values),
            "guides": [guide.state_dict() for guide in (self.objective, *self.guards)],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.off, values = state["off"], state["values"]
        self.values = None if values is None else values.numpy()
        for guide, own in zip((self.objective, *self.guards), state["guides"], strict=True):
            guide.load_state_dict(own)


def _own_scores(observed: Round, index: int) -> np.ndarray | None:
    """[n] of a constraint's own number, on each of the round's predictions."""
    if observed.predictions is None or observed.z is None:
        return observed.scores
    count = len(observed.z)
    for taken in (observed.interpolated, observed.trajectory):
        if np.array_equal(taken.z[-count:], observed.z):
            return taken.raw[-count:, index]
    return observed.scores
