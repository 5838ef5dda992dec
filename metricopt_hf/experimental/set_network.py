"""A small network from a set of outputs and labels to the metric of that set.

A mean over rows inside and a function of the mean outside can stand for any function of a set in which a row that is
there twice counts twice (Deep Sets; Zaheer et al., 2017).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..guides.row_moves import two_sided
from ..linear.linearization import Linearization
from .labels import classes_of, labels_of, num_classes

HIDDEN = 32


def features(linear: Linearization, outputs: Tensor) -> Tensor:
    """[rows, features] of outputs and the labels of their rows, smooth in the outputs."""
    labels = classes_of(linear)
    if labels is not None:
        logits, own = two_sided(outputs), F.one_hot(labels, num_classes(linear.decisions)).bool()
        margin = logits[own] - logits.masked_fill(own, -torch.inf).logsumexp(1)
        return torch.cat([logits.softmax(1), own.float(), torch.tanh(torch.stack([2 * margin, margin / 2], 1))], 1)
    numbers = []
    for values, like in ((outputs, linear.decisions.outputs), (labels_of(linear), labels_of(linear))):
        like = like.reshape(len(like), -1).float()
        numbers.append((values.reshape(like.shape) - like.mean(0)) / like.std(0, correction=0).clamp_min(1e-6))
    return torch.cat([*numbers, *map(torch.tanh, numbers)], 1)


def set_network(width: int, generator: torch.Generator) -> nn.ModuleDict:
    """A network from sets of rows, [rows, width], to a number, with weights drawn from `generator`."""
    sizes = ((width, HIDDEN), (HIDDEN, HIDDEN), (HIDDEN, HIDDEN), (HIDDEN, 1))
    layers = [torch.nn.utils.skip_init(nn.Linear, *size) for size in sizes]
    with torch.no_grad():
        for layer in layers:
            layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator) / layer.in_features**0.5)
            layer.bias.zero_()
    first, second, third, last = layers
    rows, whole = nn.Sequential(first, nn.SiLU(), second, nn.Tanh()), nn.Sequential(third, nn.SiLU(), last)
    return nn.ModuleDict({"rows": rows, "whole": whole})


def expected(network: nn.ModuleDict, read: Tensor) -> Tensor:
    """The standardised metric of sets: [..., rows, features] -> [...]."""
    return network["whole"](network["rows"](read).mean(-2)).squeeze(-1)
