"""Bridge: a non-differentiable function inside of a model, with the gradient of a small network that imitates it.

After differentiable approximation bridges (Ramapuram and Webb, arXiv 1905.03658). Forward, the hard function is what
counts; backward, the gradient goes through the approximator, which is trained beside to be near the hard output.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..errors import ConfigurationError


class Bridge(nn.Module):
    """A hard function that gradients pass.

    The approximator's own loss, `gamma` times the squared distance to the hard output, needs no term in the loss of the
    model: its gradient joins in the backward pass of whatever loss is computed from the output. So the module works
    in any model under any Trainer, and the loss that is logged is the task's alone.

    The task's gradient moves the approximator's input and not its parameters, and the distance the parameters and not
    the input. (In the authors' code the distance moves the input too, towards where the approximator is right; measured
    on sorting, that drew the hard output to a constant.) Each example's distance is weighed by the length of the task's
    gradient at its output: so both gradients follow every scale that the loss is given, by gradient accumulation,
    gradient scalers or several ranks, without the module's knowledge. (The paper's weight is the same for all
    examples.)

    Args:
        function: tensors -> a tensor with examples in its first dimension. It may be a module, and is then saved with
            the model; it is called without gradients.
        approximator: the same tensors -> a tensor of the same shape, differentiable.
        gamma: weight of the distance; 10 in the paper.

    Without gradients (`torch.no_grad`), or where no input needs one, it is the hard function alone. Second derivatives
    are not defined.

    Example:
        >>> approximator = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2))
        >>> bridge = Bridge(torch.sign, approximator)
        >>> x = torch.tensor([[0.3, -2.0]], requires_grad=True)
        >>> y = bridge(x)
        >>> y.tolist()
        [[1.0, -1.0]]
        >>> y.sum().backward()
        >>> bool((x.grad != 0).all())
        True
    """

    def __init__(self, function: Callable[..., Tensor], approximator: nn.Module, gamma: float = 10.0):
        super().__init__()
        if not gamma > 0:
            raise ConfigurationError(f"gamma={gamma!r} must be positive: without it the approximator learns nothing.")
        self.function, self.approximator, self.gamma = function, approximator, gamma

    def forward(self, *inputs: Tensor) -> Tensor:
        if not torch.is_grad_enabled() or not any(x.requires_grad for x in inputs):
            with torch.no_grad():
                return self.function(*inputs)
        trained = [p for p in self.approximator.parameters() if p.requires_grad]
        return _Bridged.apply(self, len(inputs), *inputs, *trained)

    def extra_repr(self) -> str:
        return f"gamma={self.gamma}" if isinstance(self.function, nn.Module) else f"{self.function}, gamma={self.gamma}"


class _Bridged(torch.autograd.Function):
    """The approximator's parameters are inputs, so that their gradients arrive as all others do, hooks included."""

    @staticmethod
    def forward(ctx: Any, bridge: Bridge, count: int, *tensors: Tensor) -> Tensor:
        inputs, ctx.trained = tensors[:count], tensors[count:]
        hard = bridge.function(*inputs)
        ctx.inputs = [x.detach().requires_grad_(x.requires_grad) for x in inputs]
        with torch.enable_grad():
            ctx.soft = bridge.approximator(*ctx.inputs)
        if ctx.soft.shape != hard.shape:
            raise ConfigurationError(
                f"The approximator's output has shape {list(ctx.soft.shape)}, the function's {list(hard.shape)}: they "
                "must be the same."
            )
        ctx.hard, ctx.gamma = hard, bridge.gamma
        return hard.to(hard.dtype if hard.is_floating_point() else ctx.soft.dtype, copy=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        weights = ctx.gamma * gradient.float().flatten(1).norm(dim=1)
        pull = 2 * weights.view(-1, *[1] * (gradient.dim() - 1)) * (ctx.soft.detach().float() - ctx.hard.float())
        moved = [x for x in ctx.inputs if x.requires_grad]
        given = ((gradient, moved), (pull, ctx.trained))
        to_moved, to_trained = (
            torch.autograd.grad(ctx.soft, wanted, at.to(ctx.soft.dtype), retain_graph=True, allow_unused=True)
            if wanted
            else ()
            for at, wanted in given
        )
        answers = iter(to_moved)
        return None, None, *(next(answers) if x.requires_grad else None for x in ctx.inputs), *to_trained
