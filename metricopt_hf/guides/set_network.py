"""SetNetwork: a small network from a set of outputs and labels to the metric of that set.

A sum over rows inside and a function of the sum outside can stand for any function of a set (Deep Sets; Zaheer et al.,
2017). Here it is the mean, so that a set that holds every row twice is the same set.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .outputs import CLASSES, Rows

HIDDEN_SIZE = 32
# at which margins of the true class a row is told from others: near the decision, and further off
MARGIN_SCALES = (0.5, 2.0)
LEARNING_RATE, WEIGHT_DECAY = 3e-3, 1e-2
# of a step: rounds, and sets of each
ROUNDS_PER_STEP, SETS_PER_ROUND = 2, 8
# of the rounds' mean scores against the differences within rounds, which say where to go
LEVEL_WEIGHT = 0.1


def linear(inputs: int, outputs: int, generator: torch.Generator) -> nn.Linear:
    """A linear layer drawn from `generator`, and from no other randomness."""
    layer = torch.nn.utils.skip_init(nn.Linear, inputs, outputs)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(outputs, inputs, generator=generator) / inputs**0.5)
        layer.bias.zero_()
    return layer


class SetNetwork(nn.Module):
    """Reads n rows of outputs [n, c] and their labels (see `Rows`), in any order and number.

    Args:
        like: rows of the kind that it is to read, by which numbers are standardised.
        generator: of its first weights.
    """

    def __init__(self, like: Rows, generator: torch.Generator):
        super().__init__()
        self.kind, count = like.kind, like.outputs.shape[1]
        if self.kind == CLASSES:
            width = 2 * count + len(MARGIN_SCALES)
        else:
            width = 2 * (count + like.labels.shape[1])
            for name, values in (("outputs", like.outputs), ("labels", like.labels)):
                self.register_buffer(f"{name}_mean", values.mean(0))
                self.register_buffer(f"{name}_std", values.std(0, correction=0).clamp_min(1e-6))
        sizes = ((width, HIDDEN_SIZE), (HIDDEN_SIZE, HIDDEN_SIZE), (HIDDEN_SIZE, HIDDEN_SIZE), (HIDDEN_SIZE, 1))
        first, second, third, last = (linear(*size, generator) for size in sizes)
        self.rows = nn.Sequential(first, nn.SiLU(), second, nn.Tanh())
        self.whole = nn.Sequential(third, nn.SiLU(), last)
        self.register_buffer("score_mean", torch.zeros(()))
        self.register_buffer("score_std", torch.ones(()))

    def features(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """[..., n, c] outputs and [n] or [n, m] labels -> [..., n, width], smooth in the outputs."""
        if self.kind == CLASSES:
            own = F.one_hot(labels, outputs.shape[-1]).bool().expand(outputs.shape)
            rest = outputs.masked_fill(own, -torch.inf).logsumexp(-1, keepdim=True)
            margin = (outputs * own).sum(-1, keepdim=True) - rest
            parts = [outputs.softmax(-1), own.float(), *(torch.tanh(margin / scale) for scale in MARGIN_SCALES)]
        else:
            x = (outputs - self.outputs_mean) / self.outputs_std
            y = ((labels - self.labels_mean) / self.labels_std).expand(*x.shape[:-1], -1)
            parts = [x, torch.tanh(x), y, torch.tanh(y)]
        return torch.cat(parts, -1)

    def forward(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Standardised score of each set: [..., n, c] outputs of the same labels -> [...]."""
        return self.whole(self.rows(self.features(outputs, labels)).mean(-2)).squeeze(-1)

    def predict(self, rows: Rows) -> Tensor:
        """The metric expected of a set, in its own unit: a scalar."""
        return self(rows.outputs, rows.labels) * self.score_std + self.score_mean


def fit(
    network: SetNetwork, rounds: Sequence[tuple[Tensor, Tensor, Tensor]], steps: int, generator: torch.Generator
) -> None:
    """Fit in place, from the present weights.

    Args:
        rounds: sets with the same labels: ([m, n, c] outputs, their labels, [m] scores).
        steps: optimizer steps.
    """
    scores = torch.cat([s for *_, s in rounds])
    within = torch.cat([s - s.mean() for *_, s in rounds])
    network.score_mean.fill_(scores.mean())
    network.score_std.fill_(float(within.square().mean().sqrt()) or float(scores.std(correction=0)) or 1.0)
    optimizer = torch.optim.AdamW(network.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    for _ in range(steps):
        losses = []
        for i in torch.randint(len(rounds), (ROUNDS_PER_STEP,), generator=generator):
            outputs, labels, targets = rounds[i]
            chosen = torch.randperm(len(targets), generator=generator)[:SETS_PER_ROUND]
            error = network(outputs[chosen], labels) - (targets[chosen] - network.score_mean) / network.score_std
            level = error.mean()
            losses.append((error - level).square().mean() + LEVEL_WEIGHT * level.square())
        optimizer.zero_grad()
        torch.stack(losses).mean().backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
