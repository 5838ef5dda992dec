"""Evaluator: the metric of the model as it stands, on one data set, without disturbing the training around it."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from transformers import EvalPrediction
from transformers.trainer_pt_utils import EvalLoopContainer

from .errors import ConfigurationError
from .ledger import Ledger
from .metric import Metric
from .prefix_cache import PrefixCache, nbytes


class BatchOutput(NamedTuple):
    """What the model says of one batch: tensors or nested tuples of them; `loss` [batch], `inputs` on demand."""

    logits: Any
    labels: Any
    loss: Any = None
    inputs: Any = None


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Eval mode and no gradients inside; on leaving, every RNG and every module's mode is what it was."""
    modes = [(module, module.training) for module in model.modules()]
    devices = {parameter.device for parameter in model.parameters() if parameter.device.type != "cpu"}
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        # the model's own devices: other processes own the others
        with torch.random.fork_rng(devices), torch.no_grad():
            model.eval()
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        for module, mode in modes:
            module.training = mode


class Evaluator:
    """Predicts a data set and calls the metric once on all of it.

    Args:
        model: the bare model, without a distributed wrapper.
        predict: batch -> `BatchOutput`; runs the model.
        batches: makes a fresh iteration over the collated batches, always in the same order.
        metric: the black box.
        ledger: charged with the call and all seconds, forward passes included.
        max_bytes: memory for keeping batches (else they are collated anew each time) and, beyond those, the frozen
            prefix's outputs.
        concat: whether batches are joined, as with Trainer's `eval_do_concat_batches`; else the metric sees lists.
    """

    def __init__(
        self,
        model: nn.Module,
        predict: Callable[[Any], BatchOutput],
        batches: Callable[[], Iterable[Any]],
        metric: Metric,
        ledger: Ledger,
        max_bytes: float,
        concat: bool = True,
    ):
        self.model, self.predict, self.metric, self.ledger = model, predict, metric, ledger
        self.max_bytes, self.concat = max_bytes, concat
        self._batches, self._kept = batches, None
        self._prefix: PrefixCache | None = None

    def freeze(self, phi_names: tuple[str, ...], moved: Callable) -> None:
        """From now on nothing outside phi changes: replay the rest (see `PrefixCache`)."""
        with undisturbed(self.model):  # a loader draws its seed from the global RNG
            batches = self._kept_batches()
        if batches is not None:
            self._prefix = PrefixCache(self.model, phi_names, self.max_bytes - nbytes(batches), moved)

    def evaluate(self, purpose: str) -> float:
        """The metric at the present parameters, charged to `purpose`.

        Raises:
            MetricError: see `Metric`.
        """
        with self.ledger.charge(purpose), undisturbed(self.model):
            return self.metric(self.predictions())

    def predictions(self) -> EvalPrediction:
        """Predictions and labels of the whole set, as numpy arrays, in its order."""
        columns = {name: EvalLoopContainer(self.concat, padding_index=-100) for name in BatchOutput._fields}
        batches = self._kept_batches()
        for index, batch in enumerate(self._batches() if batches is None else batches):
            if self._prefix is None or batches is None:
                output = self.predict(batch)
            else:
                output = self._prefix.forward(index, lambda i: self.predict(batches[i]), len(batches))
            self._check_joinable(output.labels)
            for name, value in output._asdict().items():
                if value is not None:
                    columns[name].add(value)
        arrays = {name: column.get_arrays() for name, column in columns.items()}
        if arrays["logits"] is None:
            raise ConfigurationError(
                "The set on which the metric is observed is empty, or the model returns no logits."
            )
        return EvalPrediction(arrays["logits"], arrays["labels"], inputs=arrays["inputs"], losses=arrays["loss"])

    def _check_joinable(self, labels: Any) -> None:
        """Batches of lists of dicts would be joined row by row, the first image with the first, and say nothing."""
        if self.concat and isinstance(labels, (list, tuple)) and any(isinstance(row, Mapping) for row in labels):
            raise ConfigurationError(
                "The labels are a dict per example, as of object detection, which cannot be joined over batches: set "
                "eval_do_concat_batches=False. The metric then gets lists of batches."
            )

    def _kept_batches(self) -> list[Any] | None:
        """The collated batches if they fit into memory, else None."""
        if self._kept is None:
            kept, size = [], 0
            for batch in self._batches():
                kept.append(batch)
                size += nbytes(batch)
                if size > self.max_bytes:
                    self._kept = False
                    break
            else:
                self._kept = kept
        return self._kept or None
