"""Outputs and labels as rows, of whole predictions and of training batches alike; and guides that read them."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import EvalPrediction

from ..value.behaviour import CLASSES, IDENTITIES, NUMBERS
from .base import Guide, GuideContext, Round

logger = logging.getLogger(__name__)

IGNORED = -100  # label of what the loss leaves out


class Unreadable(Exception):
    """Outputs and labels are no rows; the message says why."""


@dataclass(frozen=True)
class Rows:
    """Outputs and labels of n examples (of a classification of tokens: of n tokens).

    Attributes:
        outputs: [n, c] float32.
        labels: "classes": [n] int64 below c; "numbers": [n, m] float32; "identities": [n] int64, of which equal ones
            belong together (embeddings).
        kind: which of these.
    """

    outputs: Tensor
    labels: Tensor
    kind: str

    def __len__(self) -> int:
        return len(self.outputs)


def of_prediction(prediction: EvalPrediction, kind: str | None = None) -> Rows:
    """The rows of a prediction: its first array of outputs, and its first of labels.

    Args:
        kind: of the labels; None: as they look.

    Raises:
        Unreadable: it holds something else.
    """
    outputs, labels = _joined(prediction.predictions), _joined(prediction.label_ids)
    if not isinstance(outputs, np.ndarray) or not isinstance(labels, np.ndarray):
        raise Unreadable("predictions and labels are no arrays")
    return _rows(torch.as_tensor(outputs), torch.as_tensor(labels), kind)


def of_batch(inputs: Mapping[str, Any], outputs: Any, kind: str) -> tuple[Rows, Tensor]:
    """The rows of a training batch, and the model's outputs as it gave them, of which the rows' are a function.

    Args:
        kind: which predictions are of; a batch has too few labels to tell.

    Raises:
        Unreadable: there is no such thing in the batch.
    """
    if isinstance(outputs, Mapping):
        outputs = [value for name, value in outputs.items() if name != "loss"]
    elif isinstance(outputs, (tuple, list)) and torch.is_tensor(outputs[0]) and not outputs[0].dim():
        outputs = outputs[1:]  # as Trainer: the loss comes first
    given = outputs
    while isinstance(given, (tuple, list)) and len(given):
        given = given[0]
    names = [name for name in inputs if name.startswith("label")]
    if not torch.is_tensor(given) or not names or not torch.is_tensor(inputs[names[0]]):
        raise Unreadable("a training batch holds no tensor of outputs, or none of labels")
    return _rows(given, inputs[names[0]].to(given.device), kind), given


def matched(term: Tensor, rows: Rows, at: Tensor, task_loss: Tensor, weight: float) -> Tensor:
    """`term` times the number that makes its gradient at the outputs `weight` times as long as the task's there.

    The number is no function of the outputs. Where the task's loss was computed from a copy of them (mixed precision)
    or from something else, cross-entropy stands for it, and of labels that are no classes a loss whose gradient is of
    length one at every example. Zero where `term` has no gradient, or one that is not finite.

    Args:
        at: the model's outputs, as `of_batch` returns them.
    """
    (ours,) = torch.autograd.grad(term, at, retain_graph=True)
    (task,) = torch.autograd.grad(task_loss, at, retain_graph=True, allow_unused=True)
    if task is None and rows.kind == CLASSES:
        (task,) = torch.autograd.grad(F.cross_entropy(rows.outputs, rows.labels), at, retain_graph=True)
    length = len(rows) ** -0.5 if task is None else task.float().norm()
    ratio = weight * length / ours.float().norm()
    return term * torch.where(ratio.isfinite(), ratio, torch.zeros_like(ratio))


def _joined(tree: Any) -> Any:
    """The first of a tuple; of a list, with a thing per batch (`eval_do_concat_batches=False`), all of them joined."""
    if isinstance(tree, tuple) and tree:
        return _joined(tree[0])
    if isinstance(tree, list) and tree:
        parts = [_joined(part) for part in tree]
        if all(isinstance(part, np.ndarray) and part.shape[1:] == parts[0].shape[1:] for part in parts):
            return np.concatenate(parts)
    return tree


def _rows(outputs: Tensor, labels: Tensor, kind: str | None) -> Rows:
    if not outputs.is_floating_point() or not outputs.dim() or not len(outputs):
        raise Unreadable("the outputs are no floating-point numbers")
    whole = not labels.is_floating_point()
    if whole and outputs.dim() > 1 and labels.shape == outputs.shape[:-1] and outputs.shape[-1] > 1:
        outputs, labels = outputs.reshape(-1, outputs.shape[-1]).float(), labels.reshape(-1).long()
        counted = labels != IGNORED
        if not counted.all():
            outputs, labels = outputs[counted], labels[counted]
        if kind is None:
            kind = CLASSES if len(labels) and 0 <= labels.min() and labels.max() < outputs.shape[1] else IDENTITIES
        if kind in (CLASSES, IDENTITIES):
            return Rows(outputs, labels, kind)
    if kind in (None, NUMBERS) and labels.dim() and len(labels) == len(outputs):
        return Rows(outputs.reshape(len(outputs), -1).float(), labels.reshape(len(labels), -1).float(), NUMBERS)
    raise Unreadable("the labels are not of as many rows as the outputs")


class ReadingGuide(Guide):
    """A guide that learns from outputs and labels, and speaks through the loss of a batch of them.

    Where they are none of its `kinds`, it switches itself off and says so.

    Args:
        scope, in_first_phase: see `Guide`; by default phi alone moves by it, in the metric phase.
    """

    wants_predictions = True
    kinds: tuple[str, ...]

    def __init__(self, scope: Literal["phi", "all"] = "phi", in_first_phase: bool = False):
        self.scope, self.in_first_phase = scope, in_first_phase

    def start(self, context: GuideContext) -> None:
        super().start(context)
        self.kind: str | None = None  # of the labels, once there were predictions

    @abstractmethod
    def predict_rows(self, rows: list[Rows]) -> np.ndarray | None:
        """[n] scores expected of n predictions, in any unit that rises with the metric; None before there is a fit."""

    @abstractmethod
    def learn_rows(self, rows: list[Rows], scores: np.ndarray, observed: Round) -> None:
        """Learn from n predictions and the metric on each, [n]."""

    def predict_round(self, observed: Round) -> np.ndarray | None:
        rows = self._read(observed)
        return self.predict_rows(rows) if rows else None

    def learn(self, observed: Round) -> None:
        if rows := self._read(observed):
            self.learn_rows(rows, observed.scores, observed)

    def read_batch(self, inputs: dict[str, Any], outputs: Any) -> tuple[Rows, Tensor] | None:
        """See `of_batch`; None, and off, where it cannot be read, and None of one without a label."""
        try:
            rows, at = of_batch(inputs, outputs, self.kind)
        except Unreadable as error:
            self._give_up(str(error))
            return None
        return (rows, at) if len(rows) else None

    def _read(self, observed: Round) -> list[Rows]:
        try:
            rows = [of_prediction(prediction, self.kind) for prediction in observed.predictions or ()]
            if rows and rows[0].kind not in self.kinds:
                raise Unreadable(f"the labels are {rows[0].kind}, and it knows of {' and '.join(self.kinds)}")
        except Unreadable as error:
            self._give_up(str(error))
            return []
        if rows:
            self.kind = rows[0].kind
        return rows

    def _give_up(self, why: str) -> None:
        if self.off is None:
            logger.warning(f"{type(self).__name__} cannot guide this run: {why}. Training goes on with the loss alone.")
            self.switch_off(why)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "kind": self.kind}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.kind = state["kind"]
