"""Differences: predictions linearised by one forward pass more along each coordinate, of whatever kind they are."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten
from transformers import EvalPrediction

from ..evaluation.evaluator import Evaluator
from .cost import DIFFERENCES, MOST_BYTES, cost
from .linearization import Linearization, LinearLeaf, arrays

STEP = 0.05  # of a difference, along a unit direction


class NotLinearizable(Exception):
    """The predictions are no smooth function of phi; the message says why."""


def floats(prediction: EvalPrediction) -> dict[int, np.ndarray]:
    """Position in `arrays` -> the floating-point arrays that may depend on phi, those of predictions and losses."""
    moving = {id(leaf) for tree in (prediction.predictions, prediction.losses) for leaf in tree_flatten(tree)[0]}
    return {i: leaf for i, leaf in enumerate(arrays(prediction)) if id(leaf) in moving and _is_float(leaf)}


def by_differences(evaluator: Evaluator, basis: Tensor, prediction: EvalPrediction) -> Linearization:
    """Linearise at the present phi.

    Args:
        basis: [d, k] of the coordinates.
        prediction: what the model predicts there.

    Raises:
        NotLinearizable: the predictions are no smooth function of phi, or take up too much memory.
    """
    phi, here = evaluator.phi, arrays(prediction)
    moving = floats(prediction)
    if not moving:
        raise NotLinearizable("the model's outputs hold no floating-point numbers")
    size = cost([leaf.shape for leaf in moving.values()], len(basis), basis.shape[1], DIFFERENCES).nbytes
    if size > MOST_BYTES:
        raise NotLinearizable(f"the derivatives of all outputs would take {size / 2**30:.1f} GiB")
    slopes: dict[int, list[Tensor]] = {i: [] for i in moving}
    with phi.restored():
        start = phi.read()
        for direction in basis.T:
            phi.write(start + STEP * direction)
            there = arrays(evaluator.joined(output for _, output in evaluator.outputs()))
            _compare(here, there, moving)
            for i, leaf in moving.items():
                slopes[i].append(torch.as_tensor((there[i].astype(np.float32) - leaf) / STEP))
    leaves = {
        i: LinearLeaf(torch.as_tensor(leaf.astype(np.float32)), torch.stack(slopes[i], -1))
        for i, leaf in moving.items()
    }
    leaves = {i: leaf for i, leaf in leaves.items() if leaf.jacobian.any()}
    if not leaves:
        raise NotLinearizable("the model's outputs do not depend on phi")
    return Linearization(prediction, leaves, evaluator.concat, evaluator.batch_sizes)


def _compare(here: list, there: list, moving: dict[int, np.ndarray]) -> None:
    if len(here) != len(there) or any(np.shape(a) != np.shape(b) for a, b in zip(here, there, strict=False)):
        raise NotLinearizable("the shape of the model's outputs changes with phi")
    for i, (a, b) in enumerate(zip(here, there, strict=True)):
        if isinstance(a, np.ndarray) and i not in moving and not _is_float(a) and not np.array_equal(a, b):
            raise NotLinearizable("the model's outputs are whole numbers that change with phi")


def _is_float(value: Any) -> bool:
    return isinstance(value, np.ndarray) and np.issubdtype(value.dtype, np.floating)
