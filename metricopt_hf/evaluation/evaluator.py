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
from .answer import Score, values_of
from .ledger import Ledger
from .metric import Metric
from .prefix_cache import PrefixCache, nbytes
from .together import Together, chunk_size, worthwhile

NOTHING = (
    "The set on which the metric is observed is empty, or the model returns no logits. Look at "
    'len(observation_dataset), and let forward return {"loss": loss, "logits": logits}.'
)


# a point's number, its score (nan where the call failed), why it failed, seconds, those of the call, its predictions
Taken = tuple[int, float, str | None, float, float, EvalPrediction | None]


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
        raw: [n, m] the numbers of its `keys` beside it.
        errors: [n] why it failed; None where it did not.
        seconds: [n] that the forward pass and the call took.
        call_seconds: [n] of these, the call's; with predictions only, else all.
        predictions: [n] predictions and labels, where they were asked for; else None.
    """

    values: np.ndarray
    raw: np.ndarray
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
        self._data = self._make_data(phi.model, predict, batches, max_bytes, concat, accumulation_steps)

    def _make_data(self, *args) -> _Data:
        return _Data(*args)

    def freeze(self, moved: Callable[[], AbstractContextManager]) -> None:
        """From now on nothing outside phi changes: replay the rest (see `PrefixCache`).

        Args:
            moved: context inside which phi is another one.
        """
        self._data.freeze(self.phi, moved)

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
        if not self._finite():
            self.ledger.add(purpose, 1, 0.0, passes=1)
            raise self._not_finite()
        if self.rank == 0:
            with self.ledger.charge(purpose, passes=1), undisturbed(self.phi.model):
                try:
                    outcome = [self._score(complete=complete)]
                except MetricError as error:
                    outcome = [error]
        else:
            self._accompany()
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
            for point, together in zip(points, self._together(points), strict=True):
                self.phi.write(point)
                made.append(self.predictions() if together is None else together)
        return made

    def _together(self, points: Tensor) -> Iterator[EvalPrediction | None]:
        """Predictions at each of the points, several of which are computed in one pass; None: not made here."""
        done = 0
        while done < len(points):
            with undisturbed(self.phi.model), self.phi.restored():
                made = self._data.predictions_at(points[done:])
            if not made:
                break
            done += len(made)
            yield from made
        yield from [None] * (len(points) - done)

    def evaluate_many(self, points: Tensor, purpose: str, predictions: bool = False) -> Scores:
        """The metric at other phi, with phi left as it was.

        Args:
            points: [n, d].
            purpose: what the n calls are charged to.
            predictions: whether to return them too.
        """
        count = len(points)
        taken: list[Taken] = []
        turns = range(self.rank, count + -count % self.world_size, self.world_size)  # as many on every rank
        together = self._together(points[[i for i in turns if i < count]])
        with self.phi.restored():
            for i in tqdm(turns, desc="observing the metric", leave=False, delay=3, disable=not self.progress):
                self.phi.write(points[min(i, count - 1)])
                if i >= count:
                    self._accompany()
                    continue
                taken.append(self._observed(i, purpose, predictions, together))
        return self._shared(taken, purpose, predictions)

    def _observed(
        self, i: int, purpose: str, predictions: bool, together: Iterator[EvalPrediction | None]
    ) -> Taken:
        """The metric at the present phi, which is point `i`; `together` has its predictions, or None."""
        score, error = self._failed, None
        start = called = perf_counter()
        with self.ledger.charge(purpose, passes=1), undisturbed(self.phi.model):
            prediction = next(together, None)
            if predictions and prediction is None:  # copies, for they may be views of kept batches, or of phi itself
                prediction = copy.deepcopy(self._data.predictions())
            if prediction is not None:
                called = perf_counter()
            try:
                if not self._finite():
                    raise self._not_finite()
                score = self._score(prediction)
            except MetricError as failure:
                error = str(failure)
        end = perf_counter()
        return i, score, error, end - start, end - called, prediction if predictions else None

    def _shared(self, taken: list[Taken], purpose: str, predictions: bool) -> Scores:
        """What all ranks have taken, in order."""
        if self.world_size > 1:
            others = [entry for entry in gather_object(taken) if entry[0] % self.world_size != self.rank]
            self.ledger.add(purpose, len(others), sum(entry[3] for entry in others), len(others))
            taken = taken + others
        taken = sorted(taken, key=lambda entry: entry[0])
        _, values, errors, seconds, of_calls, predicted = zip(*taken, strict=True)
        predicted = predicted if predictions else None
        raw = np.array([values_of(value) for value in values]).reshape(len(taken), len(self.metric.keys))
        return Scores(np.array(values), raw, errors, np.array(seconds), np.array(of_calls), predicted)

    @property
    def _failed(self) -> Score:
        """In place of what a call that failed did not answer."""
        return Score("nan", [np.nan] * len(self.metric.keys))

    def _accompany(self) -> None:
        """What a rank does while another one's score is asked for: a model's loss may wait for all of them."""
        self.predictions()

    def _finite(self) -> bool:
        return bool(self.phi.read().isfinite().all())

    def _not_finite(self) -> MetricError:
        return MetricError(
            f"phi is not finite, so the metric {self.metric.name!r} is not asked: a loss of nan or infinity has "
            "moved it. What was selected before stays. Look for a division by zero in the loss, or lower "
            "learning_rate and phi_learning_rate."
        )

    def _score(self, prediction: EvalPrediction | None = None, complete: Callable | None = None) -> float:
        """The metric at the present phi; `prediction`: the model's, where it is there already."""
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
        self._many: Together | None = None

    def freeze(self, phi: PhiSpace, moved: Callable[[], AbstractContextManager]) -> None:
        with undisturbed(self.model):  # a loader draws its seed from the global RNG
            batches = self._kept_batches()
        if batches is not None:
            on_cpu = next(self.model.parameters()).device.type == "cpu"  # else outputs are kept in another memory
            room = self.max_bytes - nbytes(batches) * on_cpu
            self._prefix = PrefixCache(self.model, phi.names, room, moved)
            self._many = Together(phi, self._on_copy)

    def predictions(self) -> EvalPrediction:
        return self._joined(self._outputs())

    def predictions_at(self, points: Tensor) -> list[EvalPrediction]:
        """At the first of the points [n, d], as many as are computed in one pass; none where that cannot be."""
        kept = self._prefix and self._kept and self._prefix.kept_bytes(len(self._kept))
        if not kept or len(points) < 2 or not worthwhile(points.device):
            return []
        batches = self._kept
        if not self._many.works(points, lambda run: self._prefix.forward(0, run, batches)):
            return []
        try:
            run = self._many.at(points[: chunk_size(kept, points.device)])
            made = [self._prefix.forward(index, run, batches) for index in range(len(batches))]
        except torch.OutOfMemoryError:
            self._many.give_up()
            return []
        return [self._joined(outputs) for outputs in zip(*made, strict=True)]

    def _joined(self, outputs: Iterable[BatchOutput]) -> EvalPrediction:
        columns = {name: EvalLoopContainer(self.concat, padding_index=-100) for name in BatchOutput._fields}
        for count, output in enumerate(outputs, 1):
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
        for index, batch in enumerate(batches):
            yield self._on_copy(batch) if self._prefix is None else self._prefix.forward(index, self._on_copy, batches)

    def _on_copy(self, batch: Any) -> BatchOutput:
        """Of a kept batch: whoever predicts may take columns out, or write to them."""
        return self.predict(copy.deepcopy(batch))

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
