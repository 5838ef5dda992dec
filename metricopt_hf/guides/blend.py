"""Blending the gradient of the value function with the gradient of the loss."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def blended(ascent: Tensor, loss_gradient: Tensor | None, value_weight: float) -> Tensor:
    """The direction to step in, of length 1 (0 where nothing points anywhere).

    The value gradient is rescaled to `value_weight` times the length of the loss gradient, so that neither's unit
    matters, and added to the negative of that.

    Args:
        ascent: [k] in which the metric improves.
        loss_gradient: [k]; not needed where `value_weight` is infinite.
        value_weight: lambda; infinity: the loss has no say.

    Example:
        >>> blended(torch.tensor([2.0, 0.0]), torch.tensor([0.0, 5.0]), 1.0)
        tensor([ 0.7071, -0.7071])
    """
    ascent = unit(ascent)
    if math.isinf(value_weight) or loss_gradient is None:
        return ascent
    return unit(value_weight * ascent - unit(loss_gradient))


def unit(vector: Tensor) -> Tensor:
    """The vector with length 1; zeros where it is zero or not finite."""
    norm = torch.linalg.vector_norm(vector.double())
    if not torch.isfinite(norm) or norm == 0:
        return torch.zeros_like(vector)
    return (vector.double() / norm).to(vector.dtype)
