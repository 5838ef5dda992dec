"""Row moves: the worth of each row's decision to the metric, from calls in which one row alone is decided otherwise.

The value function V(z) = sum over rows i and classes c of worth[i, c] * softmax(outputs_i(z))_c is differentiable, and
on a linearization its gradient needs no further call. Such calls recover labels from the black box: for an accuracy,
the class that raises the metric is the label. So this guide uses the metric like a labelled set, although it reads no
label itself.

Nearest to it are metric-optimised example weights (Zhao et al., ICML 2019) and FWEG (Hiranandani et al., ICML 2021):
they elicit weights of training examples, or of groups of them, from a black-box metric; here every observed row has its
own.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten
from transformers import EvalPrediction

from ..linear.linearization import Linearization
from ..linear.local_metric import LocalMetric
from .base import Guide, GuideContext

NOISE = 0.3  # on the logits, so that decisions near the boundary count with either side
DECAY = 0.9  # factor on the findings of earlier updates
KNOWN = 1e-3  # a count that has decayed below this is as good as none


class RowMovesGuide(Guide):
    """Follows the gradient of the worth of the rows' decisions.

    Rows with the same labels and the same decision are exchangeable for a metric that looks at nothing else, so that
    one call serves them all.
    """

    def start(self, context: GuideContext) -> None:
        super().start(context)
        self.worth = np.zeros((0, 0))  # [rows, classes] sums of effects
        self.count = np.zeros((0, 0))  # [rows, classes] number of effects in each sum
        self.linear: Linearization | None = None
        self.kinds = np.zeros(0, int)  # of the rows of `linear`: equal for equal labels
        self.paid = 0.0  # updates for which calls were made in advance

    def applies(self, metric: LocalMetric) -> bool:
        """Whether the metric is one of decisions: it stays the same if one-hot decisions replace the logits."""
        linear = metric.linearization
        if linear is None or metric.on_all_rows or linear.decisions is None or not _labels(linear.centre):
            return False
        logits = two_sided(linear.decisions.outputs)
        decided = torch.nn.functional.one_hot(logits.argmax(1), logits.shape[1]).float() * 2 - 1
        as_they_are, decided = metric.values_of(lambda i: _planted(linear, (logits, decided)[i]), 2)
        return bool(np.isclose(as_they_are, decided))

    def fit(self, metric: LocalMetric, z: Tensor) -> None:
        """Learn from row moves. If these take more calls than an update may make, one update makes them for several."""
        linear = metric.linearization
        assert linear is not None and linear.decisions is not None  # else it does not apply
        if self.linear is not linear:
            self.linear, self.kinds, self.paid = linear, _kinds(linear.centre), 0.0
        if self.paid >= 1:
            self.paid -= 1
            return
        metric.halve()
        logits = two_sided(linear.decisions.at(z))
        if self.worth.shape != logits.shape:
            self.worth, self.count = np.zeros(logits.shape), np.zeros(logits.shape)
        rows = np.arange(len(logits)) if metric.rows is None else metric.rows
        seen = logits[torch.as_tensor(rows)]
        seen = seen + NOISE * torch.randn(seen.shape, generator=self.context.generator)
        effects, known, calls = self._effects(metric, metric.part or linear, rows, seen)
        self.paid = calls / max(1.0, metric.share) - 1
        self.worth *= DECAY
        self.count *= DECAY
        self.worth[rows] += effects
        self.count[rows] += known

    def _effects(
        self, metric: LocalMetric, part: Linearization, rows: np.ndarray, logits: Tensor
    ) -> tuple[np.ndarray, np.ndarray, int]:
        """([rows, classes] change of the metric if that row alone is decided so, [rows, classes] whether it is known,
        calls that would find all of them)."""
        classes = logits.shape[1]
        decisions = logits.argmax(1).numpy()
        keys = self.kinds[rows] * classes + decisions
        _, first, kind, sizes = np.unique(keys, return_index=True, return_inverse=True, return_counts=True)
        moves = [(row, other) for row in first for other in range(classes) if other != decisions[row]]
        calls = len(moves) + 1
        if calls > metric.remaining:
            drawn = torch.randperm(len(moves), generator=self.context.generator).numpy()
            count = np.array([self.count[rows[row], other] for row, other in moves])
            known = count / np.repeat(sizes, classes - 1)  # first the moves that are known least, of most rows
            most = max(1, int(metric.remaining) - 1)
            moves = [moves[i] for i in drawn[np.argsort(known[drawn], kind="stable")][:most]]

        def moved(i: int) -> EvalPrediction:
            if i == 0:
                return _planted(part, logits)
            row, other = moves[i - 1]
            changed, own = logits.clone(), decisions[row]
            changed[row, [own, other]] = logits[row, [other, own]]
            return _planted(part, changed)

        values = metric.values_of(moved, len(moves) + 1)
        effects, known = np.zeros((len(first), classes)), np.zeros((len(first), classes))
        place = {row: i for i, row in enumerate(first)}
        for (row, other), change in zip(moves, np.nan_to_num(values[1:] - values[0]), strict=True):
            effects[place[row], other] = change
            known[place[row], other] = 1
        known[np.arange(len(first)), decisions[first]] = 1  # its own decision changes nothing
        return effects[kind], known[kind], calls

    def gradient(self, z: Tensor) -> Tensor:
        leaf = None if self.linear is None else self.linear.decisions
        if leaf is None or not self.worth.any():
            return torch.zeros(self.context.dim)
        known = torch.as_tensor(self.count > KNOWN)
        worth = torch.as_tensor(self.worth / np.maximum(self.count, KNOWN), dtype=torch.float32)
        best = worth.masked_fill(~known, -torch.inf).max(1)
        others = known & ~torch.nn.functional.one_hot(best.indices, worth.shape[1]).bool()
        mean = (worth * others).sum(1) / others.sum(1).clamp_min(1)
        weight = torch.where(others.any(1), best.values - mean, 0.0)  # against the mean of the others that are known
        outputs = leaf.at(z)
        target = torch.nn.functional.one_hot(best.indices, worth.shape[1]).float()
        # gradient of the cross-entropy towards each row's best class, weighted by the worth of that class
        slope = (target - two_sided(outputs).softmax(1)) * (weight / weight.sum().clamp_min(1e-30))[:, None]
        one = outputs.dim() < 2 or outputs.shape[1] == 1
        return leaf.pull(slope[:, 1].reshape(outputs.shape) if one else slope)

    def state_dict(self) -> dict[str, Any]:
        if not self.worth.size:
            return {}
        return {"worth": torch.as_tensor(self.worth), "count": torch.as_tensor(self.count)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state:
            self.worth, self.count = state["worth"].numpy(), state["count"].numpy()


def two_sided(outputs: Tensor) -> Tensor:
    """Logits, [rows, classes]; of one logit per row, 0 and that logit."""
    if outputs.dim() == 2 and outputs.shape[1] > 1:
        return outputs
    one = outputs.reshape(-1)
    return torch.stack([torch.zeros_like(one), one], 1)


def _planted(linear: Linearization, logits: Tensor) -> EvalPrediction:
    """Predictions with these logits, [rows, classes] as `two_sided` has them."""
    ((position, leaf),) = linear.leaves.items()
    outputs = leaf.outputs
    if not (outputs.dim() == 2 and outputs.shape[1] > 1):
        logits = (logits[:, 1] - logits[:, 0]).reshape(outputs.shape)
    return linear.planted({position: logits})


def _labels(prediction: EvalPrediction) -> list[np.ndarray]:
    """All label columns, where each has an entry per row; else none."""
    columns = tree_flatten(prediction.label_ids)[0] if prediction.label_ids is not None else []
    fine = all(isinstance(column, np.ndarray) and column.ndim for column in columns)
    return columns if fine and len({len(column) for column in columns}) == 1 else []


def _kinds(prediction: EvalPrediction) -> np.ndarray:
    """[rows] whole numbers, the same for rows with the same labels."""
    columns = np.column_stack([column.reshape(len(column), -1) for column in _labels(prediction)])
    return np.unique(columns, axis=0, return_inverse=True)[1].reshape(-1)
