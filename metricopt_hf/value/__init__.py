"""The value function: from compact coordinates to the metric."""

from .fit import FitReport, fit
from .model import ValueFunction

__all__ = ["FitReport", "ValueFunction", "fit"]
