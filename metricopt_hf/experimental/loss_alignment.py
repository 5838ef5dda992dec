"""LossAlignmentGuide: a loss with parameters, which are moved so that descending it improves the metric.

After adaptive loss alignment (ALA; Huang, Zhai, Talbott, Bautista, Sun, Guestrin and Susskind, arXiv 1905.05895), whose
loss of classes it has: -sigma(y^T Phi log f), Phi symmetric, in [-1, 1] and the identity at the start. A positive entry
of two classes lets the one pass for the other, a negative one pushes them apart.

There a policy moves Phi, and is rewarded by the metric after some training. Here a step down the loss costs no
training, as outputs are linearised: so Phi is perturbed both ways, both losses are descended from z, and Phi follows
the slope of the metric there (evolution strategies). All constants are ours.

A patent application, US 2020/0327450, claims the original loop; its status is not known to us. Ask before you ship it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..guides import Guide, GuideContext
from ..guides.blend import unit
from ..guides.pairs import slope_of
from ..guides.row_moves import two_sided
from ..linear.linearization import Linearization
from ..linear.local_metric import LocalMetric
from .labels import classes_of, num_classes

PAIRS = 8  # per update
PERTURBATION, STEP = 0.3, 0.3  # standard deviation on each entry of Phi; length of an update of Phi
MOST_CLASSES = 100  # Phi has half their square


class LossAlignmentGuide(Guide):
    """Descends its own loss, whose parameters it moves from update to update.

    Needs one column of labels that are classes of the outputs.

    Args:
        count: the most antithetic pairs of losses in an update, of two metric calls each.
    """

    def __init__(self, count: int = PAIRS):
        self.count = count

    def start(self, context: GuideContext) -> None:
        super().start(context)
        self.matrix: Tensor | None = None  # [c, c] Phi
        self.linear: Linearization | None = None

    def applies(self, metric: LocalMetric) -> bool:
        """Whether labels are classes of the outputs."""
        linear = metric.linearization
        return classes_of(linear) is not None and num_classes(linear.decisions) <= MOST_CLASSES

    def fit(self, metric: LocalMetric, z: Tensor) -> None:
        metric.halve()
        self.linear = metric.linearization
        if self.matrix is None:
            self.matrix = torch.eye(num_classes(self.linear.decisions))
        count = max(1, int(min(self.count, metric.share // 2)))
        drawn = torch.randn(count, *self.matrix.shape, generator=self.context.generator)
        offsets = PERTURBATION * torch.triu(drawn)
        offsets = offsets + torch.triu(offsets, 1).mT
        length = metric.spread * metric.dim**0.5  # as far as an ordinary perturbation
        losses = torch.cat([self.matrix + offsets, self.matrix - offsets])
        values = metric.values(torch.stack([z + length * unit(descent(metric.part, z, loss)) for loss in losses]))
        slope = slope_of(values, offsets.flatten(1)).reshape(self.matrix.shape)
        self.matrix = (self.matrix + STEP * unit(slope)).clamp(-1, 1)

    def gradient(self, z: Tensor) -> Tensor:
        if self.matrix is None or self.linear is None:
            return torch.zeros(self.context.dim)
        return descent(self.linear, z, self.matrix)

    def state_dict(self) -> dict[str, Any]:
        return {} if self.matrix is None else {"matrix": self.matrix}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.matrix = state.get("matrix")


def aligned_loss(outputs: Tensor, labels: Tensor, matrix: Tensor) -> Tensor:
    """-sigma(y^T Phi log f), the mean over rows.

    Args:
        outputs: [rows] or [rows, c] logits. labels: [rows]. matrix: [c, c] Phi.
    """
    return -torch.sigmoid((matrix[labels] * two_sided(outputs).log_softmax(1)).sum(1)).mean()


def descent(linear: Linearization, z: Tensor, matrix: Tensor) -> Tensor:
    """-d loss / d z at z: [k]."""
    outputs = linear.decisions.at(z).requires_grad_()
    (slope,) = torch.autograd.grad(aligned_loss(outputs, classes_of(linear), matrix), outputs)
    return linear.decisions.pull(-slope)
