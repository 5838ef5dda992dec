"""The value function: from coordinates of phi, or a summary of behaviour, to the metric. `hub/` shares it."""

from .behaviour import Behaviour
from .fit import FitReport, fit
from .model import ValueNetwork
from .signature import OVER_BEHAVIOUR, OVER_PHI, BehaviourSignature, Signature, check_over

__all__ = [
    "OVER_BEHAVIOUR",
    "OVER_PHI",
    "Behaviour",
    "BehaviourSignature",
    "FitReport",
    "Signature",
    "ValueNetwork",
    "check_over",
    "fit",
]
