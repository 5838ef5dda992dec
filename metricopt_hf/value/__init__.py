"""The value function: from compact coordinates to the metric. Sharing one is the business of `hub/`."""

from .fit import FitReport, fit
from .model import ValueNetwork
from .signature import Signature

__all__ = ["FitReport", "Signature", "ValueNetwork", "fit"]
