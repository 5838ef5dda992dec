"""How the value function's gradient joins the task gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from ..value.model import rescaled


def correction(task_grad: Tensor, value_grad: Tensor, trust: float | Tensor, weight: float) -> Tensor:
    """What is added to the task gradient: weight * trust * (|g| / |v|) * v.

    Matching norms makes `weight` (the paper's lambda) independent of both units, and immune to loss scaling, gradient
    accumulation and world size. It is zero where either gradient is zero, or the value gradient is not finite.

    Args:
        task_grad: g, [d].
        value_grad: v, [d]; a step against it improves the metric.
        trust: in [0, 1]; a number or a scalar tensor.
        weight: >= 0.

    Returns:
        [d]. Not finite where `task_grad` is not (an fp16 overflow), so that a gradient scaler still skips the step.

    Example:
        >>> import torch
        >>> correction(torch.tensor([3.0, 4.0]), torch.tensor([0.0, 2.0]), trust=0.5, weight=2.0)
        tensor([0., 5.])
    """
    value_grad = rescaled(value_grad)
    norm, factor = value_grad.norm(), weight * trust
    factor = factor.to(norm.dtype) if isinstance(factor, Tensor) else factor
    added = value_grad * (factor * task_grad.norm() / norm)
    # a direction that is no direction is not followed; chosen where the tensors are, without waiting for them
    return torch.where((norm > 0) & norm.isfinite(), added, 0.0)
