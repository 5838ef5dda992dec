"""MetricOptTrainer: transformers.Trainer, guided by the metric that its user named."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers.trainer_utils import get_last_checkpoint

from .. import guides
from .. import phi as spaces
from ..errors import ConfigurationError, MetricError
from ..evaluation import data
from ..evaluation.evaluator import BatchOutput, Evaluator, undisturbed
from ..evaluation.ledger import Ledger
from ..evaluation.metric import Metric
from ..evaluation.observation import Observation
from ..evaluation.observer import Observer
from ..extras import require
from ..guides import Guide
from ..hub import ValueFunction
from ..phi import Coordinates, PhiSpace, make_coordinates
from . import checkpoint, diagnosis, preflight
from .diagnosis import Diagnosis
from .optimization import forget, give_own_learning_rate, raise_learning_rate, restart_schedule
from .phase import MetricPhase
from .plan import DEFAULTS, PhasePlan
from .sharing import SharingTrainer

logger = logging.getLogger(__name__)

FIRST, METRIC = "first phase", "metric phase"


class MetricOptTrainer(SharingTrainer):
    """`Trainer` that also follows a black-box metric (after MetricOpt; Huang, Zhai, Guo and Susskind, CVPR 2021).

    A run has two phases (`metric_start_ratio`). The first is Trainer's own. In the second, everything but phi is frozen
    and in eval mode (else batch statistics and dropout would move, and the metric would be no function of phi); the
    metric is observed at and around phi, a value function is fitted to it online, and its gradient is blended into the
    task gradient as far as it has proved to predict. Then phi starts anew and follows the loss alone
    (`unguided_ratio`). At the end the best phi of all by the selection split is put in place and merged into plain
    weights. Without a metric this class is Trainer.

    Takes all arguments of `Trainer`, with `args` a `MetricOptConfig`, and:

    Args:
        metric: what to optimise: an `evaluate` module, its name or path, a callable `EvalPrediction -> number or dict`,
            or a `Metric`. Default: `args.metric_name_or_path`, else `compute_metrics` and `metric_for_best_model`;
            where neither names a metric (or only the loss), nothing is done.
        observation_dataset: where the metric is observed; default: cut from `eval_dataset` with `args.seed`.
        selection_dataset: where the best phi is chosen; default: likewise, disjoint.
        phi: a `PhiSpace` on the model, a function that builds one on a model (needed with `model_init`), or what
            `args.phi` could be; default: `args.phi`.
        value_function: one to start from; default: `args.value_function_name_or_path`. Its coordinates are taken over.
        guide: a `Guide`; default: from `args.guide`.

    Raises:
        ConfigurationError, PhiError, ValueFunctionError: something in the arguments cannot work; before any training.
        MetricError: from `train`, if the metric's very first call fails; later failures only drop observations.

    Example:
        trainer = MetricOptTrainer(
            model, MetricOptConfig("out", metric_for_best_model="f1"), train_dataset=train, eval_dataset=validation,
            compute_metrics=compute_metrics)
        trainer.train()
    """

    def __init__(
        self,
        *args,
        metric: Any = None,
        observation_dataset: Any = None,
        selection_dataset: Any = None,
        phi: PhiSpace | Callable[[nn.Module], PhiSpace] | str | None = None,
        value_function: ValueFunction | None = None,
        guide: Guide | None = None,
        **kwargs,
    ):
        self.metric: Metric | None = None
        self.phi: PhiSpace | None = None
        self.phase: MetricPhase | None = None
        self._stage: str | None = None  # which phase a micro-batch is in, while it is computed
        super().__init__(*args, **kwargs)
        self._given_phi, self._given_guide = phi, guide
        self._given_value_function: ValueFunction | None = None
        self.observation_dataset, self.selection_dataset = observation_dataset, selection_dataset
        self._ignore_keys: list[str] | None = None
        self.metric = preflight.resolve_metric(metric, self.args, self.compute_metrics, self.eval_dataset)
        if self.metric is not None:
            preflight.check_supported(self.args, self.accelerator.distributed_type)
            self.observation_dataset, self.selection_dataset = preflight.split(
                observation_dataset, selection_dataset, self.eval_dataset, self.args
            )
            self._given_value_function = preflight.load_value_function(value_function, self.args)
            self.phi = self._build_phi(self.model)
            preflight.check_holds_phi(self.optimizer, self.phi)

    # What a user reads

    @property
    def guided(self) -> bool:
        """Whether there is a metric to optimise."""
        return self.metric is not None

    @property
    def observations(self) -> list[Observation]:
        """All observations of the last run."""
        return [] if self.phase is None else list(self.phase.trajectory)

    @property
    def ledger(self) -> Ledger:
        """Metric calls and seconds of the last run, by purpose."""
        return Ledger() if self.phase is None else self.phase.ledger

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
        if not worthwhile > 0:
            raise ConfigurationError(f"worthwhile={worthwhile!r} must be positive: a gain, in the metric's unit.")
        require("tabulate", "report")
        ledger = Ledger()
        few = "gradient_pca" if self.args.phi_coordinates == "identity" else None
        with self._phi_in_place(), undisturbed(self.model):
            observation, selection = (
                self._evaluator([part], ledger) for part in (self.observation_dataset, self.selection_dataset)
            )
            found = diagnosis.diagnose(
                observation,
                selection,
                self._make_coordinates(few).leading(diagnosis.MOST_COORDINATES),
                self.args.perturbation_std or DEFAULTS["predictions"].perturbation_std,
                self.args.metric_on_all_rows,
                worthwhile,
                self.args.seed,
            )
        if self.is_world_process_zero():
            print(found)
        return found

    # The run

    def train(self, resume_from_checkpoint=None, trial=None, ignore_keys_for_eval=None):
        if not self.guided:
            return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)
        self._ignore_keys = ignore_keys_for_eval
        if resume_from_checkpoint:
            last = get_last_checkpoint(self.args.output_dir) if resume_from_checkpoint is True else None
            checkpoint.check(last or resume_from_checkpoint)
        with self._wrapped():
            output = super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)
        self._finish_run()
        return output

    @contextmanager
    def _wrapped(self) -> Iterator[None]:
        """Inside, `training_step` and `compute_loss` are guided, whatever a subclass makes of them.

        They are wrapped on the instance, around the outermost override, so that none is passed by.
        """
        self.training_step = partial(self._guided_training_step, self.training_step)
        self.compute_loss = partial(self._guided_compute_loss, self.compute_loss)
        try:
            yield
        finally:
            del self.training_step, self.compute_loss

    def compute_loss(self, model, inputs, *args, **kwargs):
        if self.guided and (own := preflight.metric_columns(self.label_names, self.model) & inputs.keys()):
            inputs = {name: column for name, column in inputs.items() if name not in own}
        return super().compute_loss(model, inputs, *args, **kwargs)

    def call_model_init(self, trial=None):
        model = super().call_model_init(trial)
        if self.guided:
            self.phi = self._build_phi(model)
        return model

    def _prepare_for_training(self, max_steps, train_dataloader, resume_from_checkpoint):
        if not self.guided:
            return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        if not all(name in dict(self.model.named_parameters()) for name in self.phi.names):
            self.phi = self._build_phi(self.model)  # merged at the end of an earlier run
        self._requires_grad = {name: p.requires_grad for name, p in self.model.named_parameters()}
        self._metric_start = round(self.args.metric_start_ratio * max_steps)
        for parameter in self.phi.parameters:
            parameter.requires_grad_(True)
        self.phase = self._build_phase(max_steps)
        self._unguided_start = self._metric_start + self.phase.plan.guided_steps
        if self._metric_start == 0:
            self._freeze()
        prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        if resume_from_checkpoint is None:
            self._check_metric()
        return prepared

    def _guided_training_step(self, inner: Callable, model, inputs, num_items_in_batch=None):
        """A micro-batch: `inner` is Trainer's step, or what a subclass made of it."""
        step = self.state.global_step
        if step == self._unguided_start and self.phase.unguided_step is None:
            self.phase.begin_unguided(step)
            forget(self.optimizer, self.phase.moving.parameters)
        self._stage = METRIC if step >= self._metric_start else FIRST
        if self._stage == METRIC and not self._parallel:
            self._freeze()
        if self._stage == FIRST and self.phase.guide.in_first_phase and not self.phase.started:
            self.phase.start(step, before=True)
        try:
            loss = inner(model, inputs, num_items_in_batch)
        finally:
            stage, self._stage = self._stage, None
        if self.accelerator.sync_gradients:
            if stage == METRIC:
                self._guide_update(step)
            else:
                if self.phase.started:
                    self.phase.advance(step)
                for name in self.phi.inserted:  # not to be trained yet: the first phase is Trainer's own
                    self.model.get_parameter(name).grad = None
        return loss

    def _guided_compute_loss(self, inner: Callable, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The loss of a micro-batch; of evaluation, and of a first phase without the guide, as it is."""
        if self._stage is None or (self._stage == FIRST and not self.phase.started):
            return inner(model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch)
        if self._stage == METRIC and self.phase.guide.scope == "phi":
            model.eval()
        batch = dict(inputs)  # Trainer takes the labels out for label smoothing
        loss, outputs = inner(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        share = self._share_of_update(num_items_in_batch)
        task_loss = loss / share
        guided = self.phase.loss(batch, outputs, task_loss)
        if guided is not task_loss:  # where it is, nothing may differ by a bit
            loss = share * guided
        return (loss, outputs) if return_outputs else loss

    def _share_of_update(self, num_items_in_batch: Any) -> float:
        """By what Trainer's loss was divided for gradient accumulation already, where it will not divide it itself."""
        scaled = getattr(self, "loss_is_scaled_for_ga", None)  # said by a subclass, where transformers asks for it
        if scaled is None:
            scaled = (self.model_accepts_loss_kwargs and num_items_in_batch is not None) or self.compute_loss_func
        return 1 / self.current_gradient_accumulation_steps if scaled else 1.0

    def _guide_update(self, step: int) -> None:
        """Between backward and optimizer step: the whole of the method, on the reduced gradient."""
        moving = set(self.phase.moving.names)
        for name, parameter in self.model.named_parameters():  # by name: wrappers replace the objects
            if name not in moving:
                parameter.grad = None  # where it could not be frozen, it is not moved
        if not self.phase.started or self.phase.before:
            self.phase.start(step)
        self.phase.advance(step)
        self.phase.correct()

    def _finish_run(self) -> None:
        """Put the best phi in place, merge it, and leave the model as ordinary as it came."""
        best_is_loaded = self.args.load_best_model_at_end and self.state.best_model_checkpoint is not None
        if self.phase.started and not best_is_loaded:
            self.phase.finish(self.state.global_step)
        inserted = bool(self.phi.inserted)
        self.phi.merge()
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(self._requires_grad.get(name, True))
        if inserted:
            self.optimizer = self.lr_scheduler = None  # they hold parameters that are gone

    # Optimizer and schedule

    def create_optimizer(self, model=None):
        fresh = self.optimizer is None
        optimizer = super().create_optimizer() if model is None else super().create_optimizer(model)
        if self.guided and fresh and self.args.phi_learning_rate is not None:
            give_own_learning_rate(optimizer, self.phi.parameters, self.args.phi_learning_rate)
        return optimizer

    def create_scheduler(self, num_training_steps, optimizer=None):
        """Each phase runs the user's schedule once: the first over its own steps, as a shorter Trainer run would."""
        if not self.guided or self.lr_scheduler is not None:
            return super().create_scheduler(num_training_steps, optimizer)
        args, start, unguided = self.args, self._metric_start, self._unguided_start
        scheduler = super().create_scheduler(start or unguided, optimizer)
        if start:
            restart_schedule(scheduler, self.phi.parameters, args, start, unguided)
        if unguided < num_training_steps:
            rate = args.unguided_learning_rate or args.phi_learning_rate or args.learning_rate
            raise_learning_rate(scheduler, self.phi.parameters, unguided, num_training_steps, rate)
        return scheduler

    # Saving, and going on

    def log(self, logs, start_time=None):
        if self.phase is not None and "loss" in logs:
            logs.update({f"metricopt/{name}": value for name, value in self.phase.log_scalars().items()})
        super().log(logs, start_time)

    def _save(self, output_dir=None, state_dict=None):
        if self.guided and self.phi.inserted:
            state_dict = self.phi.merged_state_dict(self.model.state_dict() if state_dict is None else state_dict)
        super()._save(output_dir, state_dict)

    def _save_checkpoint(self, model, trial):
        if self.guided and self.args.should_save and not self.args.save_only_model:
            folder = os.path.join(self._get_output_dir(trial), f"checkpoint-{self.state.global_step}")
            checkpoint.save(
                {
                    "phi": self.phi.state_dict(),
                    "ledger": self.ledger.state_dict(),
                    "phase": self.phase.state_dict() if self.phase.started else None,
                },
                folder,
            )
        super()._save_checkpoint(model, trial)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        with checkpoint.readable(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.guided:
            self._load_phi(resume_from_checkpoint)

    def _issue_warnings_after_load(self, load_result):
        if self.guided:  # saved merged, as they should be; `_load_phi` puts them back
            load_result.missing_keys[:] = [k for k in load_result.missing_keys if k not in self.phi.inserted]
        super()._issue_warnings_after_load(load_result)

    def _load_best_model(self):
        super()._load_best_model()
        if self.guided:
            self._load_phi(self.state.best_model_checkpoint)

    def _load_phi(self, folder: str) -> None:
        """The model's weights were saved merged: put phi and what lies under it back."""
        if os.path.exists(os.path.join(folder, checkpoint.JSON_FILE)):
            self.phi.load_state_dict(checkpoint.load(folder)["phi"])
        else:  # saved by a plain Trainer, or with save_only_model: the merged weights and the identity are the same
            for name in self.phi.inserted:
                nn.init.zeros_(self.model.get_parameter(name))

    def _load_optimizer_and_scheduler(self, folder):
        with checkpoint.readable(folder):
            super()._load_optimizer_and_scheduler(folder)
        if self.guided and folder is not None:
            state = checkpoint.load(folder)
            self.ledger.load_state_dict(state["ledger"])
            if state["phase"] is not None:
                self.phase.load_state_dict(state["phase"])

    # Building the parts

    @property
    def _parallel(self) -> bool:
        return self.args.world_size > 1

    def _build_phi(self, model: nn.Module) -> PhiSpace:
        given = self._given_phi
        if given is None or isinstance(given, str):
            phi = spaces.from_spec(model, given or self.args.phi)
        elif isinstance(given, PhiSpace):
            phi = given
        else:
            phi = given(model)
        if phi.model is not model:
            raise ConfigurationError(
                "phi was built on another model than the trainer's. With model_init, or to train again, pass a "
                "function that builds it: phi=lambda model: FiLM(model, layers=...)."
            )
        preflight.check_value_function(self._given_value_function, phi, self.metric, self.args)
        return phi

    def _build_phase(self, max_steps: int) -> MetricPhase:
        args, metric_steps = self.args, max_steps - self._metric_start
        guide = self._given_guide or guides.from_spec(args.guide, self._given_value_function)
        before = self._metric_start if guide.in_first_phase else 0
        given = self._given_value_function
        dim = min(args.phi_dim, self.phi.dim) if given is None else given.num_coordinates
        kinds = ("predictions", "scores") if args.observe == "predictions" else ("scores",)
        plans = [PhasePlan.from_args(args, kind, metric_steps, before, dim) for kind in kinds]
        ledger = Ledger(plans[0].calls, plans[0].passes)
        folds = data.folds(self.observation_dataset, args.observation_folds, args.seed)
        if len(folds) < args.observation_folds:
            logger.warning("The observation set cannot be divided: every call sees all of it (observation_folds=1).")
        evaluator, selection = self._evaluator(folds, ledger, progress=True), self.selection_dataset
        return MetricPhase(
            phi=self.phi,
            moving=self.phi if guide.scope == "phi" else spaces.trainable(self.model),
            observer=Observer(evaluator, plans[0].perturbation_std, args.seed),
            selector=None if selection is None else self._evaluator([selection], ledger),
            guide=guide,
            make_coordinates=self._make_coordinates,
            plans=plans,
            on_all_rows=args.metric_on_all_rows,
        )

    def _evaluator(self, parts: Sequence[Any], ledger: Ledger, progress: bool = False) -> Evaluator:
        args = self.args
        return Evaluator(
            self.phi,
            self._predict,
            [
                data.in_order(*self._columns(part, args.eval_batch_size), num_workers=args.dataloader_num_workers)
                for part in parts
            ],
            self.metric,
            ledger,
            args.observation_cache_gb * 1e9,
            args.eval_do_concat_batches,
            args.process_index,
            args.world_size,
            progress and not args.disable_tqdm and self.is_local_process_zero(),
        )

    def _columns(self, dataset: Any, batch_size: int) -> tuple[Any, int, Callable]:
        """`dataset` and a collator without the columns that the model does not take, as Trainer's loaders have them."""
        if hasattr(dataset, "column_names") and hasattr(dataset, "remove_columns"):
            return self._remove_unused_columns(dataset, "observation"), batch_size, self.data_collator
        return dataset, batch_size, self._get_collator_with_removed_columns(self.data_collator, "observation")

    def _predict(self, batch: Any) -> BatchOutput:
        with self._own_token_count():
            loss, logits, labels = self.prediction_step(self.model, batch, False, self._ignore_keys)
        if self.preprocess_logits_for_metrics is not None:
            logits = self.preprocess_logits_for_metrics(logits, labels)
        wanted = self.args.include_for_metrics
        main_input = getattr(self.model, "main_input_name", "input_ids")
        return BatchOutput(
            logits,
            labels,
            loss.repeat(len(batch[main_input])) if "loss" in wanted and loss is not None else None,
            self._prepare_input(batch[main_input]) if "inputs" in wanted else None,
        )

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
        """The metric's first calls, one on each fold, before any training time is spent."""
        evaluator = self.phase.evaluator
        try:
            scores = [evaluator.evaluate("check", part) for part in range(len(evaluator.parts))]
        except MetricError as error:
            raise MetricError(
                f"{error}\nThis was the first call of the metric, on the observation set, before training; nothing "
                "was trained. The metric is called with an EvalPrediction of a whole fold of that set (predictions, "
                "label_ids as numpy arrays; of all of it with observation_folds=1) and must return one finite number, "
                "or a dict that holds one."
            ) from error
        score = sum(scores) / len(scores)
        direction = "greater" if self.metric.greater_is_better else "smaller"
        logger.info(f"{self.metric.name} before training: {score:.4f} on the observation set ({direction} is better).")

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

    def _make_coordinates(self, kind: str | None = None) -> Coordinates:
        """Q: the given value function's, else from the present phi, by default of the kind that the config names."""
        args, given = self.args, self._given_value_function
        if given is not None and given.signature is not None:
            return given.coordinates_from(self.phi.read())
        generator = torch.Generator().manual_seed(args.seed)
        dataset, batch_size, collate = self._columns(self.train_dataset, args.train_batch_size)
        label_name = self.label_names[0] if self.label_names else "labels"
        with undisturbed(self.model), torch.enable_grad():
            return make_coordinates(
                kind or args.phi_coordinates,
                self.phi,
                args.phi_dim,
                generator,
                lambda count: data.random_batches(dataset, batch_size, count, collate, generator),
                lambda: data.group_batches(dataset, label_name, 4 * batch_size, collate, generator),
                lambda batch: self.compute_loss(self.model, self._prepare_inputs(batch)),
                args.process_index,
                args.world_size,
            )

    def _freeze(self) -> None:
        moving = set(self.phase.moving.names)
        for name, parameter in self.model.named_parameters():
            if name not in moving:
                parameter.requires_grad_(False)
