"""Taps: derivatives of every row's outputs by a layer's parameters, from one backward pass for all rows.

The outputs of a row depend on a layer's weights through the layer's output for that row alone. So each row gets its
own perturbation of the layer's output, a leaf of zeros, and the gradient of the sum over rows of one output holds, row
by row, that output's derivatives.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..errors import PhiError


class NotRowByRow(PhiError):
    """A layer's output has no row for each row of the batch, or is not computed exactly once in a forward pass."""


class Tap(ABC):
    """Derivatives by the parameters of one module.

    Args:
        module: hooked while a `tapped` context is open.
    """

    def __init__(self, module: nn.Module):
        self.module = module
        self.leaves: list[Tensor] = []  # made by the forward pass since `clear`
        self.in_backward = False  # activation checkpointing calls the module again in a backward pass

    def clear(self) -> None:
        self.leaves = []

    def hook(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        """Forward hook: the output, differentiable by this tap's leaves.

        Raises:
            NotRowByRow: the module was called before in this forward pass.
        """
        if not self.in_backward:
            if self.leaves:
                raise NotRowByRow(f"{type(module).__name__} is called more than once in a forward pass.")
            if not isinstance(output, Tensor) or not output.dim():
                raise NotRowByRow(f"{type(module).__name__} returns no tensor with rows.")
            self.begin(args, output)
        return self.perturbed(output)

    @abstractmethod
    def begin(self, args: tuple, output: Tensor) -> None:
        """Make `leaves` of zeros for a forward pass in which the module returns `output`."""

    @abstractmethod
    def perturbed(self, output: Tensor) -> Tensor:
        """`output` plus a term that is zero at the leaves."""

    @abstractmethod
    def derivatives(self, gradients: Sequence[Tensor | None]) -> Tensor:
        """Gradients of the leaves -> [rows, numbers of this part of phi] float32."""


class Channels(Tap):
    """Scale, shift or both per channel of a module that computes y = (1 + scale) * n(x) + shift.

    Args:
        module: whose output is y.
        dim: the channels' dimension in y.
        scale, shift: [channels] the present ones; None: it is not tuned.
    """

    def __init__(self, module: nn.Module, dim: int, scale: Tensor | None, shift: Tensor | None):
        super().__init__(module)
        self.dim, self.scale, self.shift = dim, scale, shift

    def begin(self, args: tuple, output: Tensor) -> None:
        shape = [output.shape[0]] + [1] * (output.dim() - 1)
        shape[self.dim] = output.shape[self.dim]
        tuned = [part for part in (self.scale, self.shift) if part is not None]
        self.leaves = [torch.zeros(shape, device=output.device, requires_grad=True) for _ in tuned]

    def perturbed(self, output: Tensor) -> Tensor:
        across = [1] * output.dim()
        across[self.dim] = -1
        moved = 0.0
        if self.scale is not None:
            plain = output.detach().float()
            if self.shift is not None:
                plain = plain - self.shift.reshape(across)
            moved = plain / (1 + self.scale).reshape(across) * self.leaves[0]
        if self.shift is not None:
            moved = moved + self.leaves[-1]
        return output + moved.to(output.dtype)

    def derivatives(self, gradients: Sequence[Tensor | None]) -> Tensor:
        parts = [torch.zeros_like(leaf) if g is None else g for g, leaf in zip(gradients, self.leaves, strict=True)]
        return torch.cat([part.reshape(len(part), -1).float() for part in parts], 1)


class Linear(Tap):
    """Weight and bias of a linear layer: the outer product of its input and the gradient of its output.

    Args:
        module: an `nn.Linear` with input [rows, ..., features].
        weight, bias: which of them are in phi, in this order.
    """

    def __init__(self, module: nn.Module, weight: bool, bias: bool):
        super().__init__(module)
        self.weight, self.bias = weight, bias
        self.inputs: Tensor | None = None

    def clear(self) -> None:
        super().clear()
        self.inputs = None

    def begin(self, args: tuple, output: Tensor) -> None:
        if not args:
            raise NotRowByRow(f"{type(self.module).__name__} is called with its input as a keyword.")
        self.inputs = args[0].detach()
        self.leaves = [torch.zeros(output.shape, device=output.device, dtype=output.dtype, requires_grad=True)]

    def perturbed(self, output: Tensor) -> Tensor:
        return output + self.leaves[0]

    def derivatives(self, gradients: Sequence[Tensor | None]) -> Tensor:
        leaf = self.leaves[0]
        gradient = (torch.zeros_like(leaf) if gradients[0] is None else gradients[0]).float()
        rows = len(leaf)
        gradient, inputs = gradient.reshape(rows, -1, leaf.shape[-1]), self.inputs.float()
        parts = []
        if self.weight:
            inputs = inputs.reshape(rows, -1, inputs.shape[-1])
            parts.append(torch.einsum("bpo,bpi->boi", gradient, inputs).reshape(rows, -1))
        if self.bias:
            parts.append(gradient.sum(1))
        return torch.cat(parts, 1)


@contextmanager
def tapped(taps: Sequence[Tap]) -> Iterator[None]:
    """Inside, forward passes are differentiable by the taps' leaves; outputs are unchanged."""
    handles = [tap.module.register_forward_hook(tap.hook) for tap in taps]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for tap in taps:
            tap.clear()


def jacobian_rows(outputs: Tensor, taps: Sequence[Tap]) -> Tensor:
    """Derivatives of one number per row, [rows], by phi: [rows, d] float32.

    Args:
        outputs: of a forward pass in `tapped`; its graph is kept.

    Raises:
        NotRowByRow: a leaf has another number of rows.
    """
    leaves = [leaf for tap in taps for leaf in tap.leaves]
    if any(len(leaf) != len(outputs) for leaf in leaves):
        raise NotRowByRow(f"{len(outputs)} rows of outputs, and a tapped layer with another number of rows.")
    if not outputs.requires_grad:
        gradients: list[Tensor | None] = [None] * len(leaves)
    else:
        for tap in taps:
            tap.in_backward = True
        try:
            gradients = list(torch.autograd.grad(outputs.sum(), leaves, retain_graph=True, allow_unused=True))
        finally:
            for tap in taps:
                tap.in_backward = False
    parts = []
    for tap in taps:
        own, gradients = gradients[: len(tap.leaves)], gradients[len(tap.leaves) :]
        if not own:
            raise NotRowByRow(f"{type(tap.module).__name__} is not called in a forward pass.")
        parts.append(tap.derivatives(own))
    return torch.cat(parts, 1)
