"""phi: the few numbers of a model that are tuned for the metric, and their compact coordinates."""

from torch import nn

from .coordinates import Coordinates
from .film import FiLM
from .space import PhiSpace
from .subset import Subset, adapter

__all__ = ["Coordinates", "FiLM", "PhiSpace", "Subset", "adapter", "from_spec"]


def from_spec(model: nn.Module, spec: str) -> PhiSpace:
    """The space that a config string names.

    "film", "adapter", "auto" (a PEFT model's adapter, of any other model film), or a regular expression over parameter
    names.
    """
    if spec == "auto":
        spec = "adapter" if hasattr(model, "peft_config") else "film"
    if spec == "film":
        return FiLM(model)
    if spec == "adapter":
        return adapter(model)
    return Subset(model, spec)
