"""RowDerivatives: some outputs of each row of a batch with their derivatives by phi, from one backward pass each.

Of outputs of tokens each token is a row, if no token sees another one behind the first layer that phi sets.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from ..evaluation.evaluator import Evaluator, everywhere
from ..phi.space import is_sharded
from ..phi.taps import NotRowByRow, check_rows, check_taps, jacobian_rows, tapped
from .cost import LARGEST, MOST_LARGEST


@dataclass(frozen=True)
class RowDerivatives:
    """Some outputs of each row of a batch, and their derivatives, on the CPU.

    Attributes:
        leaf: position of the array of outputs among the leaves of the batch's logits.
        shape: (rows,), or (examples, tokens), of which together there are as many.
        outputs: [rows, m] float32.
        jacobian: [rows, m, d], or [rows, m, k] in coordinates, float32; of fewer rows where not all are wanted.
        columns: [rows, m] which outputs; None: all.
    """

    leaf: int
    shape: tuple[int, ...]
    outputs: Tensor
    jacobian: Tensor
    columns: Tensor | None


def row_derivatives(
    evaluator: Evaluator,
    batch: Any,
    way: str,
    leading: int,
    basis: Tensor | None = None,
    most_bytes: float = float("inf"),
    check: bool = False,
) -> RowDerivatives:
    """Run a batch, and differentiate its outputs row by row.

    Args:
        way: `ROW_BY_ROW` or `LARGEST`.
        leading: dimensions of the outputs that make rows: 1, or 2 of examples and tokens.
        basis: [d, k]; None: derivatives are in all of phi.
        most_bytes: of the derivatives; those of the first rows are made, of one at least.
        check: whether to look if rows depend on each other, in one more backward pass.

    Raises:
        NotRowByRow: that is not possible.
    """
    phi = evaluator.phi
    taps = phi.taps() or ()
    found: list[tuple[int, Tensor]] = []

    def forward() -> None:
        found.append(_differentiable_leaf(evaluator.predict(batch).logits, returned))
        shape = found[0][1].shape
        if len(shape) not in (leading, leading + 1):
            raise NotRowByRow(f"outputs of shape {list(shape)} are not some numbers per row.")
        check_taps(taps, shape[:leading].numel())

    with differentiable(phi.model) as returned, tapped(taps, leading):
        # ranks take part in each other's passes of a sharded model, so none begins a backward pass unless all do
        everywhere(evaluator.rank, evaluator.world_size if is_sharded(phi.model) else 1, forward)
        ((leaf, outputs),) = found
        with torch.enable_grad():
            flat, columns = outputs.reshape(outputs.shape[:leading].numel(), -1), None
            if check:
                check_rows(flat, taps)
            if way == LARGEST and flat.shape[1] > MOST_LARGEST:
                columns = flat.detach().topk(MOST_LARGEST, 1).indices.sort(1).values
                flat = flat.gather(1, columns)
            a_row = 4 * flat.shape[1] * (phi.dim if basis is None else basis.shape[1])
            count = max(1, int(min(most_bytes / a_row, len(flat))))
            jacobian = torch.stack([jacobian_rows(column, taps, basis, count) for column in flat.unbind(1)], 1)
    columns = None if columns is None else columns.cpu()
    return RowDerivatives(leaf, outputs.shape[:leading], flat.detach().float().cpu(), jacobian.cpu(), columns)


@contextmanager
def differentiable(model: nn.Module) -> Iterator[list[Any]]:
    """Inside, the model's forward passes record a graph, whoever switched gradients off; yields what they return."""
    returned: list[Any] = []

    def enter(module, args):
        torch.set_grad_enabled(True)

    def leave(module, args, output):
        returned.append(output)
        torch.set_grad_enabled(False)

    needed = [(p, p.requires_grad) for p in model.parameters()]
    handles = [model.register_forward_pre_hook(enter), model.register_forward_hook(leave)]
    try:
        for parameter, _ in needed:
            parameter.requires_grad_(False)
        with torch.compiler.set_stance("force_eager"):
            yield returned
    finally:
        for handle in handles:
            handle.remove()
        for parameter, needs in needed:
            parameter.requires_grad_(needs)


def _differentiable_leaf(logits: Any, returned: list[Any]) -> tuple[int, Tensor]:
    """(position, the same with its graph) of the one floating-point array of numbers per row among a batch's logits.

    Raises:
        NotRowByRow: there are several, none, or none that the model itself has returned in one call.
    """
    leaves = [
        (i, leaf)
        for i, leaf in enumerate(tree_flatten(logits)[0])
        if isinstance(leaf, Tensor) and leaf.is_floating_point()
    ]
    if len(returned) != 1 or len(leaves) != 1:
        raise NotRowByRow(f"{len(returned)} calls of the model make {len(leaves)} arrays of outputs.")
    ((position, leaf),) = leaves
    output = returned[0]
    for tensor in tree_flatten(dict(output) if hasattr(output, "keys") else output)[0]:
        if isinstance(tensor, Tensor) and tensor.shape == leaf.shape and tensor.requires_grad:
            if torch.equal(tensor.detach().to(leaf.dtype), leaf):
                return position, tensor
    raise NotRowByRow("the predictions are not what the model returns, but made of it.")
