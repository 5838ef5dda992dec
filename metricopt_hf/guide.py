"""Guide: which way the metric improves, and how far to follow. The one extension point of the trainer.

A new guide says three things: what it predicts (`predict`), what it makes of the observations (`fit`), and in which
direction of phi the metric rises (`ascent`). How far it is followed is not its own to say: every guide, ours, the
controls and yours, is judged by the same `Trust`. It may ask for less where it is not sure (`certainty`).
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .calibration import Calibration
from .errors import ConfigurationError
from .phi import Coordinates
from .trajectory import Trajectory
from .trust import Trust
from .value import ValueFunction, fit, learners, num_groups

OFF = "switched off"


@dataclass(frozen=True)
class Direction:
    """A guide's answer.

    Attributes:
        vector: v, [d], in phi; a step *against* it improves the metric, as with a loss gradient. Its length is ignored.
        trust: in [0, 1]; how far to follow the guide here.
        reason: why the trust is what it is, in a few words.
    """

    vector: Tensor
    trust: float
    reason: str


class Guide(ABC):
    """Told observations, answers a direction.

    Attributes set by `start`: `coordinates`, `greater_is_better`, `generator` (its only randomness) and `trust`.
    `coverage` is the share of the last round inside the 90 % intervals predicted for it, None without intervals.
    """

    coordinates: Coordinates
    off: str | None = None
    coverage: float | None = None

    def start(self, coordinates: Coordinates, greater_is_better: bool, seed: int) -> None:
        """Begin a metric phase, forgetting any earlier one."""
        self.coordinates, self.greater_is_better = coordinates, greater_is_better
        self.generator = torch.Generator().manual_seed(seed)
        self.trust = Trust()
        self.off = None

    def learn(self, trajectory: Trajectory) -> None:
        """Be judged on the last round of the trajectory, then learn from all of it."""
        trajectory = trajectory.aligned()
        predicted = self.predict_held_out(trajectory)
        if predicted is not None:
            self.trust.update(predicted, trajectory.last_round.scores)
        self.fit(trajectory)

    @property
    def standing(self) -> tuple[float, str]:
        """Trust in [0, 1], 0 when switched off, and its reason."""
        return self.trust.value() if self.off is None else (0.0, self.off)

    def direction(self, phi: Tensor) -> Direction:
        """Where to go from phi: [d]."""
        trust, reason = self.standing
        if trust == 0:
            return Direction(torch.zeros_like(phi), 0.0, reason)
        ascent = self.ascent(phi)
        return Direction(-ascent if self.greater_is_better else ascent, trust * self.certainty(phi), reason)

    def switch_off(self, reason: str) -> None:
        """Follow this guide no more; `reason` is what `direction` answers from now on."""
        self.off = f"{OFF}: {reason}"

    @abstractmethod
    def predict(self, z: np.ndarray) -> np.ndarray | None:
        """Scores expected at z: [n, k] -> [n], in any unit that rises with the metric; None before there is a fit."""

    def predict_held_out(self, trajectory: Trajectory) -> np.ndarray | None:
        """The same for the last round, each point by what was not learned from its fold: trust is judged by that.

        A guide that does not keep the folds apart is judged by all that it knows.
        """
        return self.predict(trajectory.last_round.z)

    @abstractmethod
    def fit(self, trajectory: Trajectory) -> None:
        """Learn from all observations so far."""

    @abstractmethod
    def ascent(self, phi: Tensor) -> Tensor:
        """A direction of phi, [d] -> [d], in which the metric's value rises (whether or not that is better)."""

    def certainty(self, phi: Tensor) -> float:
        """How sure it is of `ascent` at phi: [d] -> [0, 1], by which its trust is multiplied."""
        return 1.0

    def loss_term(self, model: nn.Module, inputs: dict[str, Any], outputs: Any) -> Tensor | None:
        """A differentiable scalar to be added to the training loss of this batch, in the metric phase only, or None."""
        return None

    def state_dict(self) -> dict[str, Any]:
        """Nested dict of tensors and JSON values; with `load_state_dict` after `start`, everything to go on exactly."""
        return {"trust": self.trust.state_dict(), "generator": self.generator.get_state(), "off": self.off}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.trust.load_state_dict(state["trust"])
        self.generator.set_state(state["generator"].to(torch.uint8))
        self.off = state["off"]


class ValueFunctionGuide(Guide):
    """Follows the gradient of a value function fitted online to the observations.

    Of the observation set's folds each member learns from one. So the members of the others can be judged by it, and
    what holds for the examples of one fold alone is neither trusted nor certain (cross-fitting).

    Args:
        value_function: a fitted one to start from, in the same coordinates; it is copied. None: a new one.
        shuffled: the control: fitted to the same observations with their scores shuffled anew at each fit.
    """

    # optimizer steps of a fit: the first from scratch, the others warm
    FIRST_FIT_STEPS, WARM_FIT_STEPS = 150, 20

    def __init__(self, value_function: ValueFunction | None = None, shuffled: bool = False):
        self._given, self.shuffled = value_function, shuffled

    def start(self, coordinates: Coordinates, greater_is_better: bool, seed: int) -> None:
        super().start(coordinates, greater_is_better, seed)
        if self._given is not None and self._given.num_coordinates != coordinates.dim:
            raise ConfigurationError(
                f"The value function given has {self._given.num_coordinates} coordinates, this phi {coordinates.dim}."
            )
        self.fitted, self.groups = self._given is not None, 1
        self.calibration = Calibration()
        self.value_function = copy.deepcopy(self._given) or ValueFunction(coordinates.dim)  # the given one stays
        if not self.fitted:
            self.value_function.reset_parameters(self.generator)

    def predict(self, z: np.ndarray) -> np.ndarray | None:
        return self.value_function.predict(torch.as_tensor(z))[0].numpy() if self.fitted else None

    def predict_held_out(self, trajectory: Trajectory) -> np.ndarray | None:
        z = trajectory.last_round.z
        held_out = ~learners(trajectory.folds, self.value_function.num_members)[:, -len(z) :]
        if not self.fitted or not held_out.any():
            return self.predict(z)
        with torch.no_grad():
            members = self.value_function(torch.as_tensor(z)).numpy()
        return np.average(members, axis=0, weights=held_out)

    @property
    def coverage(self) -> float | None:
        return self.calibration.coverage

    def learn(self, trajectory: Trajectory) -> None:
        if self.fitted:
            self.calibration.update(self.value_function, trajectory.aligned().last_round)
        super().learn(trajectory)

    def fit(self, trajectory: Trajectory) -> None:
        if len(trajectory) < 2:
            return
        scores = trajectory.scores
        if self.shuffled:
            scores = scores[torch.randperm(len(scores), generator=self.generator).numpy()]
        steps = self.WARM_FIT_STEPS if self.fitted else self.FIRST_FIT_STEPS
        # measured: one given predicts best in the standardisation that its weights were learned in
        standardise = self._given is None
        fit(
            self.value_function,
            trajectory.z,
            scores,
            trajectory.variances,
            self.generator,
            steps,
            standardise,
            trajectory.folds,
        )
        self.calibration.apply(self.value_function)
        self.fitted, self.groups = True, num_groups(trajectory.folds, self.value_function.num_members)

    def ascent(self, phi: Tensor) -> Tensor:
        gradient = self.value_function.gradient(self.coordinates.encode(phi).cpu())
        return self.coordinates.lift(gradient.to(phi.device))

    def certainty(self, phi: Tensor) -> float:
        """How far the folds agree on the direction, or, where there is one fold, the members.

        Blending ignores a direction's length, and near an optimum of the metric nothing but noise is left of it.
        """
        z = self.coordinates.encode(phi).cpu()
        return float(self.value_function.agreement(z, self.groups if self.groups > 1 else None))

    def state_dict(self) -> dict[str, Any]:
        return {
            **super().state_dict(),
            "fitted": self.fitted,
            "groups": self.groups,
            "calibration": asdict(self.calibration),
            "value_function": self.value_function.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.fitted, self.groups = state["fitted"], state["groups"]
        self.calibration = Calibration(**state["calibration"])
        self.value_function.load_state_dict(state["value_function"])


class RandomGuide(Guide):
    """The control: a random direction in the same coordinates, drawn anew at each fit and kept until the next.

    It has to persist: one drawn anew at every step would be averaged away by Adam.
    """

    def start(self, coordinates: Coordinates, greater_is_better: bool, seed: int) -> None:
        super().start(coordinates, greater_is_better, seed)
        self.vector: Tensor | None = None

    def predict(self, z: np.ndarray) -> np.ndarray | None:
        return None if self.vector is None else z @ self.vector.numpy()

    def fit(self, trajectory: Trajectory) -> None:
        vector = torch.randn(self.coordinates.dim, generator=self.generator)
        self.vector = vector / vector.norm()

    def ascent(self, phi: Tensor) -> Tensor:
        return self.coordinates.lift(self.vector.to(phi.device))

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "vector": self.vector}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.vector = state["vector"]


GUIDES = ("value_function", "shuffled", "random")


def from_spec(spec: str, value_function: ValueFunction | None = None) -> Guide:
    """The guide that a config string names: "value_function", or one of the controls "shuffled" and "random"."""
    if spec == "random":
        return RandomGuide()
    if spec in ("value_function", "shuffled"):
        return ValueFunctionGuide(value_function, shuffled=spec == "shuffled")
    raise ConfigurationError(f"guide={spec!r} is none of {', '.join(GUIDES)}.")
