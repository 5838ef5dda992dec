"""CompletingTrainer: what the metric is given beside predictions and labels, wherever it is called."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from transformers import EvalPrediction, Seq2SeqTrainer, Trainer
from transformers.trainer_utils import denumpify_detensorize

from ..errors import MetricError
from ..evaluation import data
from ..evaluation.evaluator import Evaluator
from .rehearsal import is_trainers

logger = logging.getLogger(__name__)

INDICES = "indices"  # in `include_for_metrics`
POST_PROCESS = (
    "{}() is overridden here. If it makes something else of the predictions before it calls compute_metrics, hand the "
    "same over: post_process_function=f, with f(examples, features, predictions) -> EvalPrediction "
    "(docs/your_metric.md). "
    "If it makes or renames metrics itself, pass the one to optimise: metric=Metric(compute_metrics, 'its name')."
)


class CompletingTrainer(Trainer):
    """The metric gets the rows' places in the data set, and post-processed predictions, where that is asked for.

    The same in `evaluate()` and where the guidance calls the metric, on parts of `eval_dataset`.

    With "indices" in `args.include_for_metrics` the `EvalPrediction` has an attribute `indices`: [n] int64, which rows
    of `eval_dataset` (or of the `observation_dataset`, `selection_dataset` given) the predictions are of, in order.

    Args:
        post_process_function: `(examples, features, predictions) -> EvalPrediction` for the metric, as in transformers'
            question-answering example. `features` are the rows that were predicted, with all of their columns.
        eval_examples: of which the features were made; those of the predicted features are passed, found by
            "example_id" and "id", or, where there are as many as features, by their place. Default: the features
            themselves.

    A subclass may set both attributes itself, as that example's trainer does.
    """

    post_process_function: Callable[[Any, Any, Any], EvalPrediction] | None = None
    eval_examples: Any = None

    def __init__(self, *args, post_process_function=None, eval_examples=None, **kwargs):
        super().__init__(*args, **kwargs)
        if post_process_function is not None:
            self.post_process_function = post_process_function
        if eval_examples is not None:
            self.eval_examples = eval_examples

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval", **gen_kwargs):
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(dataset, dict) or self.compute_metrics is None or not self._completes:
            # a dict comes here part by part
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix, **gen_kwargs)
        dataset = self.eval_dataset[dataset] if isinstance(dataset, str) else dataset
        compute_metrics, complete, called = self.compute_metrics, partial(self._complete, dataset), []

        def completed(prediction: EvalPrediction, **kwargs) -> Any:
            called.append(prediction)
            return compute_metrics(complete(prediction), **kwargs)

        self.compute_metrics, self._unlabelled = completed, lambda: not called
        try:
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix, **gen_kwargs)
        finally:
            self.compute_metrics, self._unlabelled = compute_metrics, None

    # inside `evaluate`: whether Trainer has not called the metric, as it does not where there are no labels
    _unlabelled: Callable[[], bool] | None = None

    def evaluation_loop(self, dataloader, *args, metric_key_prefix="eval", **kwargs):
        output = super().evaluation_loop(dataloader, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        if self._unlabelled is not None and self._unlabelled() and output.predictions is not None:
            metrics = denumpify_detensorize(self.compute_metrics(EvalPrediction(output.predictions, output.label_ids)))
            prefix = f"{metric_key_prefix}_"
            output.metrics.update({prefix + key.removeprefix(prefix): value for key, value in metrics.items()})
        return output

    @property
    def _completes(self) -> bool:
        return self.post_process_function is not None or INDICES in self.args.include_for_metrics

    def _complete(self, dataset: Any, prediction: EvalPrediction) -> EvalPrediction:
        """What the metric is given of predictions on `dataset`."""
        if INDICES in self.args.include_for_metrics:
            prediction.indices = data.places(dataset)
        if self.post_process_function is None:
            return prediction
        examples = dataset if self.eval_examples is None else data.examples_of(dataset, self.eval_examples)
        return self._post_process(examples, dataset, prediction)

    def _tell_of_places(self, evaluator: Evaluator, score: float) -> None:
        """Warn of a metric that looks rows up by their place, where it is given parts of `eval_dataset`: in another
        order of the rows it answers another number than `score`."""
        if self._completes or not data.is_part(self.observation_dataset):
            return
        try:
            for order in range(3):  # of a coarse metric one may come out the same by chance
                other = evaluator.evaluate("check", partial(_reordered, order=order))
                if np.isclose(other, score):
                    continue
                if np.isclose(evaluator.evaluate("check"), score):  # else it is never twice the same
                    logger.warning(
                        f"In another order of the same rows {self.metric.name} is {other:g} instead of {score:g}: does "
                        "it look rows up by their place in eval_dataset? It is given random parts of that. Set "
                        'include_for_metrics=["indices"] and look up prediction.indices, or pass an '
                        "observation_dataset and a selection_dataset that it knows, with "
                        'observe="predictions_on_all_rows".'
                    )
                return
        except MetricError:
            pass

    @property
    def _hint(self) -> str:
        """What a metric that fails at its first call may lack."""
        evaluates = not is_trainers(self.evaluate) and type(self).evaluate is not Seq2SeqTrainer.evaluate
        loops = type(self).evaluation_loop is not CompletingTrainer.evaluation_loop
        overridden = "evaluate" if evaluates else "evaluation_loop" if loops else None
        return POST_PROCESS.format(overridden) if overridden and self.post_process_function is None else ""

    def _post_process(self, examples: Any, features: Any, prediction: EvalPrediction) -> EvalPrediction:
        return self.post_process_function(examples, features, prediction.predictions)


def _reordered(prediction: EvalPrediction, order: int) -> EvalPrediction:
    """The same rows, sorted by their labels (0), or shuffled, with `order` as the seed."""
    labels = rows = prediction.label_ids
    while isinstance(rows, (tuple, list)) and len(rows):
        rows = rows[0]
    count = len(rows) if isinstance(rows, np.ndarray) and rows.ndim else 0
    sortable = order == 0 and isinstance(labels, np.ndarray) and labels.ndim == 1
    places = np.argsort(labels, kind="stable") if sortable else np.random.default_rng(order).permutation(count)

    def turn(rows: Any) -> Any:
        if isinstance(rows, tuple):
            return tuple(map(turn, rows))
        has_rows = isinstance(rows, np.ndarray) and rows.ndim and len(rows) == count
        return rows[places].copy() if has_rows else rows

    fields = ("predictions", "label_ids", "inputs", "losses")
    return EvalPrediction(**{name: turn(getattr(prediction, name)) for name in fields})
