"""ShardedEvaluator: the metric of a model that FSDP2 has sharded, of which no rank can compute anything alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from time import perf_counter

import torch
from accelerate.utils import gather_object
from torch import Tensor
from torch.utils._pytree import tree_map_only
from tqdm.auto import tqdm
from transformers import EvalPrediction

from ..errors import MetricError
from ..phi.space import reshard
from .evaluator import BatchOutput, Evaluator, Scores, Taken, _Data


class ShardedEvaluator(Evaluator):
    """All ranks compute every point, each on its share of the batches, and share the metric calls out.

    Nothing is replayed: ranks that skip other modules than the rest would wait for each other.
    """

    def _make_data(self, *args) -> _Data:
        return _SharedData(*args, self.rank, self.world_size)

    def freeze(self, moved: Callable[[], AbstractContextManager]) -> None:
        pass

    def evaluate_many(self, points: Tensor, purpose: str, predictions: bool = False) -> Scores:
        taken: list[Taken] = []
        made: list[EvalPrediction] = []
        with self.phi.restored():
            bar = tqdm(points, "observing the metric", leave=False, delay=3, disable=not self.progress)
            for i, point in enumerate(bar):
                start = perf_counter()
                self.phi.write(point)
                finite = self._finite()
                prediction = self.predictions()
                if predictions:
                    made.append(prediction)
                if i % self.world_size == self.rank:
                    called = perf_counter()
                    score, error = self._judged(prediction, finite)
                    end = perf_counter()
                    self.ledger.add(purpose, 1, end - start, passes=1)
                    taken.append((i, score, error, end - start, end - called, None))
        scores = self._shared(taken, purpose, predictions=False)
        return replace(scores, predictions=made if predictions else None)

    def _judged(self, prediction: EvalPrediction, finite: bool) -> tuple[float, str | None]:
        """The metric of what all ranks have predicted, and why it failed."""
        try:
            if not finite:
                raise self._not_finite()
            return self._score(prediction), None
        except MetricError as failure:
            return self._failed, str(failure)


class _SharedData(_Data):
    """A data set of which every rank predicts some batches; all get the outputs of all, in order."""

    def __init__(self, *args):
        *args, self.rank, self.world_size = args
        super().__init__(*args)

    def _outputs(self) -> Iterator[BatchOutput]:
        batches = self._kept_batches()
        mine: list[tuple[int, BatchOutput]] = []
        own, last = None, None  # of the present round of batches, and the last batch of all
        count = 0
        for index, batch in enumerate(self._batches() if batches is None else batches):
            count, last = index + 1, batch
            if index % self.world_size == self.rank:
                own = (index, batch)
            if count % self.world_size == 0:
                mine.append((own[0], self._predicted(own[1])))
                own = None
        if count % self.world_size:  # who has no batch left takes part all the same
            output = self._predicted(last if own is None else own[1])
            if own is not None:
                mine.append((own[0], output))
        reshard(self.model)
        for _, output in sorted(gather_object(mine), key=lambda pair: pair[0]):
            yield output

    def _predicted(self, batch) -> BatchOutput:
        return tree_map_only(torch.Tensor, lambda tensor: tensor.cpu(), self._on_copy(batch))
