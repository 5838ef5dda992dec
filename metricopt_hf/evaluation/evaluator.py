"""Evaluator: predictions and the metric at points of phi, on one data set, without disturbing the training."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from itertools import chain, islice
from operator import itemgetter
from time import perf_counter
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from transformers import EvalPrediction
from transformers.trainer_pt_utils import EvalLoopContainer

from ..errors import ConfigurationError, MetricError
from ..phi import PhiSpace
from ..phi.space import is_sharded, reshard
from .ledger import Ledger
from .metric import Metric
from .prefix_cache import PrefixCache, nbytes

T = TypeVar("T")

NOTHING = (
    "The set on which the metric is observed is empty, or the model returns no logits. Look at "
    'len(observation_dataset), and let forward return {"loss": loss, "logits": logits}.'
)


class BatchOutput(NamedTuple):
    """The model's outputs for one batch: tensors or nested tuples of them; `loss` [batch], `inputs` on demand."""

    logits: Any
    labels: Any
    loss: Any = None
    inputs: Any = None


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Eval mode and no gradients inside; on leaving, every RNG and every module's mode is as before."""
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
    """Predicts a data set and calls the metric on it.

    On several ranks each predicts a share of the batches and all get all of them; the first calls the metric.
    `row_groups` is the place among the label columns of the one whose equal rows stay together in random halves.

    Args:
        phi: the numbers that are tuned.
        predict: batch -> `BatchOutput`; runs the model. It must not wait for other ranks.
        batches: makes a fresh iteration over the data set's collated batches, always in the same order. If it has
            `batch_sizes`, these say how many examples each of them has; see `rows`.
        metric: the black box.
        ledger: charged with the calls and all seconds, forward passes included.
        max_bytes: memory for keeping batches (else they are collated anew each time) and, beyond those, the frozen
            prefix's outputs.
        concat: whether batches are joined, as with Trainer's `eval_do_concat_batches`; else the metric sees lists.
        rank, world_size: this process, and how many there are.
        complete: maps predictions to the metric's input; see `Metric.__call__`.
        accumulation_steps: batches after which predictions are moved to the CPU, as with Trainer's
            `eval_accumulation_steps`; None: all at once at the end.

    Attributes:
        call_seconds: duration of the last metric call, without the pass.
    """

    row_groups: int | None = None

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
        complete: Callable[[EvalPrediction], EvalPrediction] | None = None,
        accumulation_steps: int | None = None,
    ):
        self.phi, self.metric, self.ledger, self.concat = phi, metric, ledger, concat
        self.rank, self.world_size, self.complete = rank, world_size, complete
        self.predict, self._batches, self._max_bytes = predict, batches, max_bytes
        self.batch_sizes: tuple[int, ...] | None = getattr(batches, "batch_sizes", None)
        self._accumulation_steps, self.call_seconds = accumulation_steps, 0.0
        self._kept: list[Any] | bool | None = None  # the batches; False: they are too many
        self._prefix: PrefixCache | None = None

    def freeze(self, moved: Callable[[], AbstractContextManager]) -> None:
        """Nothing outside phi changes from now on: replay the modules before phi (see `PrefixCache`).

        Args:
            moved: context inside which phi is another one.
        """
        if is_sharded(self.phi.model):
            return  # ranks that skip other modules than the rest would wait for each other
        if self._prefix is not None:
            self._kept = None  # some inputs are gone
        with undisturbed(self.phi.model):  # a loader draws its seed from the global RNG
            batches = self._kept_batches()
        if batches is not None:
            on_cpu = next(self.phi.model.parameters()).device.type == "cpu"  # else outputs are kept in another memory
            room = self._max_bytes - nbytes(batches) * on_cpu

            def collate(index: int) -> Any:
                return next(islice(self._batches(), index, None))

            self._prefix = PrefixCache(self.phi.model, self.phi.names, room, moved, collate)

    def predictions(self) -> EvalPrediction:
        """Predictions and labels at the present phi, as numpy arrays, in the data set's order."""
        with undisturbed(self.phi.model):
            return self.joined(output for _, output in self.outputs())

    def evaluate(self, purpose: str, complete: Callable | None = None) -> float:
        """The metric at the present phi, charged to `purpose`; the same on every rank.

        Args:
            complete: another map to the metric's input than the usual `complete`.

        Raises:
            MetricError: see `Metric`.
        """
        return self.evaluate_with_predictions(purpose, complete)[0]

    def evaluate_with_predictions(
        self, purpose: str, complete: Callable | None = None
    ) -> tuple[float, EvalPrediction | None]:
        """The same, and the predictions it is of; None of a metric that comes batch by batch."""
        with self.ledger.charge(purpose, passes=1):
            self._check_finite()
            complete = complete or self.complete
            if self.metric.batchwise and complete is None:
                with undisturbed(self.phi.model):
                    batches = self._each() if self.world_size == 1 else list(self._each())
                    return agreed(self.rank, self.world_size, lambda: self.metric.over(batches)), None
            prediction = self.predictions()

            def call() -> tuple[float, float]:
                start = perf_counter()
                return self.metric(prediction, complete), perf_counter() - start

            score, self.call_seconds = agreed(self.rank, self.world_size, call)
            return score, prediction

    def _check_finite(self) -> None:
        if not all(bool(parameter.isfinite().all()) for parameter in self.phi.parameters):
            raise MetricError(
                f"phi is not finite, so the metric {self.metric.name!r} is not asked: a loss of nan or infinity has "
                "moved it. What was selected before stays. Look for a division by zero in the loss, or lower "
                "learning_rate and phi_learning_rate."
            )

    def value(self, prediction: EvalPrediction, purpose: str) -> float:
        """The metric of predictions, on this rank alone: greater is better; nan where it fails."""
        with self.ledger.charge(purpose):
            return self.metric.value(prediction, self.complete)

    def outputs(
        self, run: Callable[[Any], Any] | None = None, share: Callable[[Any], Any] = lambda result: result
    ) -> Iterator[tuple[int, Any]]:
        """Batch by batch, in order, (index, what `run` makes of it); every rank runs a share and gets all.

        Args:
            run: batch -> result, which runs the model; default: `predict`.
            share: result -> what of it all ranks get; called once for each batch, on the rank that has run it.

        Raises:
            RuntimeError: a batch failed on another rank.
        """
        numbered, of = self._numbered(run or self.predict)
        if self.world_size == 1:
            yield from ((index, share(of(index, batch))) for index, batch in numbered)
            return
        pairs = everywhere(self.rank, self.world_size, lambda: self._own(numbered, of, share))
        yield from sorted(chain(*pairs), key=itemgetter(0))

    def first(self, run: Callable[[Any], Any] | None = None) -> Any:
        """What `run` makes of the first batch, by this rank alone."""
        numbered, of = self._numbered(run or self.predict)
        return of(*next(numbered))

    def _numbered(self, run: Callable[[Any], Any]) -> tuple[Iterator[tuple[int, Any]], Callable[[int, Any], Any]]:
        """The batches with their indices, and `run` of them; what is kept of batches and of the prefix is used."""

        def on_copy(batch: Any) -> Any:  # whoever predicts may take columns out, or write to them
            return run(copy.deepcopy(batch))

        batches = self._kept_batches()

        def of(index: int, batch: Any) -> Any:
            self.ledger.move_bar(batches=1)
            if batches is None:
                return run(batch)
            return on_copy(batch) if self._prefix is None else self._prefix.forward(index, on_copy, batches)

        return iter(enumerate(self._batches() if batches is None else batches)), of

    def _own(
        self, numbered: Iterator[tuple[int, Any]], of: Callable[[int, Any], Any], share: Callable[[Any], Any]
    ) -> list[tuple[int, Any]]:
        """As many runs on every rank, as a sharded model needs: who has no batch left takes part with the last one."""
        mine: list[tuple[int, Any]] = []
        round_of: list[tuple[int, Any]] = []

        def run(last: tuple[int, Any]) -> None:
            own = round_of[self.rank] if self.rank < len(round_of) else None
            output = of(*(own or last))
            if own is not None:
                mine.append((own[0], share(tree_map_only(Tensor, lambda tensor: tensor.cpu(), output))))
            round_of.clear()

        for pair in numbered:
            round_of.append(pair)
            if len(round_of) == self.world_size:
                run(pair)
        if round_of:
            run(round_of[-1])
        reshard(self.phi.model)
        return mine

    def joined(self, outputs: Iterable[BatchOutput]) -> EvalPrediction:
        """Batches joined as Trainer joins them, or listed."""
        columns = {name: EvalLoopContainer(self.concat, padding_index=-100) for name in BatchOutput._fields}
        for count, output in enumerate(outputs, 1):
            self._check_joinable(output.labels)
            for name, value in output._asdict().items():
                if value is not None:
                    columns[name].add(value)
            if self._accumulation_steps and count % self._accumulation_steps == 0:
                for column in columns.values():
                    column.to_cpu_and_numpy()
        arrays = {name: column.get_arrays() for name, column in columns.items()}
        if arrays["logits"] is None:
            raise ConfigurationError(NOTHING)
        return EvalPrediction(arrays["logits"], arrays["labels"], inputs=arrays["inputs"], losses=arrays["loss"])

    def _each(self) -> Iterator[EvalPrediction]:
        """Predictions and labels batch by batch, as tensors where the model is."""
        batch = None
        for _, batch in self.outputs():
            yield EvalPrediction(batch.logits, batch.labels, inputs=batch.inputs, losses=batch.loss)
        if batch is None or batch.logits is None:
            raise ConfigurationError(NOTHING)

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
                if size > self._max_bytes:
                    self._kept = False
                    break
            else:
                self._kept = kept
        return self._kept if isinstance(self._kept, list) and self._kept else None


# What several ranks of a run must agree on, since a black box may answer otherwise the next time it is asked


def agreed(rank: int, world_size: int, compute: Callable[[], T]) -> T:
    """The result of `compute` on the first rank, on every rank.

    Raises:
        MetricError: it raised one there; the same on every rank.
    """
    outcome: list[Any] = [None]
    if rank == 0:
        try:
            outcome = [compute()]
        except MetricError as error:
            if world_size == 1:
                raise
            outcome = [error]
    if world_size > 1:
        broadcast_object_list(outcome)
    if isinstance(outcome[0], MetricError):
        raise outcome[0]
    return outcome[0]


def everywhere(rank: int, world_size: int, compute: Callable[[], T]) -> list[T]:
    """What `compute` gives on each rank, in order, on every rank.

    Raises:
        RuntimeError: it failed on another rank; where it failed, what it raised. So no rank waits for one that failed.
    """
    if world_size == 1:
        return [compute()]
    own, failed = None, None
    try:
        own = compute()
    except Exception as error:
        failed = error
    found = gather_object([(own, failed and f"{type(failed).__name__}: {failed}")])
    if failed is not None:
        raise failed
    if reasons := [reason for _, reason in found if reason is not None]:
        raise RuntimeError(f"On another rank: {reasons[0]}")
    return [value for value, _ in found]


def shared_out(rank: int, world_size: int, count: int, compute: Callable[[int], T]) -> list[T]:
    """`compute` of each of 0, ..., count - 1, each on one rank, and all of it on every rank, in order."""
    own = everywhere(rank, world_size, lambda: [(i, compute(i)) for i in range(rank, count, world_size)])
    return [value for _, value in sorted(chain(*own), key=itemgetter(0))]
