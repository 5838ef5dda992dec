"""Behaviour: a summary of fixed size of what a model predicts, in place of where its parameters are.

Two models of the same task have different parameters and the same kind of predictions. A value function over a summary
of these is one of the metric and not of the model, so that what one model has taught it holds for another. MetricOpt
(CVPR 2021) claims as much of its value functions without saying how; the summaries are this library's design.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CLASSES, NUMBERS, IDENTITIES = "classes", "numbers", "identities"

VERSION = 1  # of the summaries: another one is another input
# Softness of a decision, of the median margin between the two likeliest classes: so it is the same whatever scale a
# model's logits have. Softer decisions (of probabilities as they are) predict worst-class recall on another net less
# well; confusions off the diagonal too, being a hundred numbers of ten classes.
SHARPNESS = 0.1
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
MOST_PAIRED = 512  # rows of which pairs are made
MOST_WIDTH = 2**12  # outputs and labels of a row
TINY = 1e-6


@dataclass(frozen=True)
class Behaviour:
    """Which summary a value function reads. Its numbers are comparable between models of equal behaviour.

    Attributes:
        labels: "classes": of each class its soft recall, its soft precision, and the mean probability of its own rows.
            "numbers": quantiles of each output, in standard deviations of the labels; its correlation with each label,
            and quantiles of what it is off by, where there are as many of both.
            "identities": quantiles of similarities of pairs that belong together and of pairs that do not, and of each
            row's margin between its closest of both kinds.
        num_outputs: of a row; of embeddings any, and 0 here.
        num_labels: of a row, where they are numbers; else 0.

    Example:
        >>> import torch
        >>> behaviour = Behaviour.of(torch.eye(3), torch.arange(3), "classes")
        >>> behaviour.size, [round(x, 2) for x in behaviour.summary(torch.eye(3), torch.arange(3)).tolist()[:3]]
        (9, [1.0, 1.0, 1.0])
    """

    labels: str
    num_outputs: int
    num_labels: int

    @classmethod
    def of(cls, outputs: Tensor, labels: Tensor, kind: str) -> Behaviour:
        """Of rows: outputs [n, c]; labels [n] of classes or identities, [n, m] of numbers."""
        return cls(kind, 0 if kind == IDENTITIES else outputs.shape[1], labels.shape[1] if kind == NUMBERS else 0)

    @property
    def size(self) -> int:
        """k, of the summary."""
        if self.labels == CLASSES:
            return 3 * self.num_outputs
        if self.labels == NUMBERS:
            same = self.num_outputs == self.num_labels
            return self.num_outputs * (len(QUANTILES) * (1 + same) + self.num_labels)
        return 3 * len(QUANTILES)

    @property
    def description(self) -> dict[str, Any]:
        """As JSON."""
        return {"version": VERSION, **asdict(self)}

    def __str__(self) -> str:
        if self.labels == CLASSES:
            return f"{self.num_outputs} classes"
        if self.labels == NUMBERS:
            return f"{self.num_outputs} outputs for {self.num_labels} numbers"
        return "embeddings"

    def summary(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """[k], differentiable in the outputs [n, c]; the order of rows does not matter. Labels: see `of`."""
        make = {CLASSES: _of_classes, NUMBERS: _of_numbers, IDENTITIES: _of_identities}[self.labels]
        return make(outputs, labels)


def _of_classes(outputs: Tensor, labels: Tensor) -> Tensor:
    own = F.one_hot(labels, outputs.shape[1]).to(outputs.dtype)
    count = own.sum(0).clamp_min(1)
    margin = outputs.topk(min(2, outputs.shape[1]), -1).values
    softness = SHARPNESS * (margin[:, 0] - margin[:, -1]).median().clamp_min(TINY)
    decided, probable = (outputs / softness).softmax(-1), outputs.softmax(-1)
    hits = (own * decided).sum(0)
    # a class that is hardly ever decided for has a precision of about 0
    return torch.cat([hits / count, hits / decided.sum(0).clamp_min(1), (own * probable).sum(0) / count])


def _of_numbers(outputs: Tensor, labels: Tensor) -> Tensor:
    mean, std = labels.mean(0), labels.std(0, correction=0)
    std = torch.where(std > TINY, std, 1.0)
    same = outputs.shape[1] == labels.shape[1]
    scaled = (outputs - mean) / std if same else (outputs - mean.mean()) / std.mean()
    wanted = (labels - mean) / std
    centred = scaled - scaled.mean(0)
    length = centred.square().mean(0).clamp_min(TINY).sqrt()
    parts = [_quantiles(scaled).flatten(), (centred.T @ wanted / len(wanted) / length[:, None]).flatten()]
    if same:
        parts.append(_quantiles(scaled - wanted).flatten())
    return torch.cat(parts)


def _of_identities(outputs: Tensor, labels: Tensor) -> Tensor:
    unit, labels = F.normalize(outputs[:MOST_PAIRED], dim=-1), labels[:MOST_PAIRED]
    similar, same = unit @ unit.T, labels[:, None] == labels[None]
    other = ~torch.eye(len(unit), dtype=torch.bool, device=unit.device)
    together, apart = same & other, ~same
    closest = [similar.masked_fill(~some, -2.0).amax(1) for some in (together, apart)]
    both = together.any(1) & apart.any(1)
    margin = (closest[0] - closest[1])[both]
    return torch.cat([_quantiles(some[:, None]).flatten() for some in (similar[together], similar[apart], margin)])


def _quantiles(values: Tensor) -> Tensor:
    """[n, m] -> [m, quantiles], zeros of no rows. `torch.quantile` takes no more than 2**24 numbers; sorting does."""
    if not len(values):
        return values.new_zeros(values.shape[1], len(QUANTILES))
    place = torch.tensor(QUANTILES, dtype=values.dtype, device=values.device) * (len(values) - 1)
    low = place.floor().long()
    ordered = values.sort(0).values
    part = (place - low)[:, None]
    return (ordered[low] * (1 - part) + ordered[(low + 1).clamp_max(len(values) - 1)] * part).T
