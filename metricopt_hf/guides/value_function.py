"""The guide of MetricOpt: the gradient of a value function that is fitted online to the observations."""

from __future__ import annotations

import copy
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigurationError
from ..evaluation.trajectory import Trajectory
from ..value import ValueNetwork, check_over, fit
from .base import DirectionGuide, GuideContext, Round
from .calibration import Calibration


class ValueFunctionGuide(DirectionGuide):
    """Follows the gradient of a value function fitted online to the observations.

    Args:
        value_function: a fitted one to start from, in the same coordinates; it is copied. None: a new one.

    Raises:
        ValueFunctionError: it is one over behaviour.
    """

    # optimizer steps of a fit: the first from scratch, the others warm
    FIRST_FIT_STEPS, WARM_FIT_STEPS = 50, 10

    def __init__(self, value_function: ValueNetwork | None = None):
        check_over(value_function, self.over)
        self._given = value_function

    def start(self, context: GuideContext) -> None:
        super().start(context)
        given, dim = self._given, context.coordinates.dim
        if given is not None and given.num_coordinates != dim:
            raise ConfigurationError(
                f"The value function given has {given.num_coordinates} coordinates, this phi {dim}: set phi_dim to "
                f"{given.num_coordinates}, or start without it."
            )
        self.fitted = given is not None
        self.calibration = Calibration()
        self._there: ValueNetwork | None = None  # a copy where phi is, until the next fit
        self._network = ValueNetwork.begun(dim, given, context.generator)

    @property
    def network(self) -> ValueNetwork | None:
        return self._network if self.fitted else None

    def predict(self, z: np.ndarray) -> np.ndarray | None:
        return self._network.predict(torch.as_tensor(z))[0].numpy() if self.fitted else None

    @property
    def coverage(self) -> float | None:
        return self.calibration.coverage

    def observe(self, observed: Round) -> None:
        if self.fitted and observed.is_real:
            self.calibration.update(self._network, observed.trajectory.last_round)
        super().observe(observed)

    def scores(self, trajectory: Trajectory) -> np.ndarray:
        """[n] what the value function is fitted to."""
        return trajectory.scores

    def fit(self, trajectory: Trajectory) -> None:
        if len(trajectory) < 2:
            return
        fit(
            self._network,
            trajectory.z,
            self.scores(trajectory),
            trajectory.variances,
            self.context.generator,
            self.WARM_FIT_STEPS if self.fitted else self.FIRST_FIT_STEPS,
            # measured: one given predicts best in the standardisation that its weights were learned in
            standardise=self._given is None,
        )
        self.calibration.apply(self._network)
        self._there = None
        self.fitted = True

    def ascent(self, phi: Tensor) -> Tensor:
        return self.ascent_and_agreement(phi)[0]

    def gradient_agreement(self, phi: Tensor) -> float:
        """How far the networks of the ensemble agree on the direction.

        Blending ignores a direction's length, and near an optimum of the metric nothing but noise is left of it.
        """
        return float(self.ascent_and_agreement(phi)[1])

    def ascent_and_agreement(self, phi: Tensor) -> tuple[Tensor, Tensor]:
        """Both where phi is: asked at every step, it must not wait for a device."""
        coordinates = self.context.coordinates
        gradient, agreement = self._network_on(phi.device).gradient_and_agreement(coordinates.encode(phi))
        return coordinates.lift(gradient), agreement.double()

    def _network_on(self, device: torch.device) -> ValueNetwork:
        """What was fitted, on the CPU, where the model is."""
        if self._network.z_mean.device == device:
            return self._network
        if self._there is None or self._there.z_mean.device != device:
            self._there = copy.deepcopy(self._network).to(device)
        return self._there

    def state_dict(self) -> dict[str, Any]:
        return {
            **super().state_dict(),
            "fitted": self.fitted,
            "calibration": asdict(self.calibration),
            "network": self._network.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.fitted = state["fitted"]
        self.calibration = Calibration(**state["calibration"])
        self._network.load_state_dict(state["network"])
        self._there = None
