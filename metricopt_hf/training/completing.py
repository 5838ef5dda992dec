"""CompletingTrainer: what the metric is given beside predictions and labels, wherever it is called."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from transformers import EvalPrediction, Trainer
from transformers.trainer_utils import denumpify_detensorize

from ..evaluation import data

INDICES = "indices"  # in `include_for_metrics`


class CompletingTrainer(Trainer):
    """The metric gets the rows' places in the data set, and post-processed predictions, where that is asked for.

    The same in `evaluate()` and where the guidance looks at the metric, on parts of `eval_dataset`.

    With "indices" in `args.include_for_metrics` the `EvalPrediction` has an attribute `indices`: [n] int64, which rows of
    `eval_dataset` (or of the `observation_dataset`, `selection_dataset` given) the predictions are of, in their order.

    Args:
        post_process_function: `(examples, features, predictions) -> EvalPrediction` for the metric, as in transformers'
            question-answering example. `features` are the rows that were predicted, with all of their columns.
        eval_examples: of which the features were made; those of the predicted features are passed, found by "example_id"
            and "id", or, where there are as many as features, by their place. Default: the features themselves.

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

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(dataset, dict) or self.compute_metrics is None or not self._completes:
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)  # of a dict it comes here part by part
        dataset = self.eval_dataset[dataset] if isinstance(dataset, str) else dataset
        compute_metrics, complete, called = self.compute_metrics, partial(self._complete, dataset), []

        def completed(prediction: EvalPrediction, **kwargs) -> Any:
            called.append(prediction)
            return compute_metrics(complete(prediction), **kwargs)

        self.compute_metrics, self._unlabelled = completed, lambda: not called
        try:
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
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

    def _post_process(self, examples: Any, features: Any, prediction: EvalPrediction) -> EvalPrediction:
        return self.post_process_function(examples, features, prediction.predictions)
