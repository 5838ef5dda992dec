"""BehaviourGuide: a value function over what the model predicts, which another model can go on with.

    z -> summary of predictions (Tangent, from the round's own points) -> metric (value network)

The gradient of the metric in phi is that of the second by way of the first. Only the first belongs to the model.
"""

from __future__ import annotations

import copy
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..evaluation.observation import Observation
from ..evaluation.trajectory import Trajectory
from ..value import OVER_BEHAVIOUR, Behaviour, ValueNetwork, check_over, fit
from ..value.behaviour import CLASSES, IDENTITIES, NUMBERS
from .base import AscendingGuide, GuideContext, Round
from .calibration import Calibration
from .outputs import ReadingGuide, Rows, Unreadable
from .tangent import Tangent

# optimizer steps of a fit: the first from scratch, the others warm. With 10 one that was given for another task is not
# put right in time; to fit on to that task's summaries too holds it back as well (both on development seeds).
FIRST_FIT_STEPS, WARM_FIT_STEPS = 50, 30
MOST_SUMMARIES = 1024  # that are kept and fitted to, the latest
MOST_NUMBERS = 2**10  # of a summary: the closed form of the fit takes their cube


class BehaviourGuide(ReadingGuide, AscendingGuide):
    """Follows the gradient of a value function over a summary of predictions (`Behaviour`).

    The summaries of the predictions on which the phase calls the metric anyway, and the scores there, are what it is
    fitted to; it takes no pass and no call of its own. As nothing in it belongs to the model, a value function that
    was learned on another one is a start: with the same kind of labels, and as many classes. What the metric knows
    beside outputs and labels, such as groups, it does not see, and metrics that hang on few rows, such as recall at a
    precision, hang on none of the summary's numbers.

    Needs outputs and labels that are rows; elsewhere it switches itself off.

    Args:
        value_function: one over behaviour to start from, which is copied. None: a new one.

    Raises:
        ValueFunctionError: it is one over phi.
    """

    kinds = (CLASSES, NUMBERS, IDENTITIES)
    over = OVER_BEHAVIOUR

    def __init__(self, value_function: ValueNetwork | None = None):
        check_over(value_function, self.over)
        super().__init__()
        self._given = value_function

    def start(self, context: GuideContext) -> None:
        super().start(context)
        self.calibration = Calibration()
        self.seen = Trajectory()  # summaries and scores
        self._read_as: Behaviour | None = None  # once there were predictions
        self._network: ValueNetwork | None = None
        self._tangent: Tangent | None = None
        self._fitted = False
        self._there: tuple[ValueNetwork, Tangent] | None = None  # copies where phi is, until the next round

    @property
    def network(self) -> ValueNetwork | None:
        return self._network if self._fitted else None

    @property
    def behaviour(self) -> tuple[Behaviour, Trajectory] | None:
        return (self._read_as, self.seen) if self._fitted else None

    @property
    def coverage(self) -> float | None:
        return self.calibration.coverage

    def predict_rows(self, rows: list[Rows]) -> np.ndarray | None:
        if not self._begun(rows[0]) or not self._fitted:
            return None
        return self._network.predict(self._summaries(rows))[0].numpy()

    def learn_rows(self, rows: list[Rows], scores: np.ndarray, observed: Round) -> None:
        if not self._begun(rows[0]):
            return
        summaries = self._summaries(rows)
        z = observed.trajectory.z[-len(rows) :] if observed.z is None else observed.z
        step = int(observed.everything.steps[-1])
        pairs = zip(summaries.numpy(), scores, strict=True)
        new = Trajectory([Observation(s, float(score), float("nan"), step, 0.0) for s, score in pairs])
        if self._fitted and observed.is_real:
            self.calibration.update(self._network, new)
        self.seen = self.seen.joined(new).latest(MOST_SUMMARIES)
        self._tangent.update(z, summaries)
        self._there = None
        if len(self.seen) > 1:
            steps = WARM_FIT_STEPS if self._fitted else FIRST_FIT_STEPS
            told = self.seen.z, self.seen.scores, self.seen.variances
            # one given predicts best in the standardisation that its weights were learned in
            fit(self._network, *told, self.context.generator, steps, standardise=self._given is None)
            self.calibration.apply(self._network)
            self._fitted = True

    def expect(self, phi: Tensor) -> tuple[float, float] | None:
        if not self._fitted or not self._tangent.weight:
            return None
        mean, std = self._network.predict(self._tangent.at(self.context.coordinates.encode(phi).cpu()))
        return float(mean), float(std)

    def ascent(self, phi: Tensor) -> Tensor:
        return self.ascent_and_agreement(phi)[0]

    def gradient_agreement(self, phi: Tensor) -> float:
        """How far the networks of the ensemble agree on the direction; see `ValueFunctionGuide`."""
        return float(self.ascent_and_agreement(phi)[1])

    def ascent_and_agreement(self, phi: Tensor) -> tuple[Tensor, Tensor]:
        """Both where phi is: asked at every step, it must not wait for a device."""
        coordinates = self.context.coordinates
        network, tangent = self._on(phi.device)
        summary = tangent.at(coordinates.encode(phi))
        gradient, agreement = network.gradient_and_agreement(summary, tangent.slope)
        return coordinates.lift(gradient), agreement.double()

    def _begun(self, rows: Rows) -> bool:
        """Whether there is a network for such rows; made when the first are seen, and off where none can be."""
        behaviour = Behaviour.of(rows.outputs, rows.labels, rows.kind)
        if self._network is None:
            try:
                self._begin(behaviour)
            except Unreadable as error:
                self._give_up(str(error))
        return self._network is not None and behaviour == self._read_as

    def _begin(self, behaviour: Behaviour) -> None:
        given, generator = self._given, self.context.generator
        signature = getattr(given, "signature", None)
        if behaviour.size > MOST_NUMBERS:
            raise Unreadable(f"of {behaviour} a summary is longer than {MOST_NUMBERS} numbers")
        if signature is not None and signature.behaviour != behaviour:
            raise Unreadable(f"the value function given is of {signature.behaviour}, these predictions are {behaviour}")
        if given is not None and given.num_coordinates != behaviour.size:
            raise Unreadable(
                f"the value function given reads {given.num_coordinates} numbers, and a summary of {behaviour} has "
                f"{behaviour.size}"
            )
        self._read_as = behaviour
        self._tangent = Tangent(self.context.coordinates.dim, behaviour.size)
        self._network, self._fitted = ValueNetwork.begun(behaviour.size, given, generator), given is not None

    def _summaries(self, rows: list[Rows]) -> Tensor:
        """[n, k]."""
        with torch.no_grad():
            return torch.stack([self._read_as.summary(some.outputs, some.labels) for some in rows])

    def _on(self, device: torch.device) -> tuple[ValueNetwork, Tangent]:
        """What was fitted, on the CPU, where the model is."""
        if self._network.z_mean.device == device:
            return self._network, self._tangent
        if self._there is None or self._there[0].z_mean.device != device:
            tangent = copy.copy(self._tangent)
            tangent.z, tangent.s, tangent.slope = (x.to(device) for x in (tangent.z, tangent.s, tangent.slope))
            self._there = copy.deepcopy(self._network).to(device), tangent
        return self._there

    def state_dict(self) -> dict[str, Any]:
        begun = self._network is not None
        return {
            **super().state_dict(),
            "behaviour": asdict(self._read_as) if begun else None,
            "fitted": self._fitted,
            "sizes": [self._network.hidden_size, self._network.num_members] if begun else None,
            "network": self._network.state_dict() if begun else None,
            "tangent": self._tangent.state_dict() if begun else None,
            "seen": {name: torch.as_tensor(array) for name, array in self.seen.state_dict().items()},
            "calibration": asdict(self.calibration),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.seen = Trajectory.from_state_dict({name: tensor.numpy() for name, tensor in state["seen"].items()})
        self.calibration = Calibration(**state["calibration"])
        self._fitted, self._there = state["fitted"], None
        self._read_as = self._network = self._tangent = None
        if state["behaviour"] is not None:
            self._read_as = Behaviour(**state["behaviour"])
            self._network = ValueNetwork(self._read_as.size, *state["sizes"])
            self._network.load_state_dict(state["network"])
            self._tangent = Tangent(self.context.coordinates.dim, self._read_as.size)
            self._tangent.load_state_dict(state["tangent"])
