"""ObservingTrainer: Trainer's data, loss and predictions, as the guidance sees them."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import islice
from typing import Any

import datasets
import torch
from accelerate.utils import broadcast_object_list
from torch.utils._pytree import tree_flatten
from torch.utils.data import IterableDataset
from transformers.trainer_pt_utils import find_batch_size

from ..errors import ConfigurationError, MetricError
from ..evaluation import data
from ..evaluation.answer import values_of, weights_of
from ..evaluation.constraints import ConstraintCheck
from ..evaluation.evaluator import BatchOutput, Evaluator, undisturbed
from ..evaluation.ledger import Ledger
from ..evaluation.model_metric import CommandMetric, ModelEvaluator
from ..evaluation.noise import checked_constraints
from ..evaluation.sharded import ShardedEvaluator
from ..extras import require
from ..phi import Coordinates, make_coordinates
from . import diagnosis
from .completing import CompletingTrainer
from .diagnosis import Diagnosis
from .modes import pinned
from .plan import OF_PREDICTIONS
from .rehearsal import Stillness, is_trainers
from .settling import SettlingTrainer

logger = logging.getLogger(__name__)

# Memory for the batches and the frozen activations of the observation set, and as much for the selection set's: a few
# thousand images, or tens of thousands of rows, which otherwise are collated and computed anew for each pass.
CACHE_BYTES = 2e9
MAX_TRIED = 32  # of phi's parameters, whether they move a prediction, at a forward pass on one batch each


class ObservingTrainer(SettlingTrainer, CompletingTrainer):
    """Batches, losses and predictions are made by what Trainer, or its subclass, makes them by."""

    _ignore_keys: list[str] | None = None  # of the model's outputs, from `train`
    _unlabelled_columns: list[str] | None = None  # of the last batch that was predicted, if it had no labels
    _stillness = Stillness()  # how what is not tuned is held still

    def diagnose(self, worthwhile: float = 0.02) -> Diagnosis:
        """Before any training: what a bias per logit reaches, what phi reaches, and which of them is worth the effort.

        Takes the time of some 40 forward passes, prints a table, and leaves everything as it was.

        Args:
            worthwhile: the smallest gain that is worth having, in the metric's unit (0.02: of one in [0, 1]).

        Raises:
            ConfigurationError: there is no metric, or `worthwhile` is not positive.
            MetricError: the metric fails at the start.
        """
        if not self.guided:
            raise ConfigurationError(
                "There is no metric to diagnose: give the trainer one (metric=..., or compute_metrics and "
                "metric_for_best_model in the config)."
            )
        if not self.metric.of_predictions:
            raise ConfigurationError(
                f"The metric {self.metric.name!r} is one of the model: what phi and a bias reach cannot be told from "
                "predictions, so there is nothing to diagnose."
            )
        if not worthwhile > 0:
            raise ConfigurationError(f"worthwhile={worthwhile!r} must be positive: a gain, in the metric's unit.")
        require("tabulate", "report")
        ledger = Ledger()
        few = "gradient_pca" if self._kind_of_coordinates == "identity" else None
        with self._phi_in_place(), undisturbed(self.model):
            observation, selection = (
                self._evaluator(part, ledger) for part in (self.observation_dataset, self.selection_dataset)
            )
            found = diagnosis.diagnose(
                observation,
                selection,
                self._make_coordinates(kind=few).leading(diagnosis.MOST_COORDINATES),
                OF_PREDICTIONS.perturbation_std,
                self.args.observe == "predictions_on_all_rows",
                worthwhile,
                self.args.seed,
            )
        if self.is_world_process_zero():
            print(found)
        return found

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval", **gen_kwargs):
        """As of Trainer; with a metric of the model, and a weighted sum of several, among the numbers.

        Args:
            gen_kwargs: for `Seq2SeqTrainer`, of generation.
        """
        found = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix, **gen_kwargs)
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        metric = self._reported_metric
        name = None if metric is None else f"{metric_key_prefix}_{metric.name.removeprefix('eval_')}"
        if name is None or name in found or isinstance(dataset, dict):
            return found
        weights = weights_of(metric.name)
        if not metric.of_predictions:
            found[name] = float(self._score_of_model(dataset, metric_key_prefix))
        elif weights and all(f"{metric_key_prefix}_{key}" in found for key in weights):
            found[name] = sum(weight * found[f"{metric_key_prefix}_{key}"] for key, weight in weights.items())
        if name in found:
            self.log({name: found[name]})
        return found

    def check_constraints(self, dataset: Any, split: str = "report") -> tuple[ConstraintCheck, ...]:
        """Which of `metric_constraints` hold for the model as it is now, with their noise; on all ranks.

        Args:
            split: what the data set is called, for a metric that wants to know.

        Raises:
            MetricError: the metric fails there.
        """
        values = None if self.metric.of_predictions else values_of(self._score_of_model(dataset, split))
        on_all_rows = self.args.observe == "predictions_on_all_rows"
        return checked_constraints(self._evaluator(dataset, Ledger()), on_all_rows, values)

    def _score_of_model(self, dataset: Any, split: str) -> float:
        """Of a metric of the model, at the model as it is now; the same on every rank."""
        metric = self._reported_metric
        with nullcontext() if self._phi is None else self._phi.merged():
            model = copy.deepcopy(self.model)
        outcome: list[Any] = [None]
        if self.args.process_index == 0 or not isinstance(metric, CommandMetric):
            try:
                outcome = [metric(model.eval().requires_grad_(False), dataset, split)]
            except MetricError as error:
                outcome = [error]
        if self.args.world_size > 1:
            broadcast_object_list(outcome)
        if isinstance(outcome[0], MetricError):
            raise outcome[0]
        return outcome[0]

    def _evaluator(
        self, dataset: Any, ledger: Ledger, progress: bool = False, split: str = "observation"
    ) -> Evaluator:
        args = self.args
        if not self.metric.of_predictions:
            make = partial(ModelEvaluator, dataset=dataset, split=split)
        else:
            make = ShardedEvaluator if self._sharded else Evaluator
        return make(
            self.phi,
            self._predict,
            tuple if dataset is None else self._batches_of(dataset),
            self.metric,
            ledger,
            CACHE_BYTES,
            args.eval_do_concat_batches,
            args.process_index,
            args.world_size,
            progress and not args.disable_tqdm and self.is_local_process_zero(),
            partial(self._complete, dataset) if self._completes else None,
            args.eval_accumulation_steps,
        )

    def _batches_of(self, part: Any) -> Callable[[], Iterator[Any]]:
        """Makes a fresh iteration over the batches of a part, as Trainer's loader for evaluation, or a user's own."""
        if not is_trainers(self.get_eval_dataloader):
            return partial(self._own_eval_batches, part)
        columns = self._columns(part, self.args.eval_batch_size)
        return data.in_order(*columns, num_workers=self.args.dataloader_num_workers)

    def _own_eval_batches(self, part: Any) -> Iterator[Any]:
        """Of `get_eval_dataloader`, where that is overridden; every rank gets all of them.

        Raises:
            ConfigurationError: they are not of the part that was asked for.
        """
        before, persistent = self.eval_dataset, self.args.dataloader_persistent_workers
        self.accelerator.prepare = lambda loader, *args, **kwargs: loader  # would deal the batches out to the ranks
        self.eval_dataset, self.args.dataloader_persistent_workers = part, False  # else the first one is kept
        try:
            loader = self.get_eval_dataloader(part)
        finally:
            del self.accelerator.prepare
            self.eval_dataset, self.args.dataloader_persistent_workers = before, persistent
        rows = 0
        for batch in loader:
            rows += find_batch_size(batch) or 0
            yield batch
        if hasattr(part, "__len__") and rows > len(part):
            raise ConfigurationError(
                f"get_eval_dataloader is overridden; asked for a loader of {len(part)} rows, it made one of {rows}. "
                "The guidance observes parts of eval_dataset, so let it use its argument: "
                "get_eval_dataloader(self, eval_dataset=None), with eval_dataset or self.eval_dataset."
            )

    def _columns(self, dataset: Any, batch_size: int) -> tuple[Any, int, Callable]:
        """`dataset` and a collator without the columns that the model does not take, as Trainer's loaders have them."""
        if isinstance(dataset, datasets.Dataset):
            return self._remove_unused_columns(dataset, "observation"), batch_size, self.data_collator
        return dataset, batch_size, self._get_collator_with_removed_columns(self.data_collator, "observation")

    def _predict(self, batch: Any) -> BatchOutput:
        with self._own_token_count():
            loss, logits, labels = self.prediction_step(self.model, batch, False, ignore_keys=self._ignore_keys)
        self._unlabelled_columns = sorted(batch) if labels is None and isinstance(batch, Mapping) else None
        if self.preprocess_logits_for_metrics is not None:
            logits = self.preprocess_logits_for_metrics(logits, labels)
        losses, inputs, wanted = None, None, self.args.include_for_metrics
        if "loss" in wanted and loss is not None:
            losses = loss.repeat(find_batch_size(batch) or self.args.eval_batch_size)
        if "inputs" in wanted:  # as Trainer: with batch_eval_metrics all of the batch
            main_input = batch[getattr(self.model, "main_input_name", "input_ids")]
            inputs = self._prepare_input(batch if self.args.batch_eval_metrics else main_input)
        return BatchOutput(logits, labels, losses, inputs)

    @contextmanager
    def _own_token_count(self) -> Iterator[None]:
        """Inside, Trainer's loss counts this rank's labels only: to count all, it would wait for the other ranks."""
        across = self.args.average_tokens_across_devices
        self.args.average_tokens_across_devices = False
        try:
            yield
        finally:
            self.args.average_tokens_across_devices = across

    def _check_metric(self) -> None:
        """The metric's first call, before any training time is spent."""
        evaluator = self.phase.evaluator
        try:
            score = evaluator.evaluate("check")
        except MetricError as error:
            hint, asked = "", "a copy of the model"
            if evaluator.metric.of_predictions:
                asked = "an EvalPrediction of all of that set (predictions, label_ids as numpy arrays), or of a part,"
            if self._unlabelled_columns is not None:
                hint = (
                    f"\nIt was given no labels: of the columns {', '.join(self._unlabelled_columns)} none is among "
                    f"label_names={self.label_names}. If one holds them, name it in the arguments: label_names=[...]."
                )
            raise MetricError(
                f"{error}{hint}\nThis was the first call of the metric, on the observation set, before training; "
                f"nothing was trained. The metric is called with {asked} and must return one finite number, or a dict "
                f"that holds one. {self._hint}".rstrip()
            ) from error
        if evaluator.metric.of_predictions:
            self._tell_of_places(evaluator, score)
        direction = "greater" if self.metric.greater_is_better else "smaller"
        logger.info(f"{self.metric.name} before training: {score:.4f} on the observation set ({direction} is better).")

    def _tell_idle(self, batch: Any) -> None:
        """Warn of parts of phi that move no prediction, such as the bias of an auxiliary head."""

        def outputs() -> list[torch.Tensor]:
            with self._own_token_count(), torch.no_grad():
                try:
                    _, logits, _ = self.prediction_step(
                        self.model, copy.deepcopy(batch), False, ignore_keys=self._ignore_keys
                    )
                except Exception:  # training batches need not be such as are predicted; then nothing can be said
                    return []
            leaves = [leaf for leaf in tree_flatten(logits)[0] if isinstance(leaf, torch.Tensor)]
            return [leaf for leaf in leaves if leaf.is_floating_point()]

        # tokens that were generated may stay the same, and of an adapter there are too many
        if len(self.phi.names) <= MAX_TRIED and outputs() and (idle := self.phi.idle(outputs)):
            logger.warning(
                f"Of phi, what is tuned in the metric phase, {', '.join(idle)} moves no prediction of the model: "
                "in vain, but it does no harm. To leave it out, choose phi by a regular expression over parameter "
                "names, or, of an output bias, phi=lambda model: FiLM(model, output_bias=False)."
            )

    @contextmanager
    def _phi_in_place(self) -> Iterator[None]:
        """Inside, phi is in the model, also behind a run that merged it, and has gradients."""
        merged = not all(name in dict(self.model.named_parameters()) for name in self.phi.names)
        if merged:
            self.phi.attach()
        before = [(parameter, parameter.requires_grad) for parameter in self.phi.parameters]
        try:
            for parameter, _ in before:
                parameter.requires_grad_(True)
            yield
        finally:
            for parameter, required in before:
                parameter.requires_grad_(required)
            if merged:
                self.phi.merge()

    def _make_coordinates(self, max_batches: int | None = None, kind: str | None = None) -> Coordinates:
        """Q: the given value function's, else from the present phi, by default of the kind that was asked for."""
        args, given = self.args, self._given_value_function
        if given is not None and given.has_coordinates:
            return given.coordinates_from(self.phi.read())
        generator = torch.Generator().manual_seed(args.seed)

        def group_batches() -> Iterator[Any]:
            dataset, batch_size, collate = self._columns(self.train_dataset, self._train_batch_size)
            batches = data.group_batches(dataset, self._label_name, 4 * batch_size, collate, generator)
            return islice(batches, max_batches)

        with undisturbed(self.model), torch.enable_grad(), pinned(self.model, self._stillness.eval_mode):
            self.model.train()
            return make_coordinates(
                kind or self._kind_of_coordinates,
                self.phi,
                args.phi_dim,
                generator,
                lambda count: self._train_batches(max_batches or count, generator),
                group_batches,
                lambda batch: self.compute_loss(self.model, self._prepare_inputs(batch)),
                args.process_index,
                args.world_size,
            )

    def _train_batches(self, count: int, generator: torch.Generator) -> Iterator[Any]:
        """Of the training set, at random; where it has no rows to draw, or a loader of its own, that one's first."""
        dataset = self.train_dataset
        has_rows = hasattr(dataset, "__len__") and not isinstance(dataset, IterableDataset)
        if has_rows and is_trainers(self.get_train_dataloader):
            dataset, batch_size, collate = self._columns(dataset, self._train_batch_size)
            yield from data.random_batches(dataset, batch_size, count, collate, generator)
            return
        torch.manual_seed(self.args.seed)  # callers put the random state back
        loader = self.get_train_dataloader()
        try:
            yield from islice(loader, count)
        finally:
            if hasattr(loader, "end"):  # accelerate's keeps an account of the one that is being iterated
                loader.end()
