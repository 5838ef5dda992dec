"""Evaluator: the metric at points of phi, on one data set, without disturbing the training around it.

Whoever asks for scores does not know how they are computed: here point by point, dealt out to the ranks in turn.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import EvalPrediction
from transformers.trainer_pt_utils import EvalLoopContainer

from ..errors import ConfigurationError, MetricError
from ..phi import PhiSpace
from .ledger import Ledger
from .metric import Metric
from .prefix_cache import PrefixCache, nbytes

NOTHING = (
    "The set on which the metric is observed is empty, or the model returns no logits. Look at "
    'len(observation_dataset), and let forward return {"loss": loss, "logits": logits}.'
)


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


@dataclass(frozen=True)
class Scores:
    """What `Evaluator.evaluate_many` answers for n points, the same on every rank.

    Attributes:
        values: [n] the metric; nan where the call failed.
        errors: [n] why it failed; None where it did not.
        seconds: [n] that the forward pass and the call took.
        call_seconds: [n] of these, the call's; with predictions only, else all.
        predictions: [n] predictions and labels, where they were asked for; else None.
    """

    values: np.ndarray
    errors: Sequence[str | None]
    seconds: np.ndarray
    call_seconds: np.ndarray
    predictions: Sequence[EvalPrediction] | None = None


class Evaluator:
    """Predicts a data set and calls the metric on it.

    Args:
        phi: what is moved, and put back.
        predict: batch -> `BatchOutput`; runs the model. It must not wait for other ranks.
        batches: makes a fresh iteration over the data set's collated batches, always in the same order.
        metric: the black box.
        ledger: charged with the calls and all seconds, forward passes included.
        max_bytes: memory for keeping batches (else they are collated anew each time) and, beyond those, the frozen
            prefix's outputs.
        concat: whether batches are joined, as with Trainer's `eval_do_concat_batches`; else the metric sees lists.
        rank, world_size: this process, and how many there are.
        progress: whether to show a bar for evaluations that take more than a few seconds.
        complete: what the metric is given instead of the predictions; see `Metric.__call__`.
        accumulation_steps: batches after which predictions are moved to the CPU, as with Trainer's
            `eval_accumulation_steps`; None: all at once at the end.
    """

    def __init__(
        self,
        phi: PhiSpace,
        predict: Callable[[Any], BatchOutput],
        batches: Callable[[], Iterable[Any]],
        metric: Metric,
        ledger: Ledger,
        max_bytes: float,
        concat: bool = True,
        rank: int = 0,
        world_size: int = 1,
        progress: bool = False,
        complete: Callable[[EvalPrediction], EvalPrediction] | None = None,
        accumulation_steps: int | None = None,
    ):
        self.phi, self.metric, self.ledger = phi, metric, ledger
        self.rank, self.world_size, self.progress, self.concat = rank, world_size, progress, concat
        self.complete = complete
        self._data = _Data(phi.model, predict, batches, max_bytes, concat, accumulation_steps)

    def freeze(self, moved: Callable[[], AbstractContextManager]) -> None:
        """From now on nothing outside phi changes: replay the rest (see `PrefixCache`).

        Args:
            moved: context inside which phi is another one.
        """
        self._data.freeze(self.phi.names, moved)

    def predictions(self) -> EvalPrediction:
        """Predictions and labels at the present phi, as numpy arrays, in the data set's order."""
        with undisturbed(self.phi.model):
            return self._data.predictions()

    def evaluate(self, purpose: str, complete: Callable | None = None) -> float:
        """The metric at the present phi, charged to `purpose`. All ranks predict, and rank 0 calls the metric.

        Args:
            complete: what the metric is given instead of the predictions, other than the usual `complete`.

        Raises:
            MetricError: see `Metric`; the same on every rank.
        """
        outcome: list[Any] = [None]
        if self.rank == 0:
            with self.ledger.charge(purpose, passes=1), undisturbed(self.phi.model):
                try:
                    outcome = [self._score(complete=complete)]
                except MetricError as error:
                    outcome = [error]
        else:  # nobody predicts behind a test of its rank: a model's loss may wait for all of them
            self.predictions()
            self.ledger.add(purpose, 1, 0.0, passes=1)
        if self.world_size > 1:
            broadcast_object_list(outcome)
        if isinstance(outcome[0], MetricError):
            raise outcome[0]
        return outcome[0]

    def predict_many(self, points: Tensor) -> list[EvalPrediction]:
        """Predictions and labels at other phi: points [n, d], on every rank all of them; nothing is charged."""
        with self.phi.restored():
            made = []
            for point in points:
                self.phi.write(point)
                made.append(self.predictions())
        return made

    def evaluate_many(self, points: Tensor, purpose: str, predictions: bool = False) -> Scores:
        """The metric at other phi, with phi left as it was.

        Args:
            points: [n, d].
            purpose: what the n calls are charged to.
            predictions: whether to return them too.
        """
        count = len(points)
        taken: list[tuple[int, float, str | None, float, float, EvalPrediction | None]] = []
        turns = range(self.rank, count + -count % self.world_size, self.world_size)  # as many on every rank
        with self.phi.restored():
            for i in tqdm(turns, desc="observing the metric", leave=False, delay=3, disable=not self.progress):
                self.phi.write(points[min(i, count - 1)])
                if i >= count:
                    self.predictions()
                    continue
                score, error, prediction = float("nan"), None, None
                start = called = perf_counter()
                with self.ledger.charge(purpose, passes=1), undisturbed(self.phi.model):
                    if predictions:  # copies, for they may be views of kept batches, or of phi itself
                        prediction = copy.deepcopy(self._data.predictions())
                        called = perf_counter()
                    try:
                        score = self._score(prediction)
                    except MetricError as failure:
                        error = str(failure)
                end = perf_counter()
                taken.append((i, score, error, end - start, end - called, prediction))
        if self.world_size > 1:
            others = [entry for entry in gather_object(taken) if entry[0] % self.world_size != self.rank]
            self.ledger.add(purpose, len(others), sum(entry[3] for entry in others), len(others))
            taken += others
        taken.sort(key=lambda entry: entry[0])
        _, values, errors, seconds, of_calls, predicted = zip(*taken, strict=True)
        predicted = predicted if predictions else None
        return Scores(np.array(values), errors, np.array(seconds), np.array(of_calls), predicted)

    def _score(self, prediction: EvalPrediction | None = None, complete: Callable | None = None) -> float:
        """The metric at the present phi; `prediction`: the model's, where it is there already."""
        if not self.phi.read().isfinite().all():
            raise MetricError(
                f"phi is not finite, so the metric {self.metric.name!r} is not asked: a loss of nan or infinity has "
                "moved it. What was selected before stays. Look for a division by zero in the loss, or lower "
                "learning_rate and phi_learning_rate."
            )
        complete = complete or self.complete
        if prediction is None and self.metric.batchwise and complete is None:
            return self.metric.over(self._data.each())
        return self.metric(self._data.predictions() if prediction is None else prediction, complete)


class _Data:
    """A data set: its batches, kept where there is room, and its predictions."""

    def __init__(
        self,
        model: nn.Module,
        predict: Callable,
        batches: Callable,
        max_bytes: float,
        concat: bool,
        accumulation_steps: int | None,
    ):
        self.model, self.predict, self.max_bytes, self.concat = model, predict, max_bytes, concat
        self.accumulation_steps = accumulation_steps
        self._batches, self._kept = batches, None
        self._prefix: PrefixCache | None = None

    def freeze(self, phi_names: tuple[str, ...], moved: Callable[[], AbstractContextManager]) -> None:
        with undisturbed(self.model):  # a loader draws its seed from the global RNG
            batches = self._kept_batches()
        if batches is not None:
            self._prefix = PrefixCache(self.model, phi_names, self.max_bytes - nbytes(batches), moved)

    def predictions(self) -> EvalPrediction:
        columns = {name: EvalLoopContainer(self.concat, padding_index=-100) for name in BatchOutput._fields}
        for count, output in enumerate(self._outputs(), 1):
            self._check_joinable(output.labels)
            for name, value in output._asdict().items():
                if value is not None:
                    columns[name].add(value)
            if self.accumulation_steps and count % self.accumulation_steps == 0:
                for column in columns.values():
                    column.to_cpu_and_numpy()
        arrays = {name: column.get_arrays() for name, column in columns.items()}
        if arrays["logits"] is None:
            raise ConfigurationError(NOTHING)
        return EvalPrediction(arrays["logits"], arrays["labels"], inputs=arrays["inputs"], losses=arrays["loss"])

    def each(self) -> Iterator[EvalPrediction]:
        """Predictions and labels batch by batch, as tensors where the model is."""
        batch = None
        for batch in self._outputs():
            yield EvalPrediction(batch.logits, batch.labels, inputs=batch.inputs, losses=batch.loss)
        if batch is None or batch.logits is None:
            raise ConfigurationError(NOTHING)

    def _outputs(self) -> Iterator[BatchOutput]:
        batches = self._kept_batches()
        if batches is None:
            yield from map(self.predict, self._batches())
            return

        def run(index: int) -> BatchOutput:  # on a copy: whoever predicts may take columns out, or write to them
            return self.predict(copy.deepcopy(batches[index]))

        for index in range(len(batches)):
            yield run(index) if self._prefix is None else self._prefix.forward(index, run, len(batches))

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
