"""The value function: from compact coordinates of phi to the metric. `hub/` shares it."""

from .fit import FitReport, fit
from .model import ValueNetwork
from .signature import Signature

__all__ = ["FitReport", "Signature", "ValueNetwork", "fit"]
