"""An ascent: some updates of the coordinates along a guide's gradient, near one phi."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..guides import Guide, blended
from ..linear.local_metric import BudgetSpent, LocalMetric


def ascend(
    guide: Guide,
    metric: LocalMetric,
    updates: int,
    rate: float,
    make_optimizer: Callable[[Tensor, float], Optimizer],
    loss_gradient: Tensor | None = None,
    value_weight: float = float("inf"),
) -> Tensor:
    """The point z, [k], to which a guide goes from phi.

    Args:
        updates: the most updates; fewer where the metric calls run out.
        rate: learning rate.
        make_optimizer: (parameter, rate) -> an optimizer over it.
        loss_gradient, value_weight: see `blended`.
    """
    z = torch.zeros(metric.dim, requires_grad=True)
    optimizer = make_optimizer(z, rate)
    for update in range(updates):
        metric.allow(updates - update)
        try:
            guide.fit(metric, z.detach().clone())
        except BudgetSpent:
            break
        z.grad = -blended(guide.gradient(z.detach()), loss_gradient, value_weight)
        optimizer.step()
    z = z.detach()
    return z if bool(z.isfinite().all()) else torch.zeros_like(z)
