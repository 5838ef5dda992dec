"""Guides: which way the metric improves. One contract (`base`), one file each."""

from __future__ import annotations

from collections.abc import Callable

from .base import Guide, GuideContext
from .blend import blended
from .controls import RandomGuide, ShuffledGuide
from .pairs import PairsGuide
from .row_moves import RowMovesGuide
from .value_function import ValueFunctionGuide

__all__ = [
    "AUTO",
    "GUIDES",
    "Guide",
    "GuideContext",
    "PairsGuide",
    "RandomGuide",
    "RowMovesGuide",
    "ShuffledGuide",
    "ValueFunctionGuide",
    "blended",
    "from_spec",
]

AUTO = "auto"  # pairs and row moves, each step judged by the score of the model behind it
# the names that `--guide` takes
GUIDES: dict[str, Callable[[], Guide]] = {
    "pairs": PairsGuide,
    "rows": RowMovesGuide,
    "value_function": ValueFunctionGuide,
    "shuffled": ShuffledGuide,
    "random": RandomGuide,
}


def from_spec(spec: str, linearised: bool) -> dict[str, Guide]:
    """The guides of a config string, by name.

    Args:
        linearised: whether predictions are linearised, so that a metric call costs no pass.
    """
    names = ("rows", "pairs") if linearised else ("value_function",)
    return {name: GUIDES[name]() for name in (names if spec == AUTO else (spec,))}
