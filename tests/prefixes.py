"""Models with a frozen prefix, and what is compared of them with and without it."""

from contextlib import contextmanager

import torch
from torch import nn

from metricopt_hf.evaluation.prefix_cache import PrefixCache
from metricopt_hf.phi import FiLM


class PlainCNN(nn.Sequential):
    def __init__(self):
        super().__init__(
            nn.Conv2d(3, 4, 3),
            nn.BatchNorm2d(4),
            nn.ReLU(inplace=True),
            nn.Conv2d(4, 4, 3),
            nn.ReLU(inplace=True),
            nn.BatchNorm2d(4),
            nn.ReLU(inplace=True),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(4, 3),
        )


class Residual(nn.Module):
    """A skip over the border between what is frozen and phi, and a module that runs on both sides of it."""

    def __init__(self):
        super().__init__()
        self.stem, self.act, self.norm, self.head = nn.Linear(6, 6), nn.ReLU(), nn.LayerNorm(6), nn.Linear(6, 3)

    def forward(self, x):
        x = self.act(self.stem(x))
        x = self.act(self.stem(x))
        x += self.act(self.norm(x))  # in place: what was kept must not change with it
        return self.head(x)


def moved_by(phi, size=0.1):
    @contextmanager
    def moved():
        with phi.restored():
            phi.write(phi.read() + size * torch.randn(phi.dim, generator=torch.Generator().manual_seed(1)))
            yield

    return moved


class Setting:
    """A model, phi on it, a few batches and the cache."""

    def __init__(self, model, batches, attach=FiLM, predict=lambda model, batch: model(batch), max_bytes=float("inf")):
        self.model, self.batches, self.phi, self.predict = model.eval(), batches, attach(model), predict
        self.cache = PrefixCache(model, self.phi.names, max_bytes, moved_by(self.phi), batches.__getitem__)
        self.held = list(batches)  # what the cache may take inputs out of

    def run(self, batch):
        return self.predict(self.model, batch)

    @torch.no_grad()
    def cached(self):
        return [self.cache.forward(i, self.run, self.held) for i in range(len(self.batches))]

    @torch.no_grad()
    def full(self):
        return [self.run(batch) for batch in self.batches]

    def move(self):
        self.phi.write(self.phi.read() + 0.5 * torch.randn(self.phi.dim))

    def assert_equal_at_several_phi(self):
        for _ in range(4):
            self.move()
            for got, expected in zip(self.cached(), self.full(), strict=True):
                assert torch.allclose(got, expected, rtol=1e-5, atol=1e-6)
