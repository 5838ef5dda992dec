"""Observing: a trainer's own data, loss and predictions, as the guidance sees them.

Batches, losses and predictions come from the methods of Trainer, or of its subclass.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import partial, wraps
from itertools import islice
from typing import Any

import datasets
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten
from torch.utils.data import IterableDataset
from transformers import EvalPrediction, TrainingArguments
from transformers.trainer_pt_utils import find_batch_size

from ..errors import ConfigurationError
from ..evaluation import data
from ..evaluation.evaluator import BatchOutput, Evaluator, agreed, everywhere, undisturbed
from ..evaluation.ledger import Ledger
from ..evaluation.metric import Metric
from ..evaluation.model_metric import ModelEvaluator
from ..linear.reading import arrays_read
from ..phi import PhiSpace
from .subclasses import bookkeeping_kept, is_overridden

logger = logging.getLogger(__name__)

# Memory for the batches and the frozen activations of the observation set, and as much for the selection set's: a few
# thousand images, or tens of thousands of rows, which otherwise are collated and computed anew for each pass.
CACHE_BYTES = 2e9


class Observing:
    """Makes evaluators, batches and gradients for a trainer.

    Args:
        trainer: the source of data, loss and predictions.
        metric, phi: those of the run.
    """

    def __init__(self, trainer: Any, metric: Metric, phi: PhiSpace):
        self.trainer, self.metric, self.phi = trainer, metric, phi
        self.unlabelled: Any = None  # the last batch that was predicted, if it had no labels

    def evaluator(self, dataset: Any, ledger: Ledger, split: str = "observation") -> Evaluator:
        """The metric on a data set.

        Args:
            split: name of the set, for a metric that wants it.
        """
        args = self.trainer.args
        make: Callable[..., Evaluator] = Evaluator
        if not self.metric.of_predictions:
            make = partial(ModelEvaluator, dataset=dataset, split=split)
        made = make(
            self.phi,
            self.predict,
            tuple if dataset is None else self.batches_of(dataset),
            self.metric,
            ledger,
            CACHE_BYTES,
            args.eval_do_concat_batches,
            args.process_index,
            args.world_size,
            self.trainer.metric_inputs.completing(dataset),
            args.eval_accumulation_steps,
        )
        if (name := self.trainer.given.row_groups) is not None:
            made.row_groups = self.trainer.label_names.index(name)
        return made

    def predict(self, batch: Any) -> BatchOutput:
        """The outputs of the trainer's `prediction_step` for a batch. It waits for no other rank."""
        trainer, wanted = self.trainer, self.trainer.args.include_for_metrics
        loss, logits, labels = self._step(batch)
        self.unlabelled = batch if labels is None else None
        logits = self._for_metric(logits, labels)
        losses, inputs = None, None
        if "loss" in wanted and loss is not None:
            losses = loss.repeat(find_batch_size(batch) or trainer.args.eval_batch_size)
        if "inputs" in wanted:  # as Trainer: with batch_eval_metrics all of the batch
            main_input = batch[getattr(trainer.model, "main_input_name", "input_ids")]
            inputs = trainer._prepare_input(batch if trainer.args.batch_eval_metrics else main_input)
        return BatchOutput(logits, labels, losses, inputs)

    def _step(self, batch: Any) -> tuple[Any, Any, Any]:
        """Loss, logits and labels of a batch."""
        trainer = self.trainer
        with self._alone(), bookkeeping_kept(trainer):
            return trainer.prediction_step(trainer.model, batch, False, ignore_keys=trainer.ignore_keys)

    def _for_metric(self, logits: Any, labels: Any) -> Any:
        preprocess = self.trainer.preprocess_logits_for_metrics
        return logits if preprocess is None else preprocess(logits, labels)

    def movement(self, dataset: Any) -> Callable[[], bool]:
        """Says whether the model predicts something else of the first batch than it does now; the same on every rank.

        Of several arrays of outputs, as of a head per task, those count that the metric reads. Where that cannot be
        told, as of generated text, it says yes.
        """
        args = self.trainer.args
        batch: list[Any] = []
        before: list[Tensor] = []
        read: list[int] = []  # which of several arrays

        def outputs() -> list[Tensor]:
            with undisturbed(self.trainer.model):
                if not batch:
                    batch.append(next(iter(self.batches_of(dataset)())))
                _, logits, labels = self._step(copy.deepcopy(batch[0]))
            found = _floats(self._for_metric(logits, labels)) or _floats(logits)
            return [found[i] for i in read] or found

        def moved() -> bool:
            try:
                if not before:
                    before.extend(outputs())
                    return True
                return not all(map(torch.equal, before, outputs()))
            except Exception:  # what is amiss is told by the first call of the metric
                return True

        def said() -> bool:
            return agreed(args.process_index, args.world_size, moved)

        said()
        several = agreed(args.process_index, args.world_size, lambda: len(before) > 1)
        if several and self.phi.output_bias_slice is not None:
            with suppress(Exception):  # likewise
                evaluator = self.evaluator(dataset, Ledger())
                read += arrays_read(evaluator, evaluator.predictions())
            before.clear()
            said()
        return said

    def loss(self, batch: Any) -> Tensor:
        """The training loss of a batch, by the trainer's `compute_loss`, differentiable."""
        trainer = self.trainer
        with self._alone(), trainer.compute_loss_context_manager():
            return trainer.compute_loss(trainer.model, trainer._prepare_inputs(batch))

    def logged_loss(self, batch: Any) -> Tensor:
        """The loss of a batch without gradients; nan where the model has none in eval mode."""
        trainer = self.trainer
        with self._still():
            try:
                return self.loss(batch).detach()
            except Exception as error:  # such as torchvision's detectors, which have losses in train mode only
                logger.debug(f"The loss of a metric step is not known: {error}")
                return torch.tensor(float("nan"), device=trainer.args.device)

    def loss_gradient(self, batch: Any) -> Tensor:
        """[d] of the loss of a batch, the mean over the ranks, by phi."""
        with self._still(), bookkeeping_kept(self.trainer):
            gradient = self.phi.gradient(lambda: self.loss(batch))
        return self.trainer.accelerator.reduce(gradient, "mean")

    def loss_gradients(self, count: int) -> Tensor:
        """[count, d] gradients of the loss by phi on mini-batches of the training set, on the CPU; fewer of fewer.

        The same on every rank; none where the loss has no gradient in eval mode.
        """
        try:
            return self._gradients(count, self._still())
        except Exception as error:
            logger.warning(f"The loss has no gradient in eval mode, so coordinates of phi are drawn at random: {error}")
            return torch.zeros(0, self.phi.dim)

    def check_loss_gradient(self) -> None:
        """Raises ConfigurationError where the loss has no gradient in eval mode."""
        with suppress(Exception):  # first as evaluation runs the model, which leaves no trace in it
            self._gradients(1, undisturbed(self.trainer.model))
            return
        try:
            self._gradients(1, self._still())
        except Exception as error:  # such as of torchvision's detectors, which have losses in train mode only
            raise ConfigurationError(
                f"value_weight={self.trainer.args.value_weight} blends in the gradient of the loss, which has none in "
                f"eval mode, in which the metric phase takes it ({type(error).__name__}: {error}). Leave value_weight "
                "out, so that the loss has no say there, or let the model return its loss in eval mode too."
            ) from error

    def _gradients(self, count: int, mode: AbstractContextManager) -> Tensor:
        """`loss_gradients`, or what the loss raises; `mode` is that of the model."""
        args, generator = self.trainer.args, torch.Generator().manual_seed(self.trainer.args.seed)

        def compute() -> list[Tensor]:
            return [self.phi.gradient(partial(self.loss, b)).cpu() for b in self.train_batches(count, generator)]

        with mode, bookkeeping_kept(self.trainer):
            return torch.stack(everywhere(args.process_index, args.world_size, compute)[0])

    @contextmanager
    def _still(self) -> Iterator[None]:
        """`undisturbed`; the root alone is in train mode, by which subclasses tell training from evaluation."""
        with undisturbed(self.trainer.model):
            self.trainer.model.training = True
            yield

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Inside, Trainer's loss counts the labels of this rank only, and so does not wait for other ranks."""
        args = self.trainer.args
        across, args.average_tokens_across_devices = args.average_tokens_across_devices, False
        try:
            yield
        finally:
            args.average_tokens_across_devices = across

    # Batches

    def batches_of(self, part: Any) -> Callable[[], Iterator[Any]]:
        """Makes a fresh iteration over the batches of a part, as Trainer's loader for evaluation, or a user's own."""
        if is_overridden(self.trainer, "get_eval_dataloader"):
            return partial(self._own_eval_batches, part)
        columns = self._columns(part, self.trainer.args.eval_batch_size)
        return data.InOrder(*columns, num_workers=self.trainer.args.dataloader_num_workers)

    def _own_eval_batches(self, part: Any) -> Iterator[Any]:
        """Batches of an overridden `get_eval_dataloader`; every rank gets all of them.

        Raises:
            ConfigurationError: the loader is not one of this part.
        """
        loader = data.whole(self.trainer.get_eval_dataloader(part), self.trainer.args.world_size)
        asked, rows = _length(part), _length(getattr(loader, "dataset", None))
        if asked is not None and rows is not None and rows > asked:
            raise ConfigurationError(
                f"get_eval_dataloader is overridden; asked for a loader of {asked} rows, it made one of {rows}. "
                "The guidance observes parts of eval_dataset, so let it use its argument: "
                "get_eval_dataloader(self, eval_dataset=None), and eval_dataset where that is not None."
            )
        yield from loader

    def train_batches(self, count: int, generator: torch.Generator) -> Iterator[Any]:
        """Random batches of the training set; the first ones, if it has no random access or a loader of its own."""
        trainer = self.trainer
        dataset = trainer.train_dataset
        has_rows = hasattr(dataset, "__len__") and not isinstance(dataset, IterableDataset)
        if has_rows and not is_overridden(trainer, "get_train_dataloader"):
            size = trainer._train_batch_size * trainer.args.world_size  # whatever the number of ranks, the same batches
            dataset, batch_size, collate = self._columns(dataset, size)
            yield from data.random_batches(dataset, batch_size, count, collate, generator)
            return
        torch.manual_seed(trainer.args.seed)  # callers put the random state back
        loader = trainer.get_train_dataloader()
        try:
            yield from islice(loader, count)
        finally:
            if hasattr(loader, "end"):  # accelerate's keeps an account of the one that is being iterated
                loader.end()

    def _columns(self, dataset: Any, batch_size: int) -> tuple[Any, int, Callable]:
        """`dataset` and a collator without the columns that the model does not take, as Trainer's loaders have them."""
        trainer = self.trainer
        if isinstance(dataset, datasets.Dataset):
            return trainer._remove_unused_columns(dataset, "observation"), batch_size, trainer.data_collator
        return dataset, batch_size, trainer._get_collator_with_removed_columns(trainer.data_collator, "observation")


def _floats(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _length(dataset: Any) -> int | None:
    return len(dataset) if hasattr(dataset, "__len__") else None


INDICES = "indices"  # in `include_for_metrics`


class MetricInputs:
    """Completes predictions by the rows' places in the data set, and by post-processing.

    Args:
        trainer: its `post_process_function`, `eval_examples` and `include_for_metrics` are read at each use, since a
            subclass may set them after its `super().__init__`.
    """

    def __init__(self, trainer: Any):
        self.trainer = trainer
        self.evaluates, self.evaluated = False, None  # whether `evaluate` predicts one data set, and that

    @property
    def indices(self) -> bool:
        """Whether the metric gets `indices`, [n] int64: the place of each prediction's row in the data set."""
        return INDICES in self.trainer.args.include_for_metrics

    @property
    def completes(self) -> bool:
        """Whether predictions are completed at all."""
        return self.trainer.post_process_function is not None or self.indices

    @contextmanager
    def evaluating(self, dataset: Any, args: TrainingArguments) -> Iterator[None]:
        """Inside, `evaluate` predicts that data set, in its order where the metric gets indices."""
        strategy = args.train_sampling_strategy
        if self.completes and strategy == "group_by_length":  # Trainer groups by length in evaluation too
            args.train_sampling_strategy = "random"
        self.evaluates = not isinstance(dataset, dict)
        self.evaluated = dataset if self.evaluates else None
        try:
            yield
        finally:
            self.evaluates, self.evaluated, args.train_sampling_strategy = False, None, strategy

    def completing(self, dataset: Any) -> Callable[[EvalPrediction], EvalPrediction] | None:
        """Completes predictions on a data set; None where nothing is added."""
        return partial(self.complete, dataset) if self.completes else None

    def complete(self, dataset: Any, prediction: EvalPrediction) -> EvalPrediction:
        """The metric's input for predictions on a data set."""
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
        """A `compute_metrics` for Trainer's `evaluate` that gets completed predictions too."""
        if compute_metrics is None or not self.completes:
            return compute_metrics

        @wraps(compute_metrics, (), ())
        def completed(prediction: EvalPrediction, **kwargs: Any) -> Any:
            if self.evaluated is not None:
                prediction = self.complete(self.evaluated, prediction)
            return compute_metrics(prediction, **kwargs)

        return completed
