"""Methods that did not pay in our own measurements. They work and are tested; their interface may change.

Pass guides as objects, `MetricOptTrainer(..., guide=BridgeGuide())`. `Bridge` is a module for use inside of a model.
`constrained` adds bounds on its other numbers to a metric. `docs/experiments.md` has the measurements.
"""

from __future__ import annotations

from collections.abc import Callable

from ..guides import Guide
from .bridge import Bridge
from .bridge_guide import BridgeGuide
from .constraints import check, constrained
from .loss_alignment import LossAlignmentGuide

__all__ = ["EXPERIMENTAL", "Bridge", "BridgeGuide", "LossAlignmentGuide", "check", "constrained"]

EXPERIMENTAL: dict[str, Callable[[], Guide]] = {"bridge": BridgeGuide, "loss_alignment": LossAlignmentGuide}
