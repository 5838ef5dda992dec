"""What did not pay in our own measurements, and may for you: it works and is tested, and no promise is made for it.

Guides here are passed as objects, `MetricOptTrainer(..., guide=BridgeGuide())`; `docs/experiments.md` has what was
measured. `Bridge` is a module for use inside of a model.
"""

from __future__ import annotations

from collections.abc import Callable

from ..guides import Guide
from .bridge import Bridge
from .bridge_guide import BridgeGuide
from .loss_alignment import LossAlignmentGuide

__all__ = ["EXPERIMENTAL", "Bridge", "BridgeGuide", "LossAlignmentGuide"]

EXPERIMENTAL: dict[str, Callable[[], Guide]] = {"bridge": BridgeGuide, "loss_alignment": LossAlignmentGuide}
