"""Linearizer: makes a `Linearization` of a data set at the present phi, in the cheapest way that the model allows.

Row by row: every layer that phi sets gets a perturbation for each row (see `phi.taps`), so that one backward pass per
output gives that output's derivatives for all rows, in all of phi; where no token sees another one behind phi's first
layer, tokens are rows. Else by differences: one forward pass more for each coordinate, which works for any outputs that
are a smooth function of phi.

On several ranks each differentiates its own batches, and what is gathered is in coordinates.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten
from transformers import EvalPrediction

from ..evaluation.evaluator import Evaluator, everywhere, shared_out, undisturbed
from ..phi.coordinates import JACOBIAN, LOSS, RANDOM, Coordinates, Sketch, random_directions
from ..phi.taps import NotRowByRow
from .cost import DIFFERENCES, MOST_DIFFERENCES, Cost, cost, outputs_per_row, way_of
from .differences import NotLinearizable, by_differences, floats
from .linearization import Linearization, LinearLeaf, arrays
from .reading import reads_all
from .row_derivatives import RowDerivatives, row_derivatives
from .rows import take_rows, unsplittable

logger = logging.getLogger(__name__)

TRIED, MOST_OFF = 0.01, 0.5  # size of the step by which derivatives are tried, and how far they may be off, relatively
BATCH_BYTES = 2**27  # of a batch's derivatives in all of phi, from which coordinates are found
KEPT_BYTES = 2**28  # of all such derivatives, if they are to be used once more
GRADIENTS_PER_COORDINATE = 4  # mini-batch gradients of the loss, where coordinates are found by them


class Linearizer:
    """Linearises what an evaluator predicts.

    Args:
        evaluator: of the observation set.
        dim: the most coordinates.
        loss_gradients: count -> [count, d] gradients of the training loss on as many mini-batches, for the coordinates
            where outputs are not differentiated row by row; None: random directions instead.
        generator: draws rows and directions, the same on every rank.

    Attributes:
        way: see `cost.way_of`; empty until predictions were seen.
    """

    def __init__(
        self,
        evaluator: Evaluator,
        dim: int,
        loss_gradients: Callable[[int], Tensor] | None,
        generator: torch.Generator,
    ):
        self.evaluator, self.dim, self.loss_gradients, self.generator = evaluator, dim, loss_gradients, generator
        self.way = ""
        self._kept: list[RowDerivatives] = []  # this rank's in all of phi, at the phi where coordinates were found
        self._kept_batches = 0  # that all ranks together have kept: all or none
        self._checked = False  # whether derivatives row by row were compared with a small step
        self._leading = 1  # dimensions of the outputs that make rows

    def coordinates(self, prediction: EvalPrediction | None) -> Coordinates:
        """The coordinates at the present phi: those that move the model's decisions most.

        Args:
            prediction: what the model predicts there; None: that is not differentiated, but the loss.
        """
        phi = self.evaluator.phi
        dim = min(self.dim, phi.dim)
        basis, kind = None, JACOBIAN
        if prediction is not None and self._way(prediction) != DIFFERENCES:
            basis = self._row_by_row(prediction, lambda: self._decisive_directions(dim))
        if basis is None:
            dim, kind = min(dim, MOST_DIFFERENCES), LOSS
            if self.loss_gradients is not None:
                sketch = Sketch(phi.dim, dim)
                sketch.add(self.loss_gradients(GRADIENTS_PER_COORDINATE * dim).cpu()[:, None])
                basis = sketch.directions()
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
        found = None
        if self._way(prediction) != DIFFERENCES:
            found = self._row_by_row(prediction, lambda: self._by_rows(basis, prediction))
        if found is None:
            with undisturbed(self.evaluator.phi.model):
                found = by_differences(self.evaluator, basis, prediction)
        return found

    def cost(self, prediction: EvalPrediction, dim: int | None = None) -> Cost:
        """Of one linearization.

        Args:
            dim: number of coordinates; default: the most that there may be.
        """
        shapes = [leaf.shape for leaf in floats(prediction).values()]
        return cost(shapes, self.evaluator.phi.dim, dim or self.dim, self._way(prediction))

    def _way(self, prediction: EvalPrediction) -> str:
        if not self.way:
            evaluator, shapes = self.evaluator, [leaf.shape for leaf in floats(prediction).values()]
            taps = evaluator.concat and evaluator.phi.taps() is not None
            many = taps and way_of(shapes, taps, True) != way_of(shapes, taps, False)
            self.way = way_of(shapes, taps, many and reads_all(evaluator, prediction))
            logger.info(f"A linearisation of {self.evaluator.metric.name}'s predictions: {self.cost(prediction)}.")
        return self.way

    # Row by row

    def _row_by_row(self, prediction: EvalPrediction, compute: Callable[[], Any]) -> Any:
        """`compute`, or None where the outputs cannot be differentiated row by row: from then on by differences."""
        ((_, outputs),) = floats(prediction).items()
        self._leading = max(1, outputs.ndim - 1)
        try:
            with undisturbed(self.evaluator.phi.model):
                if not self._checked:
                    self._check()
                    self._checked = True
                return compute()
        except (NotRowByRow, RuntimeError) as error:
            self.way = DIFFERENCES
            logger.info(f"Outputs are linearised {self.cost(prediction)}, not row by row: {error}")
            return None

    def _derivatives(self, batch: Any, **kwargs: Any) -> RowDerivatives:
        return row_derivatives(self.evaluator, batch, self.way, self._leading, **kwargs)

    def _decisive_directions(self, dim: int) -> Tensor:
        """[d, <= dim] from all rows, or from as many of each batch as `BATCH_BYTES` hold."""
        evaluator = self.evaluator
        kept: list[Any] = []
        sketch, room = Sketch(evaluator.phi.dim, dim), KEPT_BYTES / evaluator.world_size

        def take_in(made: RowDerivatives) -> bool:
            """Whether this rank has kept all of its derivatives so far."""
            nonlocal room
            sketch.add(made.jacobian)
            room -= made.jacobian.nbytes if len(made.jacobian) == len(made.outputs) else float("inf")
            kept[:] = [*kept, made] if room >= 0 else []
            return room >= 0

        batches = evaluator.outputs(partial(self._derivatives, most_bytes=BATCH_BYTES), take_in)
        all_kept = [is_kept for _, is_kept in batches]
        self._kept, self._kept_batches = kept, len(all_kept) if all(all_kept) else 0
        sketch.sum = sum(everywhere(evaluator.rank, evaluator.world_size, lambda: sketch.sum))
        basis = sketch.directions()
        if basis is None:
            raise NotRowByRow("the outputs do not depend on phi.")
        return basis

    def _in_coordinates(self, basis: Tensor) -> list[RowDerivatives]:
        """Of all batches; those that were kept are used once."""
        evaluator, kept, count = self.evaluator, self._kept, self._kept_batches
        self._kept, self._kept_batches = [], 0
        if not count:
            return [made for _, made in evaluator.outputs(partial(self._derivatives, basis=basis))]

        def reduced(batch: int) -> RowDerivatives:
            made = kept[batch // evaluator.world_size]
            return replace(made, jacobian=made.jacobian @ basis.cpu())

        return shared_out(evaluator.rank, evaluator.world_size, count, reduced)

    def _by_rows(self, basis: Tensor, prediction: EvalPrediction) -> Linearization:
        ((position, predicted),) = floats(prediction).items()
        parts, total, sizes = self._in_coordinates(basis), len(predicted), self.evaluator.batch_sizes
        widths = {part.jacobian.shape[1] for part in parts}
        if widths != {outputs_per_row(predicted.shape, self.way)} or any(part.leaf != position for part in parts):
            raise NotRowByRow("batches differ in what the model returns.")
        if (found := sum(part.shape[0] for part in parts)) != total:
            raise NotRowByRow(f"{found} rows were differentiated, and {total} are predicted.")

        def joined(values: list[Tensor]) -> Tensor:
            """[rows, ...] or [examples, tokens, ...]; zeros for tokens that other batches have more of."""
            joint, start = values[0].new_zeros(*predicted.shape[: self._leading], *values[0].shape[1:]), 0
            for part, value in zip(parts, values, strict=True):
                place = (slice(start, start + part.shape[0]), *map(slice, part.shape[1:]))
                joint[place] = value.reshape(*part.shape, *value.shape[1:])
                start += part.shape[0]
            return joint

        jacobian = joined([part.jacobian for part in parts])
        columns = None if parts[0].columns is None else joined([part.columns for part in parts])
        if (most := self.cost(prediction, basis.shape[1]).rows) < total:
            if (reason := unsplittable(prediction, True, sizes)) is not None:
                raise NotLinearizable(f"the derivatives of all rows would take up too much memory, and {reason}")
            rows = torch.randperm(total, generator=self.generator)[:most].sort().values
            jacobian, columns = jacobian[rows], None if columns is None else columns[rows]
            prediction, sizes = take_rows(prediction, rows.numpy(), True, sizes), (most,)
        outputs = torch.as_tensor(np.asarray(arrays(prediction)[position], np.float32))
        leaf = LinearLeaf(outputs, jacobian[:, 0] if outputs.dim() == 1 else jacobian, columns)
        return Linearization(prediction, {position: leaf}, True, sizes)

    def _check(self) -> None:
        """Are derivatives right for the first batch? They are not where rows of a batch depend on each other.

        A small step must move the outputs about as they say. A layer without any derivative, to which a gradient may
        just not find its way, must not move them.

        Raises:
            NotRowByRow: they are off; the same on every rank.
        """
        evaluator, phi = self.evaluator, self.evaluator.phi
        step = (TRIED * torch.randn(phi.dim, generator=torch.Generator().manual_seed(0))).to(phi.read().device)
        layers = torch.cat([torch.full((p.numel(),), i) for i, p in enumerate(phi.parameters)]).to(step.device)
        by_layer = step[:, None] * (layers[:, None] == layers.unique())  # [d, layers]

        def moved(made: RowDerivatives, by: Tensor) -> Tensor:
            with phi.restored():
                phi.write(phi.read() + by)
                output = evaluator.first()
            after = tree_flatten(output.logits)[0][made.leaf].float().cpu().reshape(len(made.outputs), -1)
            return (after if made.columns is None else after.gather(1, made.columns)) - made.outputs

        def off() -> Tensor:
            made = evaluator.first(partial(self._derivatives, basis=by_layer, check=True))
            true = moved(made, step)
            parts = [true - made.jacobian.sum(-1)]
            still = (made.jacobian == 0).flatten(0, 1).all(0).to(step.device)
            if still.any() and not still.all():
                parts.append(moved(made, by_layer[:, still].sum(1)))
            return torch.stack([part.norm() for part in parts]).max() / true.norm().clamp_min(1e-30)

        found = max(everywhere(evaluator.rank, evaluator.world_size, off))
        if not found <= MOST_OFF:
            raise NotRowByRow(f"row by row, derivatives are off by {float(found):.2g} of a small step.")
