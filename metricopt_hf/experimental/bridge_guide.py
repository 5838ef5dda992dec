"""BridgeGuide: the metric as the function that is bridged; a network of sets stands in for it, and has a gradient.

After differentiable approximation bridges (Ramapuram and Webb, arXiv 1905.03658; see `Bridge` for functions inside of
a model). There the function is known and cheap; here it is the black box, so the network learns from metric calls.
Architecture and constants are ours.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..guides import Guide, GuideContext
from ..guides.pairs import observed_pairs
from ..linear.linearization import Linearization
from ..linear.local_metric import LocalMetric
from .labels import labels_of
from .set_network import expected, features, set_network

PAIRS = 8  # per update
UPDATES = 4  # latest updates in a fit
FIRST_STEPS, WARM_STEPS = 100, 20  # optimizer steps of the first fit, and of later ones, which start from it
LEARNING_RATE, WEIGHT_DECAY = 3e-3, 1e-2
LEVEL_WEIGHT = 0.1  # weight of an update's mean value, against the differences in it, which give the direction


class BridgeGuide(Guide):
    """Follows the gradient of the metric that a network expects of the outputs and labels.

    It does not see other columns that the metric reads, such as groups.

    Args:
        count: the most antithetic pairs in an update, of two metric calls each.
    """

    def __init__(self, count: int = PAIRS):
        self.count = count

    def start(self, context: GuideContext) -> None:
        super().start(context)
        self.network: nn.ModuleDict | None = None
        self.updates: list[tuple[Tensor, Tensor]] = []  # [calls, rows, features] and their standardised values [calls]
        self.level, self.scale = 0.0, 0.0  # mean and spread of the first values; scale 0: none yet
        self.linear: Linearization | None = None

    def applies(self, metric: LocalMetric) -> bool:
        """Whether outputs are rows with one column of labels."""
        return labels_of(metric.linearization) is not None

    def fit(self, metric: LocalMetric, z: Tensor) -> None:
        self.linear = metric.linearization
        values, offsets = observed_pairs(metric, z, self.count)
        points, values = torch.cat([z + offsets, z - offsets]), torch.as_tensor(values, dtype=torch.float32)
        fine = values.isfinite()
        if fine.sum() < 2:
            return
        read = torch.stack([features(metric.part, metric.part.decisions.at(point)) for point in points[fine]])
        if not self.scale:
            self.level, self.scale = float(values[fine].mean()), max(float(values[fine].std()), 1e-8)
        self.updates = [*self.updates, (read, (values[fine] - self.level) / self.scale)][-UPDATES:]
        steps = FIRST_STEPS if self.network is None else WARM_STEPS
        if self.network is None:
            self.network = set_network(read.shape[-1], self.context.generator)
        self._fit(steps)

    def _fit(self, steps: int) -> None:
        optimizer = torch.optim.AdamW(self.network.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY)
        for _ in range(steps):
            loss: Any = 0.0
            for read, values in self.updates:
                error = expected(self.network, read) - values
                loss = loss + (error - error.mean()).square().mean() + LEVEL_WEIGHT * error.mean().square()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    def gradient(self, z: Tensor) -> Tensor:
        if self.network is None or self.linear is None:
            return torch.zeros(self.context.dim)
        outputs = self.linear.decisions.at(z).requires_grad_()
        (slope,) = torch.autograd.grad(expected(self.network, features(self.linear, outputs)), outputs)
        return self.linear.decisions.pull(slope)

    def state_dict(self) -> dict[str, Any]:
        if self.network is None:
            return {}
        updates = {str(i): {"read": read, "values": values} for i, (read, values) in enumerate(self.updates)}
        return {"network": self.network.state_dict(), "updates": updates, "level": self.level, "scale": self.scale}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state:
            self.updates = [(update["read"], update["values"]) for update in state["updates"].values()]
            self.level, self.scale = state["level"], state["scale"]
            self.network = set_network(self.updates[0][0].shape[-1], torch.Generator())
            self.network.load_state_dict(state["network"])
