"""The value function: from compact coordinates of phi to the metric. `hub/` shares it."""

from .fit import fit
from .model import ValueNetwork
from .signature import Signature
from .trajectory import Trajectory

__all__ = ["Signature", "Trajectory", "ValueNetwork", "fit"]
