"""The protocol: what was fixed before the final runs. `protocol.json` is written by `benchmarks.tune`, once."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from metricopt_hf import ConfigurationError

from .methods import RIVALS
from .training import Budget

FILE = Path(__file__).with_name("protocol.json")
DEVELOPMENT_SEEDS = tuple(range(100, 110))


@dataclass
class Protocol:
    """Settings of all methods, one for all tasks, and how they were chosen.

    Attributes:
        settings: method -> config.
        budget: of every run.
        chosen: how `settings` were found: tasks, seeds, and what the grids gave.
    """

    settings: dict[str, dict[str, Any]]
    budget: Budget = field(default_factory=Budget)
    chosen: dict[str, Any] = field(default_factory=dict)

    def config(self, method: str) -> dict[str, Any]:
        rival = RIVALS[method]
        own = self.settings.get(rival.settings_of or method, dict(rival.setting))
        return self.with_loss(method, own) if rival.after_loss else own

    def with_loss(self, method: str, config: Mapping[str, Any]) -> dict[str, Any]:
        """A setting of `method`, with those of the steps by the loss which come before its own."""
        settings = [self.config(name) for name in ("loss_only", "loss_small")]
        return {**config, **({"by_loss": settings} if RIVALS[method].after_loss else {})}

    def save(self, path: Path = FILE) -> None:
        path.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")


def load(path: Path = FILE) -> Protocol:
    if not path.exists():
        raise ConfigurationError(f"{path.name} is not there: choose the settings first, with `make bench ARGS=tune`.")
    document = json.loads(path.read_text(encoding="utf-8"))
    return Protocol(document["settings"], Budget(**document["budget"]), document["chosen"])


def first_of_grids() -> Protocol:
    """Untuned settings and a tiny budget, for smoke runs."""
    settings = {name: dict(rival.grid[0]) for name, rival in RIVALS.items() if rival.grid}
    return Protocol(settings, Budget(steps=20, batch_size=16, metric_steps=2))
