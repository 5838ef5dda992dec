"""MetricOptTrainer: transformers.Trainer, whose last steps follow the metric that its user named."""

from __future__ import annotations

import os
from time import perf_counter
from typing import Any

from transformers import Trainer
from transformers.trainer_utils import TrainOutput

from ..diagnosis import Diagnosis
from ..evaluation.ledger import Ledger
from ..evaluation.metric import Metric
from ..hub import ValueFunction
from ..phase.phase import MetricPhase
from ..phi import PhiSpace
from . import building, checkpoint, preflight, reporting, sharing, steps
from .diagnose import diagnose
from .observing import MetricInputs, Observing
from .reporting import RunResult
from .setup import Given, Phi, Setup
from .steps import MetricPhaseCallback


class MetricOptTrainer(Trainer):
    """`Trainer` whose last steps follow a black-box metric (after MetricOpt; Huang, Zhai, Guo and Susskind, CVPR 2021).

    All steps but the last `metric_steps` are Trainer's, bit for bit. In each of the last, the model's predictions are
    linearised in phi, a few numbers of the model; the metric is called on linearised predictions; guides that are
    fitted to its values say which way it improves, and phi goes there. A real pass says whether that was right,
    else the step is taken back. At the end the selection split chooses between the steps and the model that they began
    from. Without a metric this class is Trainer.

    Takes all arguments of `Trainer`, with `args` a `MetricOptConfig`, and:

    Args:
        metric: what to optimise: an `evaluate` module, its name or path, a callable `EvalPrediction -> number or dict`,
            "evaluate:eval_x" for a number that `evaluate()` itself returns, at a pass for each observation,
            a `Metric`, or a `ModelMetric` for a black box that wants the model. Default: `args.metric_command`,
            `args.metric_name_or_path`, else `compute_metrics` and `metric_for_best_model`;
            where neither names a metric (or only the loss), nothing is done.
        observation_dataset: where the metric is observed; default: cut from `eval_dataset` with `args.seed`.
        selection_dataset: where the model that comes out is chosen; default: likewise, disjoint.
        phi: a `PhiSpace` on the model, a function that builds one on a model (needed with `model_init`), or what
            `args.phi` could be; default: `args.phi`.
        value_function: one to start from, of the same model and phi; or its folder, or its name on the Hub.
        guide: a `Guide`, or what `args.guide` could be; default: `args.guide`.
        row_groups: one of `label_names`, whose equal rows (pairs, pages of a document) the metric only makes sense of
            together: they stay together in random halves, and in what is cut from `eval_dataset`.
        post_process_function: `(examples, features, predictions) -> EvalPrediction` for the metric, as in transformers'
            question-answering example. `features` are the rows that were predicted, with all of their columns.
        eval_examples: the examples from which the features were made; default: the features themselves.

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

    post_process_function: Any = None  # a subclass may have it as a method
    eval_examples: Any = None
    around: MetricPhaseCallback  # of the run's metric phase
    whole_output: Any = None  # (prediction, data set) -> the argument of a post-processing, in place of the predictions

    def __init__(
        self,
        *args,
        metric: Any = None,
        observation_dataset: Any = None,
        selection_dataset: Any = None,
        phi: Phi = None,
        value_function: ValueFunction | str | None = None,
        guide: Any = None,
        row_groups: str | None = None,
        post_process_function: Any = None,
        eval_examples: Any = None,
        **kwargs,
    ):
        self.given = Given(metric, observation_dataset, selection_dataset, phi, value_function, guide, row_groups)
        self.setup: Setup | None = None
        self.phase: MetricPhase | None = None
        self.checkpoint_settings: dict[str, Any] | None = None  # those of the resumed checkpoint
        self.ignore_keys: list[str] | None = None  # model outputs that predictions leave out
        super().__init__(*args, **kwargs)
        if post_process_function is not None:
            self.post_process_function = post_process_function
        if eval_examples is not None:
            self.eval_examples = eval_examples
        self.metric_inputs = MetricInputs(self)
        self.compute_metrics: Any = reporting.with_metric(self, self.metric_inputs.wrapped(self.compute_metrics))

    # Results

    @property
    def guided(self) -> bool:
        """Whether there is a metric to optimise."""
        return self.given.names_metric(self)

    @property
    def metric(self) -> Metric | None:
        """The metric that is optimised; None where there is none."""
        return self.settled().metric if self.guided else None

    @property
    def phi(self) -> PhiSpace | None:
        """The numbers of the model that are tuned; None without a metric."""
        return self.settled().phi if self.guided else None

    @property
    def observation_dataset(self) -> Any:
        """The data set on which the metric is observed."""
        return self.settled().observation if self.guided else self.given.observation_dataset

    @property
    def selection_dataset(self) -> Any:
        """The data set on which the final model is chosen."""
        return self.settled().selection if self.guided else self.given.selection_dataset

    @property
    def result(self) -> RunResult | None:
        """The result of the last run, or of this one so far; None before its metric phase."""
        return reporting.result_of(self.phase) if self.phase is not None and self.phase.started else None

    @property
    def ledger(self) -> Ledger:
        """Metric calls, forward passes and seconds of the last run, by purpose."""
        return Ledger() if self.phase is None else self.phase.ledger

    def settled(self) -> Setup:
        """The metric, data and phi of a run, resolved and checked at the first call; `train` calls it itself.

        Raises:
            ConfigurationError, PhiError, ValueFunctionError: an argument cannot work; the message says what to do.
        """
        if self.setup is None or self.setup.phi.model is not self.model:
            self.setup = Setup.of(self, self.given)
        return self.setup

    def diagnose(self, worthwhile: float | None = None) -> Diagnosis:
        """Before any training: the gain of a bias per logit, the gain of phi beyond it, and their errors.

        Takes the time of some forward passes, and leaves everything as it was. Print it.

        Args:
            worthwhile: the smallest gain that is worth having, in the metric's unit; default: the metric's own
                standard error on the examples.

        Raises:
            ConfigurationError: there is no metric, or it is one of the model.
            MetricError: the metric fails at the start.
        """
        since = perf_counter()
        preflight.require_metric(self.guided)
        setup = self.settled()
        return diagnose(Observing(self, setup.metric, setup.phi), setup, worthwhile, since)

    # The run

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        if not self.guided:
            preflight.warn_of_no_guidance(self.args, self.compute_metrics, self.eval_dataset)
            return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)
        if self.model_init is None:
            self.settled()
        preflight.check_training_step(self, MetricOptTrainer)
        self.phase, self.ignore_keys = None, ignore_keys_for_eval
        self.checkpoint_settings = checkpoint.resumed(resume_from_checkpoint, self.args.output_dir)
        callbacks = list(self.callback_handler.callbacks)
        try:
            output = super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)
        finally:
            self.callback_handler.callbacks = callbacks
        reporting.warn_of_changed_weights(self)
        return output

    def _prepare_for_training(self, max_steps, train_dataloader, resume_from_checkpoint):
        if not self.guided:
            return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        count = preflight.num_metric_steps(self.args, max_steps)
        self.phase = building.phase(self, self.settled(), count)
        self.around = MetricPhaseCallback(self, max_steps - count, checked=resume_from_checkpoint is not None)
        others = [c for c in self.callback_handler.callbacks if not isinstance(c, MetricPhaseCallback)]
        self.callback_handler.callbacks = [self.around, *others]  # so that they save the chosen model at the end
        return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)

    def compute_loss(self, model, inputs, *args, **kwargs):
        if self.guided and (own := preflight.metric_columns(self.label_names, self.model) & inputs.keys()):
            inputs = {name: column for name, column in inputs.items() if name not in own}
        return super().compute_loss(model, inputs, *args, **kwargs)

    def training_step(self, model, inputs, num_items_in_batch=None):
        if self.phase is None or self.state.global_step < self.around.start:
            return super().training_step(model, inputs, num_items_in_batch)
        return steps.take(self, inputs)

    def call_model_init(self, trial=None):
        self.setup = None
        return super().call_model_init(trial)

    def log(self, logs, start_time=None):
        if self.phase is not None and "loss" in logs:
            logs.update({f"metricopt/{name}": value for name, value in self.phase.log_scalars().items()})
        super().log(logs, start_time)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval", **gen_kwargs
    ) -> dict[str, float]:
        """Trainer's numbers, and the optimised metric where they lack it."""
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        named = self.eval_dataset[dataset] if isinstance(dataset, str) else dataset
        with self.metric_inputs.evaluating(named, self.args):
            found = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix, **gen_kwargs)
        if (more := reporting.missing_score(self, named, metric_key_prefix, found)) is not None:
            found.update(more)
            self.log(more)
        return found

    # Checkpoints

    def _save_checkpoint(self, model, trial):
        if self.phase is None or self.args.save_only_model:
            return super()._save_checkpoint(model, trial)
        folder = os.path.join(self._get_output_dir(trial), f"checkpoint-{self.state.global_step}")
        state = building.state_of(self)  # on all ranks, which put the phi of a sharded model together
        with checkpoint.written(folder):
            if self.args.should_save:
                checkpoint.save(state, folder)
            super()._save_checkpoint(model, trial)
            if self.args.should_save and os.path.isdir(folder):  # a limit on checkpoints may have removed it again
                checkpoint.complete(folder, building.settings_of(self))

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        with checkpoint.readable(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, folder):
        with checkpoint.readable(folder):
            super()._load_optimizer_and_scheduler(folder)
        if self.phase is not None and folder is not None:
            building.resume(self, folder, self.around.start)

    # Sharing

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        with sharing.whole_weights(self, _internal_call and output_dir is not None and not self.args.push_to_hub):
            super().save_model(output_dir, _internal_call)

    def _save(self, output_dir=None, state_dict=None):
        with sharing.shareable_args(self):
            super()._save(output_dir, state_dict)
        if self.args.should_save:  # Trainer calls this on every rank, and one of them writes
            sharing.save_value_function(self, output_dir or self.args.output_dir)

    def create_model_card(self, *args, scores=None, comparison: str | None = None, **kwargs) -> None:
        """Write the cards of model and value function into `output_dir`.

        Takes all arguments of `Trainer.create_model_card`, and:

        Args:
            scores: the metric on splits that neither training nor selection saw, by the split's name; they become the
                `model-index`, where the task and the data set are known.
            comparison: Markdown on what other methods reached, such as a table.
        """
        if self.result is None:
            return super().create_model_card(*args, **kwargs)
        given = sharing.arguments_of(super().create_model_card, args, kwargs)
        sharing.write_cards(self, given, scores or {}, comparison)

    def init_hf_repo(self, *args, **kwargs):
        return sharing.pushed(self, lambda: super(MetricOptTrainer, self).init_hf_repo(*args, **kwargs))

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer.push_to_hub`: pushes `output_dir` with model, card and value function. Takes the arguments of
        `create_model_card` too.

        Raises:
            HubError: why it failed and what to do; everything is still in `output_dir`, and a second call pushes it.
        """
        return sharing.pushed(self, lambda: super(MetricOptTrainer, self).push_to_hub(*args, **kwargs))

    def _push_from_checkpoint(self, checkpoint_folder):
        sharing.before_push(self)
        with sharing.shareable_args(self):
            super()._push_from_checkpoint(checkpoint_folder)

    def _finish_current_push(self):
        super()._finish_current_push()
        sharing.warn_of_failed_pushes(self)
