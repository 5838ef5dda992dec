"""Taps: derivatives of every row's outputs by a layer's parameters, from one backward pass for all rows.

The outputs of a row depend on a layer's weights through the layer's output for that row alone. So each row gets its
own perturbation of the layer's output, a leaf of zeros, and the gradient of the sum over rows of one output holds, row
by row, that output's derivatives. Tokens are rows of their own where none sees another one behind the first tap.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import PhiError

CHUNK_BYTES = 2**26  # of derivatives in all of phi, which are made at once


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
        self.why_not: str | None = None  # there are no derivatives row by row, as the end of a sentence
        self.leading = 1  # dimensions of the output that together make rows: two where tokens are rows

    def clear(self) -> None:
        self.leaves, self.why_not = [], None

    def hook(self, module: nn.Module, args: tuple, output: Any) -> Any:
        """Forward hook: the output, differentiable by this tap's leaves, unless `why_not` says otherwise.

        It raises nothing: a rank that left a sharded model's forward pass would leave the others waiting in theirs.
        """
        if not self.in_backward and self.why_not is None:
            if self.leaves:
                self.why_not = "is called more than once in a forward pass"
            elif not isinstance(output, Tensor) or output.dim() < self.leading:
                self.why_not = "returns no tensor with rows"
            else:
                self.begin(args, output)
        return output if self.why_not else self.perturbed(output)

    @abstractmethod
    def begin(self, args: tuple, output: Tensor) -> None:
        """Make `leaves` of zeros for a forward pass in which the module returns `output`, or set `why_not`."""

    @abstractmethod
    def perturbed(self, output: Tensor) -> Tensor:
        """`output` plus a term that is zero at the leaves."""

    @abstractmethod
    def derivatives(self, gradients: Sequence[Tensor], rows: slice) -> Tensor:
        """Gradients of the leaves, [rows, ...] -> [rows, numbers of this part of phi] float32, of some rows."""


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
        if self.dim % output.dim() < self.leading:
            self.why_not = "has its channels where other layers have tokens"
            return
        shape = [*output.shape[: self.leading], *[1] * (output.dim() - self.leading)]
        shape[self.dim] = output.shape[self.dim]
        tuned = [part for part in (self.scale, self.shift) if part is not None]
        self.leaves = [torch.zeros(shape, device=output.device, requires_grad=True) for _ in tuned]

    def perturbed(self, output: Tensor) -> Tensor:
        across = [1] * output.dim()
        across[self.dim] = -1
        moved: Any = 0.0
        if self.scale is not None:
            plain = output.detach().float()
            if self.shift is not None:
                plain = plain - self.shift.reshape(across)
            moved = plain / (1 + self.scale).reshape(across) * self.leaves[0]
        if self.shift is not None:
            moved = moved + self.leaves[-1]
        return output + moved.to(output.dtype)

    def derivatives(self, gradients: Sequence[Tensor], rows: slice) -> Tensor:
        return torch.cat([part[rows].flatten(1).float() for part in gradients], 1)


class Linear(Tap):
    """Weight and bias of a linear layer: the outer product of its input and the gradient of its output.

    Args:
        module: an `nn.Linear` with input [rows, ..., features].
        weight, bias: which of them are in phi, in this order.
    """

    def __init__(self, module: nn.Module, weight: bool, bias: bool):
        super().__init__(module)
        self.weight, self.bias = weight, bias
        self.inputs = torch.empty(0)

    def clear(self) -> None:
        super().clear()
        self.inputs = torch.empty(0)

    def begin(self, args: tuple, output: Tensor) -> None:
        if not args:
            self.why_not = "is called with its input as a keyword"
            return
        self.inputs = args[0].detach().flatten(0, self.leading - 1)
        self.leaves = [torch.zeros(output.shape, device=output.device, dtype=output.dtype, requires_grad=True)]

    def perturbed(self, output: Tensor) -> Tensor:
        return output + self.leaves[0]

    def derivatives(self, gradients: Sequence[Tensor], rows: slice) -> Tensor:
        gradient, inputs = gradients[0][rows].float(), self.inputs[rows].float()
        gradient = gradient.reshape(len(gradient), -1, gradient.shape[-1])
        parts = []
        if self.weight:
            inputs = inputs.reshape(len(inputs), -1, inputs.shape[-1])
            parts.append(torch.einsum("bpo,bpi->boi", gradient, inputs).flatten(1))
        if self.bias:
            parts.append(gradient.sum(1))
        return torch.cat(parts, 1)


@contextmanager
def tapped(taps: Sequence[Tap], leading: int = 1) -> Iterator[None]:
    """Inside, forward passes are differentiable by the taps' leaves; outputs are unchanged.

    Args:
        leading: dimensions of a layer's output that together make rows.
    """
    handles = [tap.module.register_forward_hook(tap.hook) for tap in taps]
    try:
        for tap in taps:
            tap.leading = leading
        yield
    finally:
        for handle in handles:
            handle.remove()
        for tap in taps:
            tap.clear()


def check_taps(taps: Sequence[Tap], rows: int) -> None:
    """Raises NotRowByRow where a forward pass in `tapped` has not left leaves of that many rows in every tap."""
    faults = [(tap, tap.why_not) for tap in taps if tap.why_not]
    for tap, why in faults or [(tap, "is not called in a forward pass") for tap in taps if not tap.leaves]:
        raise NotRowByRow(f"{type(tap.module).__name__} {why}.")
    if any(leaf.shape[: tap.leading].numel() != rows for tap in taps for leaf in tap.leaves):
        raise NotRowByRow(f"{rows} rows of outputs, and a tapped layer with another number of rows.")


def row_gradients(outputs: Tensor, taps: Sequence[Tap]) -> list[Tensor]:
    """Of the sum of one number per row, [rows], by the taps' leaves: each [rows, ...].

    Args:
        outputs: of a forward pass in `tapped` that `check_taps` has passed; its graph is kept.
    """
    leaves = [leaf for tap in taps for leaf in tap.leaves]
    for tap in taps:
        tap.in_backward = True
    found: Sequence[Tensor | None] = [None] * len(leaves)
    try:
        if outputs.requires_grad:
            found = torch.autograd.grad(outputs.sum(), leaves, retain_graph=True, allow_unused=True)
    finally:
        for tap in taps:
            tap.in_backward = False
    filled = [torch.zeros_like(leaf) if g is None else g for g, leaf in zip(found, leaves, strict=True)]
    return [g.flatten(0, tap.leading - 1) for g, tap in zip(filled, (t for t in taps for _ in t.leaves), strict=True)]


def check_rows(outputs: Tensor, taps: Sequence[Tap]) -> None:
    """Outputs of a random half of the rows must not depend at all on what the other half perturbs.

    Args:
        outputs: [rows, m], as for `row_gradients`.

    Raises:
        NotRowByRow: they do, as where batches are normalised over their rows, or tokens attend to each other.
    """
    half = torch.rand(len(outputs), generator=torch.Generator().manual_seed(0)).to(outputs.device) < 0.5
    if any(part[~half].any() for part in row_gradients(outputs.sum(1) * half, taps)):
        raise NotRowByRow("the outputs of a row depend on other rows, or tokens on other tokens.")


def jacobian_rows(outputs: Tensor, taps: Sequence[Tap], basis: Tensor | None = None, most: int | None = None) -> Tensor:
    """Derivatives of one number per row, [rows], by phi: [rows, d] float32, or in coordinates [rows, k].

    Args:
        outputs: as for `row_gradients`.
        basis: [d, k] of the coordinates; a few rows at a time are multiplied with it, so that [rows, d] is never held.
        most: rows, the first of which are wanted; None: all.
    """
    gradients = iter(row_gradients(outputs, taps))
    of_taps = [(tap, [next(gradients) for _ in tap.leaves]) for tap in taps]
    count = len(outputs) if most is None else most
    with torch.autocast(outputs.device.type, enabled=False):
        step = count if basis is None else max(1, CHUNK_BYTES // (4 * len(basis)))
        parts = []
        for start in range(0, count, step):
            rows = slice(start, min(start + step, count))
            part = torch.cat([tap.derivatives(own, rows) for tap, own in of_taps], 1)
            parts.append(part if basis is None else part @ basis)
        return torch.cat(parts)
