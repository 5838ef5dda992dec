"""Labels and logits of a linearization, as the guides of this folder read them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..guides.row_moves import two_sided
from ..linear.linearization import Linearization, LinearLeaf


def labels_of(linear: Linearization | None) -> Tensor | None:
    """The one column of labels, [rows] or [rows, m], beside outputs that are rows; None where it is another thing."""
    leaf, labels = (None, None) if linear is None else (linear.decisions, linear.centre.label_ids)
    fine = leaf is not None and isinstance(labels, np.ndarray) and labels.dtype.kind in "iufb" and labels.ndim in (1, 2)
    return torch.as_tensor(labels) if fine and len(labels) == len(leaf.outputs) else None


def classes_of(linear: Linearization | None) -> Tensor | None:
    """The labels where they are classes of the outputs: [rows] int64; None where they are something else."""
    labels = labels_of(linear)
    if labels is None or labels.dim() > 1 or labels.is_floating_point():
        return None
    count = num_classes(linear.decisions)
    return labels.long() if 0 <= int(labels.min()) and int(labels.max()) < count else None


def num_classes(leaf: LinearLeaf) -> int:
    """How many classes the outputs have as logits."""
    return two_sided(leaf.outputs[:1]).shape[1]
