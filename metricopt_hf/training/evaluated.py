"""A number that the trainer's own `evaluate()` returns, as a metric of the model: a pass for each observation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import Trainer

from ..evaluation.evaluator import undisturbed
from ..evaluation.model_metric import ModelMetric
from .subclasses import bookkeeping_kept

PREFIX = "evaluate:"  # begins such a metric's name, as in "evaluate:eval_accuracy"


def evaluated(trainer: Trainer, key: str, timeout: float | None) -> ModelMetric:
    """The metric that is the entry `key` of `trainer.evaluate(dataset)`."""

    def evaluate(model: Any, dataset: Any) -> dict[str, float]:
        with _unnoticed(trainer):
            return trainer.evaluate(dataset)

    metric = ModelMetric(evaluate, key.removeprefix("eval_"), timeout=timeout, exact=True)
    metric.wants_copy = False
    return metric


@contextmanager
def _unnoticed(trainer: Trainer) -> Iterator[None]:
    """Inside, `evaluate` logs nowhere and no callback hears of it; on leaving, the trainer is as before."""
    callbacks, history = trainer.callback_handler.callbacks, trainer.state.log_history
    trainer.callback_handler.callbacks, trainer.state.log_history = [], list(history)
    try:
        # in `log` TRL adds its numbers to those of `evaluate`
        with undisturbed(trainer.model), bookkeeping_kept(trainer, quiet=False):
            yield
    finally:
        trainer.callback_handler.callbacks, trainer.state.log_history = callbacks, history
