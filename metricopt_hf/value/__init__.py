"""The value function: from compact coordinates to the metric."""

from .domain import Domain
from .fit import FitReport, fit, learners, num_groups
from .model import ValueFunction

__all__ = ["Domain", "FitReport", "ValueFunction", "fit", "learners", "num_groups"]
