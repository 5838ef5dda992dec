"""A local metric to learn from: a small classifier of 60 rows with two classes, linearised at its FiLM."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from metricopt_hf import FiLM, GuideContext, Ledger, Metric
from metricopt_hf.evaluation.evaluator import BatchOutput, Evaluator
from metricopt_hf.evaluation.ledger import Faults
from metricopt_hf.linear.linearizer import Linearizer
from metricopt_hf.linear.local_metric import LocalMetric
from metricopt_hf.value import Trajectory

ROWS, FEATURES, CLASSES, DIM = 60, 4, 2, 6
SPREAD = 0.3


def accuracy(prediction) -> float:
    return float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())


def right_probability(prediction) -> float:
    """Mean probability of the true class: smooth, and no metric of decisions."""
    chances = torch.as_tensor(prediction.predictions).softmax(-1).numpy()
    return float(chances[np.arange(len(chances)), prediction.label_ids].mean())


def error(prediction) -> float:
    return 1 - accuracy(prediction)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Local:
    """What a metric phase has: an evaluator, a linearization, and a fresh `LocalMetric` for each update.

    Args:
        function: the metric.
        kinds: how many different rows there are; the others are their copies, labels included.
    """

    def __init__(self, function=accuracy, greater_is_better=True, budget=None, kinds=ROWS, linearised=True, seed=0):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(FEATURES, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, CLASSES))
        inputs = torch.randn(kinds, FEATURES).repeat(-(-ROWS // kinds), 1)[:ROWS]
        labels = (inputs @ torch.tensor([1.0, -1.0, 0.5, 0.0]) > 0).long()
        with torch.no_grad():
            model[-1].bias -= model(inputs).mean(0)  # about as many decisions of each class

        self.inputs, self.labels = inputs, labels

        def batches():
            return [(inputs[i : i + 20], labels[i : i + 20]) for i in range(0, ROWS, 20)]

        self.ledger, self.trajectory = Ledger(budget), Trajectory()
        self.evaluator = Evaluator(
            FiLM(model),
            lambda batch: BatchOutput(model(batch[0]), batch[1]),
            batches,
            Metric(function, "toy", greater_is_better),
            self.ledger,
            max_bytes=2**20,
        )
        self.generator, self.linearised = seeded(seed), linearised
        self.linearizer = Linearizer(self.evaluator, DIM, None, seeded(seed))
        self.predictions = self.evaluator.predictions()
        self.coordinates = self.linearizer.coordinates(self.predictions)
        self.linearization = self.linearizer.linearize(self.coordinates.basis, self.predictions)
        self.value = self.evaluator.metric.sign * self.evaluator.metric(self.predictions)

    def metric(self) -> LocalMetric:
        linear = self.linearization if self.linearised else None
        sources = self.generator, Faults(), self.trajectory
        return LocalMetric(self.evaluator, self.coordinates, linear, SPREAD, *sources, step=0, value=self.value)

    @property
    def dim(self) -> int:
        return self.coordinates.dim

    def slope(self, count: int = 200) -> torch.Tensor:
        """The metric's on all rows, by so many pairs: [k]."""
        metric = self.metric()
        offsets = torch.randn(count, self.dim, generator=seeded(7)) * SPREAD
        values = metric.values(torch.cat([offsets, -offsets]))
        return torch.as_tensor(values[:count] - values[count:], dtype=torch.float32) @ offsets


def started(guide, local: Local, seed: int = 0):
    guide.start(GuideContext(local.dim, seeded(seed)))
    return guide


def taught(guide, local: Local, updates: int = 4, z=None):
    z = torch.zeros(local.dim) if z is None else z
    for _ in range(updates):
        guide.fit(local.metric(), z)
    return guide


def cosine(first: torch.Tensor, second: torch.Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(first, second, dim=0))
