"""Trust: how far each guide is followed, by the success of its steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ..guides import Guide, GuideContext
from ..linear.local_metric import BudgetSpent, LocalMetric

GROWTH, MOST_RATE, SMALLEST_RATE = 1.5, 4.0, 1 / 64  # a guide's rate is relative to its first


class Trust:
    """The guides of a run, each with a rate, which grows behind a step that paid, and is halved behind any other.

    Args:
        make_guides: whether predictions are linearised -> the guides, by name.

    Attributes:
        guides: guides by name.
        rates: rates by name, relative to the learning rate.
    """

    def __init__(self, make_guides: Callable[[bool], dict[str, Guide]]):
        self._make_guides = make_guides
        self.guides: dict[str, Guide] = {}
        self.rates: dict[str, float] = {}

    @property
    def followed(self) -> list[str]:
        """Names of the guides that are still followed."""
        return [name for name in self.guides if self.rates[name] >= SMALLEST_RATE]

    def start(self, linearised: bool, context: GuideContext, metric: LocalMetric | None) -> None:
        """Make the guides, and keep those that apply to the metric.

        Args:
            metric: None: all guides are kept.
        """
        self.guides = self._make_guides(linearised)
        for name, guide in list(self.guides.items()):
            guide.start(context)
            if metric is not None and not applies(guide, metric):
                del self.guides[name]
        self.rates = dict.fromkeys(self.guides, 1.0)

    def judge(self, values: Mapping[str, float], before: float) -> None:
        """Adapt the rates, given the metric behind the step of each guide, and before."""
        for name, value in values.items():
            rate = self.rates[name]
            self.rates[name] = min(MOST_RATE, rate * GROWTH) if value > before else rate / 2

    def state_dict(self) -> dict[str, Any]:
        return {"rates": dict(self.rates), "guides": {name: guide.state_dict() for name, guide in self.guides.items()}}

    def load_state_dict(self, state: dict[str, Any], linearised: bool, context: GuideContext) -> None:
        """Make the guides of the saved run."""
        made = self._make_guides(linearised)
        self.guides, self.rates = {name: made[name] for name in state["guides"]}, dict(state["rates"])
        for name, guide in self.guides.items():
            guide.start(context)
            guide.load_state_dict(state["guides"][name])


def applies(guide: Guide, metric: LocalMetric) -> bool:
    """Whether the guide has something to say of the metric, and calls to find out."""
    try:
        return guide.applies(metric)
    except BudgetSpent:
        return False
