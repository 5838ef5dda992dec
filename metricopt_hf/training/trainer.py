"""MetricOptTrainer: transformers.Trainer, guided by the metric that its user named."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn
from transformers.trainer_utils import get_last_checkpoint

from .. import phi as spaces
from ..errors import ConfigurationError
from ..evaluation.ledger import Ledger
from ..evaluation.observation import Observation
from ..guides import Guide
from ..value import OVER_PHI
from . import checkpoint, optimization, preflight, ranks
from .modes import Pins, Rest
from .observing import ObservingTrainer
from .phase import MetricPhase
from .plan import PhasePlan
from .rehearsal import GUIDE_STATE, Stillness, attributes_kept, first_that_works, is_trainers, told, untouched
from .watch import CHANGED, NO_STEPS, TOO_EARLY, Watch, followed, sums

logger = logging.getLogger(__name__)

FIRST, METRIC = "first phase", "metric phase"


class MetricOptTrainer(ObservingTrainer):
    """`Trainer` that also follows a black-box metric (after MetricOpt; Huang, Zhai, Guo and Susskind, CVPR 2021).

    A run has two phases (`metric_start_ratio`). The first is Trainer's own. In the second, everything but phi is frozen
    and in eval mode (else batch statistics and dropout would move, and the metric would be no function of phi). The
    model's predictions are interpolated around phi, the metric is called on them, a value function is fitted to what it
    answers, and its gradient is blended into the task gradient as far as it has proved to predict. After each 20th of
    the phase phi is evaluated on the selection split. At the end the best phi by that split, with its output bias tuned
    where that split prefers it, is put in place and merged into plain weights. Without a metric this class is Trainer.

    Takes all arguments of `Trainer`, with `args` a `MetricOptConfig`, and:

    Args:
        metric: what to optimise: an `evaluate` module, its name or path, a callable `EvalPrediction -> number or dict`,
            a `Metric`, or a `ModelMetric` for a black box that wants the model. Default: `args.metric_command`,
            `args.metric_name_or_path`, else `compute_metrics` and `metric_for_best_model`;
            where neither names a metric (or only the loss), nothing is done.
        observation_dataset: where the metric is observed; default: cut from `eval_dataset` with `args.seed`.
        selection_dataset: where the best phi is chosen; default: likewise, disjoint.
        phi: a `PhiSpace` on the model, a function that builds one on a model (needed with `model_init`), or what
            `args.phi` could be; default: `args.phi`.
        value_function: one to start from; default: `args.value_function_name_or_path`. One over phi brings its
            coordinates; one over behaviour is for `guide="behaviour"`.
        guide: a `Guide`; default: from `args.guide`.
        coordinates: the compact coordinates of phi that the value function sees, as many as `args.phi_dim`:
            "gradient_pca", principal directions of mini-batch loss gradients; "group_gradients", gradients of the loss
            per class, as many as there are; "random"; or "identity", all of phi.

    Nothing is asked of a trainer that only predicts. `train` settles what it needs, and tries once, before its first
    step, whatever only the metric phase does.

    Raises, from `train` and before any training:
        ConfigurationError, PhiError, ValueFunctionError: something in the arguments cannot work.
        CheckpointError: the checkpoint to resume from cannot be read, or is of another run.
        MetricError: the metric's very first call fails; later failures only drop observations.

    Example:
        trainer = MetricOptTrainer(
            model, MetricOptConfig("out", metric_for_best_model="f1"), train_dataset=train, eval_dataset=validation,
            compute_metrics=compute_metrics)
        trainer.train()
    """

    phase: MetricPhase | None = None
    _stage: str | None = None  # which phase a micro-batch is in, while it is computed
    _requires_grad: dict[str, bool] | None = None  # before the run; None outside of one
    _rest: Rest | None = None  # of the model, beside what is tuned
    _left_out: frozenset[str] = frozenset()  # of phi, by the user's own optimizer
    _rehearsal_due = False
    _delivered: dict[str, float | None] | None = None  # sums of the weights that a guided run put in place

    # What a user reads

    @property
    def observations(self) -> list[Observation]:
        """The real observations of the last run, the latest 4,096."""
        return [] if self.phase is None else list(self.phase.rounds.trajectory)

    @property
    def ledger(self) -> Ledger:
        """Metric calls and seconds of the last run, by purpose."""
        return Ledger() if self.phase is None else self.phase.ledger

    # The run

    def train(self, resume_from_checkpoint=None, trial=None, ignore_keys_for_eval=None):
        if not self.guided:
            preflight.tell_unguided(self.args, self.compute_metrics, self.eval_dataset)
            return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)
        self.settle()
        self._ignore_keys = ignore_keys_for_eval
        folder = get_last_checkpoint(self.args.output_dir) if resume_from_checkpoint is True else resume_from_checkpoint
        if folder:  # else Trainer says what is missing
            checkpoint.check(folder)
        with self._wrapped(), ranks.told_when_lost(self.args):
            return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)

    @contextmanager
    def _wrapped(self) -> Iterator[None]:
        """Inside, the run is guided whatever a subclass overrides, and afterwards everything is as it was.

        What may be overridden is wrapped on the instance, around the outermost override, so that none is passed by.
        Trainer's calls of callbacks cannot be overridden away; the first in their row is ours.
        """
        wrappers = {
            "training_step": self._guided_training_step,
            "compute_loss": self._guided_compute_loss,
            "create_optimizer": self._guided_create_optimizer,
        }
        if not is_trainers(self.save_model):  # Trainer's own asks the model for its state, which is plain
            wrappers["save_model"] = self._save_merged
        before = {name: vars(self)[name] for name in wrappers if name in vars(self)}
        self._inner = {name: getattr(self, name) for name in wrappers}
        for name, wrapper in wrappers.items():
            setattr(self, name, wrapper)
        watch = Watch(self)
        self.callback_handler.callbacks.insert(0, watch)
        try:
            yield
            self._tell_changed()
        finally:
            self.callback_handler.callbacks.remove(watch)
            for name in wrappers:
                delattr(self, name)
            vars(self).update(before)
            self._put_back()

    def compute_loss(self, model, inputs, *args, **kwargs):
        if self.guided and (own := preflight.metric_columns(self.label_names, self.model) & inputs.keys()):
            inputs = {name: column for name, column in inputs.items() if name not in own}
        return super().compute_loss(model, inputs, *args, **kwargs)

    def _prepare_for_training(self, max_steps, train_dataloader, resume_from_checkpoint):
        if not self.guided:
            return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        if self._requires_grad is not None:  # the batch found no room in memory: anew with a smaller one
            self._put_back()
            self.phi.attach()
            if resume_from_checkpoint is not None:
                self._load_phi(resume_from_checkpoint)
        if self.optimizer is not None:
            optimization.forget(self.optimizer, self.phi.parameters)
        self._requires_grad = {name: p.requires_grad for name, p in self.model.named_parameters()}
        for parameter in self.phi.parameters:
            parameter.requires_grad_(True)
        self._metric_start = round(self.args.metric_start_ratio * max_steps)
        if self._metric_start == max_steps:
            logger.warning(NO_STEPS.format(steps=max_steps, ratio=self.args.metric_start_ratio))
        self._schedule = optimization.PhiSchedule(self.args, self._metric_start, max_steps)
        self.phase = self._build_phase(max_steps)
        self._rest, self._pins = Rest(self.model, self.phase.moving.names), None
        self._updated_at = -1
        if self._metric_start == 0 and is_trainers(self._inner["training_step"]):
            self._rest.freeze()
        model, train_dataloader = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        self._rehearsal_due = True
        return model, train_dataloader

    def _guided_training_step(self, model, inputs, *args, **kwargs):
        """A micro-batch; inside is Trainer's step, or what a subclass made of it."""
        step = self.state.global_step
        if step >= self._metric_start:
            with self._still():
                loss = self._staged(METRIC, model, inputs, *args, **kwargs)
                if self.accelerator.sync_gradients:
                    self._guide_update(step)
            return loss
        if self.phase.guide.in_first_phase and not self.phase.started:
            with attributes_kept(self):
                self.phase.start(step, before=True)
        loss = self._staged(FIRST, model, inputs, *args, **kwargs)
        if self.accelerator.sync_gradients:
            if self.phase.started:
                with attributes_kept(self):
                    self.phase.advance(step)
            for name in self._tuned_only:  # the first phase is Trainer's own
                self.model.get_parameter(name).grad = None
        return loss

    def _staged(self, stage: str, *args, **kwargs):
        self._stage = stage
        try:
            return self._inner["training_step"](*args, **kwargs)
        finally:
            self._stage = None

    @contextmanager
    def _still(self) -> Iterator[None]:
        """Inside, what is not tuned stands still, whoever calls `model.train()`."""
        if self._stillness.frozen:
            self._rest.freeze()
        if self._pins is None:
            self._pins = Pins(self.model, self._stillness.eval_mode)
        with self._pins.inside() if self.phase.guide.scope == "phi" else nullcontext():
            yield

    def _guided_compute_loss(self, model, inputs, *args, **kwargs):
        """The loss of a micro-batch; the guide's instead where it has one, but never in evaluation."""
        inner = self._inner["compute_loss"]
        if self._stage is None or not self.phase.started or type(self.phase.guide).loss is Guide.loss:
            return inner(model, inputs, *args, **kwargs)
        return self._loss_of_guide(inner, model, inputs, *args, **kwargs)

    def _loss_of_guide(self, inner: Callable, model, inputs, return_outputs=False, num_items_in_batch=None):
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
        self._rest.drop_gradients()  # where it could not be frozen, it is not moved
        starts = not self.phase.started or self.phase.before
        if starts or self.phase.due(step):
            with attributes_kept(self):  # what a subclass keeps of losses and batches is of training
                if starts:
                    self.phase.start(step)
                self.phase.advance(step)
        self.phase.correct()
        self._schedule.apply(self.optimizer, self.lr_scheduler, self.phi, self.phase.moving, step)
        self._updated_at = step

    def _check_guided(self) -> None:
        """Behind each optimizer step: was it guided, if it should have been?"""
        step = self.state.global_step - 1
        if step >= self._metric_start and self._updated_at != step:
            raise ConfigurationError(
                f"Step {step} belongs to the metric phase, which begins at {self._metric_start}, and was not guided: "
                f"{type(self).__name__} takes its steps without `self.training_step`, where guidance is blended in. "
                "Let its training loop call self.training_step(model, inputs, num_items_in_batch) for each micro-batch."
            )

    def _finish_run(self) -> None:
        """Put the best phi in place, and leave the model as ordinary as it came."""
        best_is_loaded = self.args.load_best_model_at_end and self.state.best_model_checkpoint is not None
        if self.phase.started and not best_is_loaded:
            with attributes_kept(self):
                self.phase.finish(self.state.global_step)
        elif not self.phase.started and self.state.global_step <= self._metric_start < self.state.max_steps:
            logger.warning(TOO_EARLY.format(step=self.state.global_step, start=self._metric_start))
        self._put_back()
        self._delivered = sums(self.model) if self.phase.started else None
        if followed(self.callback_handler.callbacks):
            self.phi.attach()  # the identity by now

    def _tell_changed(self) -> None:
        """Warn of callbacks that put other weights in place when training ends."""
        if self._delivered is not None and self._delivered != sums(self.model):
            logger.warning(CHANGED.format(self.metric.name))

    def _put_back(self) -> None:
        """However the run ended: merge phi as it is, and let train what was trainable."""
        if self._phi is not None:
            self._phi.merge()
        if self._rest is not None:
            self._rest.thaw()
        tuned = () if self._requires_grad is None else self._phi.names
        for name, parameter in self.model.named_parameters():
            if name in tuned:
                parameter.requires_grad_(self._requires_grad[name])
        self._requires_grad = None

    def _save_merged(self, *args, **kwargs):
        with self.phi.merged():
            return self._inner["save_model"](*args, **kwargs)

    # Optimizer and schedule

    def _guided_create_optimizer(self, *args, **kwargs):
        optimizer = self._inner["create_optimizer"](*args, **kwargs)
        held = optimization.hold(self.optimizer, self.model, self.phi.parameters)
        self._left_out |= {name for name, was_held in zip(self.phi.names, held, strict=True) if not was_held}
        if self.phase.guide.scope == "all" and self.lr_scheduler is None:
            optimization.set_apart(self.optimizer, self.phi.parameters)  # beside others that move, at a rate of its own
        ours = self._left_out | set(self.phi.inserted)
        self._tuned_only = {name for name in self.phi.names if name in ours or not self._requires_grad[name]}
        return optimizer

    def create_scheduler(self, num_training_steps, optimizer=None):
        """For the steps of the first phase alone, as in a shorter Trainer run; phi has its own (`PhiSchedule`)."""
        if self.guided and self._requires_grad is not None:
            num_training_steps = self._metric_start or num_training_steps
        return super().create_scheduler(num_training_steps, optimizer)

    def _get_learning_rate(self):
        if self._requires_grad is not None and self._updated_at >= self._metric_start:
            return optimization.learning_rate(self.optimizer, self.phi.parameters)
        return super()._get_learning_rate()

    def log(self, logs, start_time=None):
        if self.phase is not None and "loss" in logs:
            logs.update({f"metricopt/{name}": value for name, value in self.phase.log_scalars().items()})
        super().log(logs, start_time)

    # Building the parts

    def _build_phase(self, max_steps: int) -> MetricPhase:
        args, metric_steps = self.args, max_steps - self._metric_start
        guide = self._make_guide()
        before = self._metric_start if guide.in_first_phase else 0
        given = self._given_value_function
        dim = self.phi.dim if self._kind_of_coordinates == "identity" else min(args.phi_dim, self.phi.dim)
        dim = given.num_coordinates if given is not None and guide.over == OVER_PHI else dim
        ledger, selection = Ledger(), self.selection_dataset
        of_model = not self.metric.of_predictions
        if of_model and args.observe != "scores":
            logger.warning(
                f"Scores are observed, not predictions: {self.metric.name} is a metric of the model "
                '(observe="scores" says so without this warning).'
            )
        selects = selection is not None or of_model
        return MetricPhase(
            phi=self.phi,
            moving=self.phi if guide.scope == "phi" else spaces.trainable(self.model),
            evaluator=self._evaluator(self.observation_dataset, ledger, progress=True),
            selector=self._evaluator(selection, ledger, split="selection") if selects else None,
            guide=guide,
            make_coordinates=self._make_coordinates,
            make_plan=partial(self._make_plan, metric_steps, before, dim),
        )

    def _make_plan(
        self, steps: int, before: int, dim: int, observe: str | None = None, calls: int | None = None
    ) -> PhasePlan:
        observe = (observe or self.args.observe) if self.metric.of_predictions else "scores"
        return PhasePlan.from_args(self.args, observe, steps, before, dim, calls)

    def _rehearse(self) -> None:
        """Before the first step, when callbacks have set up what a step needs."""
        due, self._rehearsal_due = self._rehearsal_due, False
        if due and self.state.global_step == 0:  # else the metric has been called in the run that is resumed
            with attributes_kept(self):
                self._check_metric()
        if due and self._metric_start < self.state.max_steps:
            self._stillness = self._rehearsed(self.model_wrapped)

    def _rehearsed(self, model: nn.Module) -> Stillness:
        """How to hold still what is not tuned, after a rehearsal of the metric phase on one batch.

        Raises:
            ConfigurationError: the metric phase would fail.
        """
        own_step = not is_trainers(self._inner["training_step"])
        batch = None
        with untouched(self, weights=own_step or not is_trainers(self._inner["compute_loss"])):
            batch = next(self._train_batches(1, torch.Generator().manual_seed(self.args.seed)), None)
            if batch is None:
                return Stillness()  # Trainer says that there is no sample
            inputs, num_items = self.get_batch_samples(iter([batch]), 1, self.args.device)
            self.current_gradient_accumulation_steps = self.args.gradient_accumulation_steps

            def attempt(stillness: Stillness) -> int:
                self._stillness, self._pins = stillness, None
                self._rest = Rest(self.model, self.phase.moving.names)
                for name, parameter in self.model.named_parameters():
                    parameter.requires_grad_(name in self.phi.names or self._requires_grad[name])
                    parameter.grad = None
                # FSDP2 has no gradient where it does not share it
                alone = nullcontext() if self._sharded else self.accelerator.no_sync(model)
                with self._still(), alone:
                    self._staged(METRIC, model, copy.copy(inputs[0]), num_items)
                return sum(p.grad is not None for p in self.phase.moving.parameters)

            # gradients of the rest: DistributedDataParallel waits for them, a step of the user's own may look at them
            frozen = (False,) if own_step or self.args.world_size > 1 else (True, False)
            candidates = [Stillness(freeze, mode) for mode in (True, False) for freeze in frozen]
            wanted = len(self.phase.moving.parameters)
            self._stillness = chosen = first_that_works(candidates, attempt, wanted, self.args.world_size)
            self._tell_idle(batch)
            if not self.phase.started:
                with told("computing coordinates", 'coordinates="random" needs no gradients.'):
                    coordinates = self._make_coordinates(max_batches=1)
                with told("saving the guide's state", GUIDE_STATE), TemporaryDirectory() as folder:
                    checkpoint.save(self._guidance_state(self.phase.rehearse(coordinates)), folder)
        return chosen
