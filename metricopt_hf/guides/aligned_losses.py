"""Losses with a few parameters of their own, which `LossAlignmentGuide` adapts while the model is trained.

Each says which parameters there are, how far the model errs in what each stands for, and what the loss is.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor

from .outputs import Rows

# of a prediction, rows of which pairs are made
MOST_PAIRED = 512


class AlignedLoss(ABC):
    """Parameters of p numbers, each in [-1, 1]."""

    start: Tensor  # [p]

    @abstractmethod
    def errors(self, rows: Rows) -> Tensor:
        """[p] in [0, 1]: how often the model errs in what the parameter stands for."""

    @abstractmethod
    def __call__(self, rows: Rows, parameters: Tensor) -> Tensor:
        """The loss: a mean over rows, differentiable in their outputs. parameters: [p]."""


class ClassLoss(AlignedLoss):
    """-sigma(y^T Phi log f) of classes, as of adaptive loss alignment (Huang et al., 2019).

    Phi: [c, c], symmetric, the identity at the start; its upper triangle are the parameters. A positive entry of two
    classes lets the one pass for the other, a negative one pushes them apart.
    """

    def __init__(self, num_classes: int):
        self.pairs = torch.triu_indices(num_classes, num_classes)  # [2, p]
        self.num_classes = num_classes
        self.start = (self.pairs[0] == self.pairs[1]).float()

    def errors(self, rows: Rows) -> Tensor:
        """Of two classes, how often one is taken for the other; of a class with itself, how often it is missed."""
        count = self.num_classes
        cells = rows.labels * count + rows.outputs.argmax(-1)
        confusion = torch.bincount(cells, minlength=count**2).reshape(count, count).float()
        rates = confusion / confusion.sum(1, keepdim=True).clamp_min(1)
        first, second = self.pairs
        mutual = (rates[first, second] + rates[second, first]) / 2
        return torch.where(first == second, 1 - mutual, mutual)

    def matrix(self, parameters: Tensor) -> Tensor:
        """[c, c] Phi."""
        first, second = self.pairs.to(parameters.device)
        phi = parameters.new_zeros(self.num_classes, self.num_classes)
        phi[first, second] = parameters
        phi[second, first] = parameters
        return phi

    def __call__(self, rows: Rows, parameters: Tensor) -> Tensor:
        aligned = self.matrix(parameters)[rows.labels] * rows.outputs.log_softmax(-1)
        return -torch.sigmoid(aligned.sum(-1)).mean()


class PairLoss(AlignedLoss):
    """A loss of pairs for embeddings: a margin between the similarities of pairs that belong together and others.

    softplus((margin - s) / T) of pairs that do, softplus((s - margin) / T) of those that do not, with s the cosine.
    Parameters are the margin, and the logarithm of T to the base 10, plus one. Both are ours, and so is the loss.
    """

    start = torch.tensor([0.5, 0.0])

    def errors(self, rows: Rows) -> Tensor:
        """How often pairs are on the wrong side of the middle between both kinds, and how often those at all alike."""
        together, apart = self._similarities(Rows(rows.outputs[:MOST_PAIRED], rows.labels[:MOST_PAIRED], rows.kind))
        if not len(together) or not len(apart):
            return torch.zeros(2)
        middle = (together.mean() + apart.mean()) / 2
        return torch.stack([(together < middle).float().mean(), (apart > middle).float().mean()])

    def __call__(self, rows: Rows, parameters: Tensor) -> Tensor:
        margin, temperature = parameters[0], 10 ** (parameters[1] - 1)
        together, apart = self._similarities(rows)
        sides = [F.softplus((margin - together) / temperature), F.softplus((apart - margin) / temperature)]
        return sum((side.mean() for side in sides if len(side)), rows.outputs.sum() * 0)

    def _similarities(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """Cosines of all pairs that belong together, and of all that do not."""
        unit = F.normalize(rows.outputs, dim=-1)
        first, second = torch.triu_indices(len(unit), len(unit), 1, device=unit.device)
        cosines = (unit[first] * unit[second]).sum(-1) if len(unit) < 256 else (unit @ unit.T)[first, second]
        same = rows.labels[first] == rows.labels[second]
        return cosines[same], cosines[~same]
