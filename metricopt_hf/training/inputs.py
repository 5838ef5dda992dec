"""MetricInputs: what the metric is given beside predictions and labels, wherever it is called."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from transformers import EvalPrediction, TrainingArguments

from ..evaluation import data

INDICES = "indices"  # in `include_for_metrics`


class MetricInputs:
    """Completes predictions: the rows' places in the data set, and what a post-processing makes of them.

    Args:
        trainer: whose `post_process_function` and `eval_examples` count as they are when they are asked for, since a
            subclass may set them behind its `super().__init__`; so does "indices" in `include_for_metrics`.
    """

    def __init__(self, trainer: Any):
        self.trainer = trainer
        self._evaluated: Any = None  # the data set that `evaluate` is about

    @property
    def indices(self) -> bool:
        """Whether the metric is given `indices`, [n] int64: which rows of the data set the predictions are of."""
        return INDICES in self.trainer.args.include_for_metrics

    @property
    def completes(self) -> bool:
        """Whether anything is added."""
        return self.trainer.post_process_function is not None or self.indices

    @contextmanager
    def evaluating(self, dataset: Any, args: TrainingArguments) -> Iterator[None]:
        """Inside, `evaluate` predicts that data set; in its order, where the metric is told which row is which."""
        strategy = args.train_sampling_strategy
        if self.completes and strategy == "group_by_length":  # Trainer groups by length in evaluation too
            args.train_sampling_strategy = "random"
        self._evaluated = None if isinstance(dataset, dict) else dataset
        try:
            yield
        finally:
            self._evaluated, args.train_sampling_strategy = None, strategy

    def completing(self, dataset: Any) -> Callable[[EvalPrediction], EvalPrediction] | None:
        """Completes predictions on a data set; None where nothing is added."""
        return partial(self.complete, dataset) if self.completes else None

    def complete(self, dataset: Any, prediction: EvalPrediction) -> EvalPrediction:
        """What the metric is given of predictions on a data set."""
        if self.indices:
            prediction.indices = data.places(dataset)
        trainer = self.trainer
        if trainer.post_process_function is None:
            return prediction
        examples = dataset if trainer.eval_examples is None else data.examples_of(dataset, trainer.eval_examples)
        whole = trainer.whole_output
        made = prediction.predictions if whole is None else whole(prediction, dataset)
        return trainer.post_process_function(examples, dataset, made)

    def wrapped(self, compute_metrics: Callable | None) -> Callable | None:
        """Trainer's `compute_metrics`, which is called within `evaluate`, given the same."""
        if compute_metrics is None or not self.completes:
            return compute_metrics

        def completed(prediction: EvalPrediction, **kwargs: Any) -> Any:
            if self._evaluated is not None:
                prediction = self.complete(self._evaluated, prediction)
            return compute_metrics(prediction, **kwargs)

        completed.__wrapped__ = compute_metrics
        return completed
