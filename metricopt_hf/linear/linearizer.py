"""Linearizer: makes a `Linearization` of a data set at the present phi, in the cheapest way that the model allows.

Row by row: every layer that phi sets gets a perturbation for each row (see `phi.taps`), so that one backward pass per
output gives that output's derivatives for all rows, in all of phi. Else by differences: one forward pass more for each
coordinate, which works for any outputs that are a smooth function of phi.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten
from transformers import EvalPrediction

from ..evaluation.evaluator import Evaluator, undisturbed
from ..phi.coordinates import (
    JACOBIAN,
    LOSS,
    RANDOM,
    Coordinates,
    leading_directions,
    output_directions,
    random_directions,
)
from ..phi.space import is_sharded
from ..phi.taps import NotRowByRow, jacobian_rows, tapped
from .linearization import Linearization, LinearLeaf, arrays
from .rows import take_rows, unsplittable

logger = logging.getLogger(__name__)

ROW_BY_ROW, DIFFERENCES = "row by row", "differences"
MOST_OUTPUTS = 5  # numbers a row, up to which each has a backward pass
LARGEST_LOGITS = 5  # of more logits, how many of each row have one: the others are far from being decided for
MOST_DIFFERENCES = 16  # coordinates, where each takes a forward pass
STEP = 0.05  # of a difference, along a unit direction
TRIED, MOST_OFF = 0.01, 0.5  # size of the step by which derivatives are tried, and how far they may be off, relatively
BASIS_BYTES = 2**28  # of derivatives in all of phi, from which coordinates are found
MOST_BYTES = 2**30  # memory of a linearization; rows are drawn where all would take more
GRADIENTS_PER_COORDINATE = 4  # mini-batch gradients of the loss, where coordinates are found by them


class NotLinearizable(Exception):
    """The predictions are no smooth function of phi; the message says why."""


@dataclass(frozen=True)
class RowDerivatives:
    """Some outputs of each row of a batch, and their derivatives, on the CPU.

    Attributes:
        leaf: position of the array of outputs among the leaves of the batch's logits.
        outputs: [rows, m] float32.
        jacobian: [rows, m, d], or [rows, m, k] in coordinates; of fewer rows where not all are wanted.
        columns: [rows, m] which outputs; None: all.
    """

    leaf: int
    outputs: Tensor
    jacobian: Tensor
    columns: Tensor | None


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


class Linearizer:
    """Linearises what an evaluator predicts.

    Args:
        evaluator: of the observation set.
        dim: the most coordinates.
        loss_gradients: count -> [count, d] gradients of the training loss on as many mini-batches, for the coordinates
            where outputs are not differentiated row by row; None: random directions instead.
        generator: draws rows and directions, the same on every rank.
    """

    def __init__(
        self,
        evaluator: Evaluator,
        dim: int,
        loss_gradients: Callable[[int], Tensor] | None,
        generator: torch.Generator,
    ):
        self.evaluator, self.dim, self.loss_gradients, self.generator = evaluator, dim, loss_gradients, generator
        self._made: list[RowDerivatives] = []  # in all of phi at the present phi, once coordinates were found from them
        self.way = DIFFERENCES if evaluator.phi.taps() is None or not evaluator.concat else ROW_BY_ROW
        self._checked = False  # whether derivatives row by row were compared with a small step

    def coordinates(self, row_by_row: bool = True) -> Coordinates:
        """The coordinates at the present phi: those that move the model's decisions most.

        Args:
            row_by_row: whether outputs may be differentiated; else the loss is.
        """
        phi = self.evaluator.phi
        dim = min(self.dim, phi.dim)
        basis, kind = None, JACOBIAN
        if row_by_row and self.way == ROW_BY_ROW:
            basis = self._row_by_row(lambda: self._decisive_directions(dim))
        if basis is None:
            dim, kind = min(dim, MOST_DIFFERENCES), LOSS
            if self.loss_gradients is not None:
                basis = leading_directions(self.loss_gradients(GRADIENTS_PER_COORDINATE * dim).cpu(), dim)
        if basis is None:
            basis, kind = random_directions(phi.dim, dim, self.generator), RANDOM
        return Coordinates(phi.read(), basis.to(phi.read().device), kind)

    def linearize(self, basis: Tensor, prediction: EvalPrediction) -> Linearization:
        """At the present phi.

        Args:
            basis: [d, k] of the coordinates.
            prediction: what the model predicts there.

        Raises:
            NotLinearizable: the predictions are no smooth function of phi, or take up too much memory.
        """
        if is_sharded(self.evaluator.phi.model):
            raise NotLinearizable("FSDP2 has sharded the model")
        found = None
        if self.way == ROW_BY_ROW:
            found = self._row_by_row(lambda: self._by_rows(basis, prediction))
        if found is None:
            with undisturbed(self.evaluator.phi.model):
                found = self._by_differences(basis, prediction)
        return found

    def passes(self, prediction: EvalPrediction, dim: int | None = None) -> int:
        """Passes over the set that a linearization takes beside the one that predicts, backward ones counted too.

        Args:
            dim: number of coordinates; default: the most that there may be.
        """
        if self.way == DIFFERENCES:
            return dim or min(self.dim, MOST_DIFFERENCES, self.evaluator.phi.dim)
        return 1 + _outputs_per_row(prediction)

    def nbytes(self, prediction: EvalPrediction, dim: int) -> int:
        """Memory that the derivatives of a linearization in `dim` coordinates take up, `MOST_BYTES` at most."""
        if self.way == DIFFERENCES:
            here = arrays(prediction)
            return sum(4 * here[i].size * dim for i in _moving(prediction) if _is_float(here[i]))
        a_row = 4 * _outputs_per_row(prediction) * dim
        rows = len(arrays(prediction)[_output_leaf(prediction)])
        return min(rows, max(1, int(MOST_BYTES / a_row))) * a_row

    # Row by row

    def _row_by_row(self, compute: Callable[[], Any]) -> Any:
        """`compute`, or None where the outputs cannot be differentiated row by row: from then on by differences."""
        try:
            with undisturbed(self.evaluator.phi.model):
                if not self._checked:
                    self._check()
                    self._checked = True
                return compute()
        except (NotRowByRow, RuntimeError) as error:
            logger.info(f"Outputs are linearised by differences of forward passes, not row by row: {error}")
            self.way = DIFFERENCES
            return None

    def _decisive_directions(self, dim: int) -> Tensor | None:
        """[d, <= dim] from as many rows' derivatives as `BASIS_BYTES` hold."""
        room, rows, self._made = BASIS_BYTES / self.evaluator.world_size, [], []
        for _, made in self.evaluator.outputs(lambda batch: self._derivatives(batch, most_bytes=room)):  # noqa: B023
            rows.append(made.jacobian)
            self._made.append(made)
            room -= made.jacobian.nbytes
            if room < made.jacobian[0].nbytes:
                self._made = []  # they are not of all rows
                break
        widest = max(jacobian.shape[1] for jacobian in rows)
        basis = output_directions(torch.cat([jacobian for jacobian in rows if jacobian.shape[1] == widest]), dim)
        if basis is None:
            raise NotRowByRow("the outputs do not depend on phi.")
        return basis

    def _derivatives(self, batch: Any, basis: Tensor | None = None, most_bytes: float = float("inf")) -> RowDerivatives:
        """Run a batch, and differentiate its outputs row by row.

        Args:
            basis: [d, k]; None: derivatives are in all of phi.
            most_bytes: of the derivatives; those of the first rows are kept, of one at least.

        Raises:
            NotRowByRow: that is not possible.
        """
        phi = self.evaluator.phi
        taps = phi.taps()
        with differentiable(phi.model) as returned, tapped(taps):
            output = self.evaluator.predict(batch)
            leaf, outputs = _differentiable_leaf(output.logits, returned)
            with torch.enable_grad():
                flat, columns = _numbers_per_row(outputs)
                a_row = 4 * flat.shape[1] * (phi.dim if basis is None else basis.shape[1])
                count = min(len(flat), max(1, int(min(most_bytes / a_row, len(flat)))))
                rows = (jacobian_rows(flat[:, column], taps)[:count] for column in range(flat.shape[1]))
                jacobian = torch.stack([part if basis is None else part @ basis for part in rows], 1)
        flat, columns = flat.detach().float().cpu(), None if columns is None else columns.cpu()
        return RowDerivatives(leaf, flat, jacobian.cpu(), columns)

    def _in_coordinates(self, basis: Tensor) -> Iterator[RowDerivatives]:
        if not self._made:
            yield from (made for _, made in self.evaluator.outputs(lambda batch: self._derivatives(batch, basis)))
            return
        kept, self._made = self._made, []
        for made in kept:
            yield replace(made, jacobian=made.jacobian @ basis.cpu())

    def _by_rows(self, basis: Tensor, prediction: EvalPrediction) -> Linearization:
        evaluator, position = self.evaluator, _output_leaf(prediction)
        total, start = len(arrays(prediction)[position]), 0
        parts: list[RowDerivatives] = []
        chosen = np.ones(total, bool)
        if (room := MOST_BYTES / (4 * _outputs_per_row(prediction) * basis.shape[1] * total)) < 1:
            order = torch.randperm(total, generator=self.generator).numpy()
            chosen[order[max(1, int(room * total)) :]] = False
        for made in self._in_coordinates(basis):
            if made.leaf != position or made.jacobian.shape[1] != _outputs_per_row(prediction):
                raise NotRowByRow("batches differ in what the model returns.")
            rows = torch.as_tensor(np.flatnonzero(chosen[start : start + len(made.jacobian)]))
            columns = None if made.columns is None else made.columns[rows]
            parts.append(RowDerivatives(made.leaf, made.outputs[rows], made.jacobian[rows], columns))
            start += len(made.jacobian)
        if start != total:
            raise NotRowByRow(f"{start} rows were differentiated, and {total} are predicted.")
        centre, sizes = prediction, evaluator.batch_sizes
        if not chosen.all():
            if (reason := unsplittable(prediction, True, sizes)) is not None:
                raise NotLinearizable(f"the derivatives of all rows would take up too much memory, and {reason}")
            rows = np.flatnonzero(chosen)
            centre, sizes = take_rows(prediction, rows, True, sizes), (len(rows),)
        outputs = torch.as_tensor(np.asarray(arrays(centre)[position], np.float32))
        jacobian = torch.cat([part.jacobian for part in parts])
        columns = None if parts[0].columns is None else torch.cat([part.columns for part in parts])
        if outputs.dim() == 1:
            jacobian = jacobian[:, 0]
        return Linearization(centre, {position: LinearLeaf(outputs, jacobian, columns)}, True, sizes)

    def _check(self) -> None:
        """Are derivatives right for the first batch? They are not where rows of a batch depend on each other.

        A layer without any derivative, to which a gradient may just not find its way, must not move the outputs.

        Raises:
            NotRowByRow: they are off.
        """
        evaluator, phi = self.evaluator, self.evaluator.phi
        step = (TRIED * torch.randn(phi.dim, generator=torch.Generator().manual_seed(0))).to(phi.read().device)
        layers = torch.cat([torch.full((p.numel(),), i) for i, p in enumerate(phi.parameters)]).to(step.device)
        by_layer = step[:, None] * (layers[:, None] == layers.unique())  # [d, layers]
        _, made = next(evaluator.outputs(lambda batch: self._derivatives(batch, by_layer)))

        def moved(by: Tensor) -> Tensor:
            with phi.restored():
                phi.write(phi.read() + by)
                _, output = next(evaluator.outputs())
            after = tree_flatten(output.logits)[0][made.leaf].float().cpu()
            after = after[:, None] if after.dim() == 1 else after
            return (after if made.columns is None else after.gather(1, made.columns)) - made.outputs

        true, expected = moved(step), made.jacobian.sum(-1)
        off = float((true - expected).norm() / true.norm().clamp_min(1e-30))
        still = (made.jacobian == 0).flatten(0, 1).all(0).to(step.device)
        if still.any() and not still.all():
            off = max(off, float(moved(by_layer[:, still].sum(1)).norm() / true.norm().clamp_min(1e-30)))
        if not off <= MOST_OFF:
            raise NotRowByRow(f"row by row, derivatives are off by {off:.2g} of a small step.")

    # By differences

    def _by_differences(self, basis: Tensor, prediction: EvalPrediction) -> Linearization:
        phi, evaluator = self.evaluator.phi, self.evaluator
        here = arrays(prediction)
        floats = [i for i in sorted(_moving(prediction)) if _is_float(here[i])]
        size = self.nbytes(prediction, basis.shape[1])
        if not floats:
            raise NotLinearizable("the model's outputs hold no floating-point numbers")
        if size > MOST_BYTES:
            raise NotLinearizable(f"the derivatives of all outputs would take {size / 2**30:.1f} GiB")
        slopes: dict[int, list[Tensor]] = {i: [] for i in floats}
        with phi.restored():
            start = phi.read()
            for direction in basis.T:
                phi.write(start + STEP * direction)
                there = arrays(evaluator.joined(output for _, output in evaluator.outputs()))
                self._compare(here, there, floats)
                for i in floats:
                    slopes[i].append(torch.as_tensor((there[i].astype(np.float32) - here[i]) / STEP))
        leaves = {
            i: LinearLeaf(torch.as_tensor(here[i].astype(np.float32)), torch.stack(s, -1)) for i, s in slopes.items()
        }
        leaves = {i: leaf for i, leaf in leaves.items() if leaf.jacobian.any()}
        if not leaves:
            raise NotLinearizable("the model's outputs do not depend on phi")
        return Linearization(prediction, leaves, evaluator.concat, evaluator.batch_sizes)

    @staticmethod
    def _compare(here: list, there: list, floats: list[int]) -> None:
        if len(here) != len(there) or any(np.shape(a) != np.shape(b) for a, b in zip(here, there, strict=False)):
            raise NotLinearizable("the shape of the model's outputs changes with phi")
        for i, (a, b) in enumerate(zip(here, there, strict=True)):
            if isinstance(a, np.ndarray) and i not in floats and not _is_float(a) and not np.array_equal(a, b):
                raise NotLinearizable("the model's outputs are whole numbers that change with phi")


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
    if leaf.dim() > 2 or leaf.dim() == 0:
        raise NotRowByRow(f"outputs of shape {list(leaf.shape)} are more than some numbers per row.")
    for tensor in tree_flatten(_plain(returned[0]))[0]:
        if isinstance(tensor, Tensor) and tensor.shape == leaf.shape and tensor.requires_grad:
            if torch.equal(tensor.detach().to(leaf.dtype), leaf):
                return position, tensor
    raise NotRowByRow("the predictions are not what the model returns, but made of it.")


def _numbers_per_row(outputs: Tensor) -> tuple[Tensor, Tensor | None]:
    """([rows, m], which columns): the largest of many logits, else all, None."""
    if outputs.dim() == 1:
        return outputs[:, None], None
    if outputs.shape[1] <= MOST_OUTPUTS:
        return outputs, None
    columns = outputs.detach().topk(LARGEST_LOGITS, 1).indices.sort(1).values
    return outputs.gather(1, columns), columns


def _output_leaf(prediction: EvalPrediction) -> int:
    """Position in `arrays` of the first floating-point array of the predictions, which come first."""
    return next((i for i, value in enumerate(arrays(prediction)) if _is_float(value)), 0)


def _outputs_per_row(prediction: EvalPrediction) -> int:
    """How many outputs of each row are differentiated."""
    shape = np.shape(arrays(prediction)[_output_leaf(prediction)])
    outputs = shape[1] if len(shape) > 1 else 1
    return outputs if outputs <= MOST_OUTPUTS else LARGEST_LOGITS


def _plain(output: Any) -> Any:
    return dict(output) if hasattr(output, "keys") else output


def _moving(prediction: EvalPrediction) -> set[int]:
    """Positions in `arrays` that may depend on phi: those of predictions and losses."""
    leaves = {id(leaf) for tree in (prediction.predictions, prediction.losses) for leaf in tree_flatten(tree)[0]}
    return {i for i, leaf in enumerate(arrays(prediction)) if id(leaf) in leaves}


def _is_float(value: Any) -> bool:
    return isinstance(value, np.ndarray) and np.issubdtype(value.dtype, np.floating)
