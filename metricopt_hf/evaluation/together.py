"""Together: predictions at several phi from one pass, with phi as a batch dimension, where that is right.

Behind a frozen prefix a pass is small, and on an accelerator starting its kernels takes as long as they run. Whether
the model can be computed that way (no number of a tensor may be asked for, nothing shared be changed in place), gives
the same, and is quicker, is not assumed but tried, on one batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from ..phi import PhiSpace

# results agree if they differ by less, relative to the largest; where the model computes in half precision, whatever
# type its results are handed over in, by what that rounds off
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-8}
HALF_TOLERANCE = 2e-2
# at so many points both ways are timed, of which the quicker is taken
TRIED = 4
TENSOR = object()  # the place of one among other leaves
# the most points at once, and how many times the memory of what is kept of a batch a point is taken to need
AT_ONCE, ACTIVATIONS = 16, 32


def worthwhile(device: torch.device) -> bool:
    """Where it is tried. A CPU's cores have enough to do with one point, and its results are the same to the bit in
    every run, which a stopwatch must not change."""
    return device.type != "cpu"


def chunk_size(kept_bytes: int, device: torch.device) -> int:
    """Points at once, by the memory that is free: a quarter of it."""
    if device.type != "cuda":
        return AT_ONCE
    free, _ = torch.cuda.mem_get_info(device)
    return int(min(AT_ONCE, max(1, free // (4 * ACTIVATIONS * max(1, kept_bytes)))))


class _Predicts(nn.Module):
    """A model and what makes predictions with it, as one module, so that parameters can be passed to it."""

    def __init__(self, model: nn.Module, predict: Callable[[Any], Any]):
        super().__init__()
        self.model, self.predict = model, predict

    def forward(self, batch: Any) -> Any:
        return self.predict(batch)


class Together:
    """Makes predictions at several phi at once.

    Args:
        phi: on the model that `predict` runs.
        predict: batch -> nested tuples of tensors.
    """

    def __init__(self, phi: PhiSpace, predict: Callable[[Any], Any]):
        self.phi, self.predict = phi, predict
        self._module = _Predicts(phi.model, predict)
        self._works: bool | None = None  # None: not tried yet

    def at(self, points: Tensor) -> Callable[[Any], list[Any]]:
        """points [n, d] -> batch -> what `predict` makes of it at each of them."""
        parameters = self.phi.parameters
        pieces = points.split([p.numel() for p in parameters], dim=1)
        values = {
            f"model.{name}": piece.reshape(len(points), *p.shape).to(p.dtype)
            for name, piece, p in zip(self.phi.names, pieces, parameters, strict=True)
        }

        def run(batch: Any) -> list[Any]:
            structure = None

            def of_one(values: dict[str, Tensor]) -> list[Tensor]:
                nonlocal structure
                leaves, structure = tree_flatten(functional_call(self._module, values, (batch,), tie_weights=False))
                structure = [TENSOR if isinstance(leaf, Tensor) else leaf for leaf in leaves], structure
                return [leaf for leaf in leaves if isinstance(leaf, Tensor)]

            # dropout and the like are off; what is random all the same is refused
            stacked = vmap(of_one, randomness="error")(values)
            return [_unflattened(structure, [leaf[i] for leaf in stacked]) for i in range(len(points))]

        return run

    def works(self, points: Tensor, execute: Callable[[Callable[[Any], Any]], Any]) -> bool:
        """Whether it is right and quicker, tried once, at some of `points` [n, d]; phi is left anywhere.

        Args:
            execute: calls what it is given with a batch, under the conditions of a pass.
        """
        if self._works is None:
            points = points[:TRIED]
            try:
                together = self.at(points)
                execute(together)  # what is done for the first time takes longer
                seconds, made = _timed(lambda: execute(together), points)
                slower, expected = _timed(lambda: list(self._one_by_one(points, execute)), points)
                within = self._tolerance(points[0], execute)
                agree = all(_agree(a, b, within) for a, b in zip(made, expected, strict=True))
                self._works = seconds < slower and agree
            except Exception:  # of whatever kind: it is tried, and what fails is not used
                self._works = False
        return self._works

    def give_up(self) -> None:
        """One by one from now on."""
        self._works = False

    def _tolerance(self, point: Tensor, execute: Callable[[Callable[[Any], Any]], Any]) -> float:
        """By the coarsest type in which any of the model's modules answers."""
        within = [TOLERANCE[torch.float64]]

        def look(module, args, output):
            floats = [t for t in tree_flatten(output)[0] if isinstance(t, Tensor) and t.is_floating_point()]
            within.extend(TOLERANCE.get(t.dtype, HALF_TOLERANCE) for t in floats)

        handles = [module.register_forward_hook(look) for module in self.phi.model.modules()]
        try:
            self.phi.write(point)
            execute(self.predict)
        finally:
            for handle in handles:
                handle.remove()
        return max(within)

    def _one_by_one(self, points: Tensor, execute: Callable[[Callable[[Any], Any]], Any]) -> Iterator[Any]:
        for point in points:
            self.phi.write(point)
            yield tree_map_only(Tensor, torch.clone, execute(self.predict))


def _unflattened(structure: tuple, tensors: list[Tensor]) -> Any:
    leaves, spec = structure
    tensors = iter(tensors)
    return tree_unflatten([next(tensors) if leaf is TENSOR else leaf for leaf in leaves], spec)


def _timed(work: Callable[[], Any], points: Tensor) -> tuple[float, Any]:
    """Seconds until the device is done, and the result."""
    if points.is_cuda:
        torch.cuda.synchronize(points.device)
    start = perf_counter()
    result = work()
    if points.is_cuda:
        torch.cuda.synchronize(points.device)
    return perf_counter() - start, result


def _agree(first: Any, second: Any, within: float) -> bool:
    a, b = ([leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, Tensor)] for tree in (first, second))
    return 0 < len(a) == len(b) and all(_close(x, y, within) for x, y in zip(a, b, strict=True))


def _close(a: Tensor, b: Tensor, within: float) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not a.is_floating_point():
        return torch.equal(a, b)
    most = within * b.abs().max().clamp_min(1e-30)
    return bool(((a - b).abs() <= most).all() & a.isfinite().all()) if a.numel() else True
