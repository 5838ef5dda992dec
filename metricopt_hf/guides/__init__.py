"""Guides: which way the metric improves. `GUIDES` holds those that a config can name."""

from collections.abc import Callable

from ..errors import ConfigurationError
from ..value import ValueNetwork
from .base import Direction, DirectionGuide, Guide, GuideContext, Round
from .behaviour import BehaviourGuide
from .bridge import BridgeGuide
from .constrained import ConstrainedGuide
from .controls import RandomGuide, ShuffledGuide
from .loss_alignment import LossAlignmentGuide
from .value_function import ValueFunctionGuide

# name -> what makes the guide, given a value function to start from or None
GUIDES: dict[str, Callable[[ValueNetwork | None], Guide]] = {
    "value_function": ValueFunctionGuide,
    "behaviour": BehaviourGuide,
    "shuffled": ShuffledGuide,
    "random": lambda value_function: RandomGuide(),
    "bridge": lambda value_function: BridgeGuide(),
    "loss_alignment": lambda value_function: LossAlignmentGuide(),
}

__all__ = [
    "GUIDES",
    "BehaviourGuide",
    "BridgeGuide",
    "ConstrainedGuide",
    "Direction",
    "DirectionGuide",
    "Guide",
    "GuideContext",
    "LossAlignmentGuide",
    "RandomGuide",
    "Round",
    "ShuffledGuide",
    "ValueFunctionGuide",
    "from_spec",
]


def from_spec(spec: str, value_function: ValueNetwork | None = None) -> Guide:
    """The guide that a config string names.

    Raises:
        ConfigurationError: there is none of that name; the message lists those that there are.
    """
    if spec not in GUIDES:
        raise ConfigurationError(f"guide={spec!r} is none of {', '.join(GUIDES)}.")
    return GUIDES[spec](value_function)
