"""A metric that is linear in the coordinates, told to guides round by round; and guides of a user's own."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from helpers import guide_context
from torch import nn
from transformers import EvalPrediction

from metricopt_hf import DirectionGuide, Guide, Observation, Round, Trajectory
from metricopt_hf.guides.trust import Trust
from metricopt_hf.phi import Coordinates, random_basis

D, K = 12, 4
SLOPE = np.array([1.0, -2.0, 0.5, 1.5], np.float32)


ROWS, CLASSES = 60, 3


def predictions_of(z, seed):
    """One for each of z: [n, K], of the same examples: logits whose margin for the true class the metric is."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, CLASSES, ROWS)
    noise = 0.3 * rng.normal(size=(ROWS, CLASSES))
    margins = 0.3 * (z @ SLOPE)[:, None, None] * np.eye(CLASSES)[labels]
    return [EvalPrediction(logits.astype(np.float32), labels) for logits in noise + margins]


def batch(seed=0, size=16):
    """What a guide's `loss` is given: inputs, outputs and the task's loss."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (size,), generator=generator)
    logits = torch.randn(size, CLASSES, generator=generator, requires_grad=True)
    return {"labels": labels}, {"loss": torch.zeros(()), "logits": logits}, F.cross_entropy(logits, labels)


class Truth(DirectionGuide):
    """Knows the slope."""

    def predict(self, z):
        return z @ SLOPE

    def fit(self, trajectory):
        pass

    def ascent(self, phi):
        return self.context.coordinates.lift(torch.as_tensor(SLOPE))


class Wrong(Truth):
    def predict(self, z):
        return -(z @ SLOPE)


class LearnedLoss(Guide):
    """Speaks through the loss, and learns with an optimizer that has moments to remember."""

    def start(self, context):
        super().start(context)
        self.weight = nn.Parameter(torch.randn(K, generator=context.generator))
        self.optimizer = torch.optim.Adam([self.weight], lr=0.05)

    def predict(self, z):
        return z @ self.weight.detach().numpy()

    def learn(self, observed):
        trajectory = observed.trajectory
        for _ in range(5):
            self.optimizer.zero_grad()
            error = torch.as_tensor(trajectory.z) @ self.weight - torch.as_tensor(trajectory.scores)
            error.square().mean().backward()
            self.optimizer.step()

    def loss(self, inputs, outputs, task_loss):
        return task_loss * self.weight.detach().norm()

    def state_dict(self):
        return {
            **super().state_dict(),
            "weight": self.weight.detach(),
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state_dict(self, state):
        super().load_state_dict(state)
        self.weight.data.copy_(state["weight"])
        self.optimizer.load_state_dict(state["optimizer"])


def coordinates():
    return Coordinates(torch.ones(D), random_basis(D, K, torch.Generator().manual_seed(0)))


def started(guide, greater_is_better=True, seed=0):
    guide.start(guide_context(coordinates(), greater_is_better, seed))
    return guide


def taught(guide, rounds=4, first=0, trajectory=None, size=8, noise=0.1):
    """Tell rounds of a metric that is linear in z; returns the trajectory."""
    trajectory = Trajectory() if trajectory is None else trajectory
    for step in range(first, first + rounds):
        rng = np.random.default_rng(step)
        z = rng.normal(size=(size, K)).astype(np.float32)
        scores = z @ SLOPE + noise * rng.normal(size=size)
        trajectory.extend([Observation(p, float(s), noise**2, step, 0.1) for p, s in zip(z, scores, strict=True)])
        predictions = predictions_of(z, step) if guide.wants_predictions else None
        guide.observe(Round(trajectory, predictions=predictions, scores=scores))
    return trajectory


def trusted(guide):
    guide.trust = Trust(evidence=100.0, correlation_sum=90.0)
    return guide
