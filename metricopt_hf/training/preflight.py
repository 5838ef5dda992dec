"""Before any training: which metric, on which data, and whether this run can be guided at all."""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Callable, Sequence
from typing import Any

import evaluate
from accelerate.utils import DistributedType
from torch import nn
from transformers import Trainer, TrainingArguments

from ..errors import ConfigurationError, ValueFunctionError
from ..evaluation import data, modules
from ..evaluation.metric import Metric, takes_batches
from ..evaluation.model_metric import CommandMetric
from ..hub import ValueFunction
from ..phase.plan import DEFAULT_STEPS
from ..phi import PhiSpace
from .config import MetricOptConfig
from .subclasses import is_overridden, without_super

logger = logging.getLogger(__name__)


def names_metric(given: Any, args: TrainingArguments, compute_metrics: Callable | None, eval_dataset: Any) -> bool:
    """Whether there is a metric to optimise: one given, one that `args` names, or Trainer's own."""
    if given is not None or any(getattr(args, name, None) for name in ("metric_name_or_path", "metric_command")):
        return True
    return compute_metrics is not None and metric_name(args, eval_dataset) is not None


def require_metric(guided: bool) -> None:
    """Raises ConfigurationError where there is no metric to diagnose."""
    if not guided:
        raise ConfigurationError(
            "There is no metric to diagnose: give the trainer one (metric=..., or compute_metrics and "
            "metric_for_best_model in the config)."
        )


def warn_of_no_guidance(args: TrainingArguments, compute_metrics: Callable | None, eval_dataset: Any) -> None:
    """Warn of a run without guidance that has one of the two parts of a metric."""
    name, why = metric_name(args, eval_dataset), None
    if compute_metrics is not None:
        why = "compute_metrics is given, but metric_for_best_model names none of its metrics"
    elif name is not None:
        why = f"metric_for_best_model={name!r} names a metric, but there is no compute_metrics that would compute it"
    if why is not None:
        logger.warning(
            f"This run is Trainer's own, and nothing is guided: {why}. Set both, as in compute_metrics=..., "
            'metric_for_best_model="f1", greater_is_better=True; or pass the metric itself, as metric=...'
        )


def resolve_metric(
    given: Any,
    args: TrainingArguments,
    compute_metrics: Any,
    eval_dataset: Any,
    processor: Any = None,
    directed: bool = True,
) -> Metric:
    """The metric to optimise; `names_metric` says whether there is one.

    Args:
        processor: saved beside the model, for a command.
        directed: whether it must be known which way the metric is better, as it need not be to report it.

    Raises:
        ConfigurationError: `args` is no `MetricOptConfig`; the metric cannot be loaded; or nothing says which way it is
            better.
    """
    if not isinstance(args, MetricOptConfig):
        raise ConfigurationError(
            f"MetricOptTrainer needs its arguments as MetricOptConfig, got {type(args).__name__}: "
            "change the class name there too; all fields stay."
        )
    if args.metric_command is not None:
        if given is not None or args.metric_name_or_path is not None:
            raise ConfigurationError(
                "metric_command is given beside another metric (metric=... or metric_name_or_path): leave one of them "
                "out."
            )
        name = metric_name(args, eval_dataset) or "metric_command"
        greater = args.direction_of(name) if directed else True
        return CommandMetric(args.metric_command, name, greater, args.metric_timeout, processor)
    given = args.metric_name_or_path if given is None else given
    description = ""
    if isinstance(given, (str, os.PathLike)):
        given = modules.load(os.fspath(given))
    if isinstance(given, evaluate.EvaluationModule):
        description = f"{given.description} {given.inputs_description}"
    if given is None:
        batchwise = args.batch_eval_metrics and takes_batches(compute_metrics)
        name = str(metric_name(args, eval_dataset))
        metric = Metric(compute_metrics, name, True, args.metric_timeout, exact=True, batchwise=batchwise)
    else:
        kwargs: Any = args.metric_kwargs  # a dict: JSON has been read
        metric = modules.resolve(given, True, args.metric_inputs, kwargs, args.metric_timeout)
    if directed and not isinstance(given, Metric):  # a user's knows its direction
        metric.greater_is_better = args.direction_of(metric.name, description)
    return metric


def metric_name(args: TrainingArguments, eval_dataset: Any) -> str | None:
    """`metric_for_best_model` without the name of an eval set; None where it is the loss, which is trained anyway."""
    name = (args.metric_for_best_model or "loss").removeprefix("eval_")
    if (part := eval_part(args, eval_dataset)) is not None:
        name = name.removeprefix(f"{part}_")
    return None if name == "loss" else name


def eval_part(args: TrainingArguments, eval_dataset: Any) -> str | None:
    """The key of the eval set, in a dict of them, that `metric_for_best_model` names; the first where it names none."""
    if not isinstance(eval_dataset, dict):
        return None
    name = (args.metric_for_best_model or "").removeprefix("eval_")
    named = [part for part in eval_dataset if name.startswith(f"{part}_")]
    return max(named, key=len) if named else next(iter(eval_dataset))


def split(
    observation: Any,
    selection: Any,
    eval_dataset: Any,
    args: MetricOptConfig,
    label_name: str,
    row_groups: str | None = None,
) -> tuple[Any, Any]:
    """The observation and the selection set: those given, else cut from the eval set, with a warning.

    Raises:
        ConfigurationError: there is nothing to cut from, or it is too small.
    """
    if observation is not None and selection is not None:
        return observation, selection
    part = eval_part(args, eval_dataset)
    source = eval_dataset if part is None else eval_dataset[part]
    if source is None:
        raise ConfigurationError(
            "The metric has to be observed somewhere: pass eval_dataset, or observation_dataset and selection_dataset."
        )
    logger.warning(
        "eval_dataset serves the metric guidance (observation, selection), so what evaluate() reports on it is not "
        "held out. Pass observation_dataset and selection_dataset, or report on another set."
    )
    if observation is None and selection is None:
        return data.cut(source, args.observation_size, args.seed, label_name, row_groups)
    return (source, selection) if observation is None else (observation, source)


def check_row_groups(name: str | None, label_names: Sequence[str]) -> str | None:
    """Raises ConfigurationError where `row_groups` names no label column beside others."""
    if name is not None and name not in label_names[1:]:
        raise ConfigurationError(
            f"row_groups={name!r} must be a label column behind the labels, and label_names={list(label_names)}: say "
            f"label_names={[*label_names, name] if name not in label_names else ['labels', name]}."
        )
    return name


def metric_columns(label_names: Sequence[str], model: nn.Module) -> set[str]:
    """The columns of `label_names` that only the metric reads, such as groups: the model takes others of them."""
    base = model.get_base_model() if hasattr(model, "peft_config") else model
    taken = set(label_names) & set(inspect.signature(base.forward).parameters)
    return set(label_names) - taken if taken else set()


def check_supported(trainer: Trainer, distributed_type: DistributedType, plugin: Any = None) -> None:
    """Refuse what cannot work.

    Args:
        plugin: accelerate's, of FSDP or DeepSpeed.

    Raises:
        ConfigurationError: with the reason and what to do instead.
    """
    args = trainer.args
    if distributed_type == DistributedType.DEEPSPEED and plugin.hf_ds_config.is_zero3():
        raise ConfigurationError(
            "DeepSpeed's ZeRO-3 cannot be guided: it shares out the parameters, so no process can read phi or write to "
            'it. Set "zero_optimization": {"stage": 2} in its configuration, or use FSDP2.'
        )
    if distributed_type == DistributedType.FSDP:
        check_fsdp(args, plugin)
    if args.n_gpu > 1:
        raise ConfigurationError(
            "Several GPUs in one process (DataParallel) are not supported: start one process per GPU with "
            "`torchrun --nproc_per_node N script.py`, or set CUDA_VISIBLE_DEVICES to one of them."
        )
    if args.dataloader_persistent_workers and is_overridden(trainer, "get_eval_dataloader"):
        raise ConfigurationError(
            "get_eval_dataloader is overridden, and with dataloader_persistent_workers Trainer keeps the first loader "
            "that it makes, so that all parts of eval_dataset would be the first one. Set "
            "dataloader_persistent_workers=False."
        )


def check_metric(metric: Metric, distributed_type: DistributedType) -> None:
    """Raises ConfigurationError for a metric of the model where no process has the whole model."""
    if not metric.of_predictions and distributed_type == DistributedType.FSDP:
        raise ConfigurationError(
            f"The metric {metric.name!r} is one of the model, and is given a copy of it, which FSDP2 has shared out: "
            "use DDP (leave out fsdp), or a metric of predictions."
        )


def num_metric_steps(args: MetricOptConfig, max_steps: int) -> int:
    """How many of the last optimizer steps follow the metric.

    Raises:
        ConfigurationError: more are asked for than there are steps.
    """
    if args.metric_steps is None:
        return min(DEFAULT_STEPS, max(1, max_steps // 2))
    if args.metric_steps > max_steps:
        raise ConfigurationError(
            f"metric_steps={args.metric_steps} is more than the {max_steps} optimizer steps of the run: set it lower, "
            f"or max_steps={args.metric_steps} for a model that is trained already."
        )
    return args.metric_steps


def check_training_step(trainer: Trainer, base: type) -> None:
    """Raises ConfigurationError for a subclass whose `training_step` can be seen never to call that of `base`."""
    if (name := without_super(trainer, "training_step", base)) is not None:
        raise ConfigurationError(
            f"{name}.training_step never calls super().training_step, where the metric phase makes its steps: let it "
            "do so, as in loss = super().training_step(model, inputs, num_items_in_batch)."
        )


def check_fsdp(args: MetricOptConfig, plugin: Any) -> None:
    """Phi is found in the model by name, before and after it is sharded.

    Raises:
        ConfigurationError: this plugin or these arguments prevent that.
    """
    if getattr(plugin, "fsdp_version", 1) != 2:
        raise ConfigurationError(
            "FSDP1 cannot be guided: it flattens the parameters, so phi is not among them any more. Set the version to "
            '2: fsdp_config={"version": 2} in the arguments, or `accelerate launch --fsdp_version 2`.'
        )
    if plugin.activation_checkpointing:
        raise ConfigurationError(
            "FSDP's own activation checkpointing renames the model's parameters, so phi is not found among them. Leave "
            "activation_checkpointing out of fsdp_config and set gradient_checkpointing=True in the arguments."
        )
    if args.torch_compile:
        raise ConfigurationError(
            "torch_compile under FSDP puts another module in the model's place, in which phi is not found. Leave out "
            "one of them."
        )


def load_value_function(given: ValueFunction | str | None, args: MetricOptConfig) -> ValueFunction | None:
    """The value function to start from: the one given or named, or None.

    Raises:
        ValueFunctionError: it cannot be loaded or trusted.
    """
    return ValueFunction.from_pretrained(given, token=args.hub_token) if isinstance(given, str) else given


def check_value_function(given: ValueFunction | None, phi: PhiSpace, metric: Metric) -> None:
    """A value function to start from must be one of this metric and this phi.

    Raises:
        ValueFunctionError: it is of another one, or was never part of a run, so that it brings no coordinates.
    """
    if given is None:
        return
    if given.signature is None:
        raise ValueFunctionError(
            "The value function given was never part of a run, so it does not say in which coordinates of phi it is: "
            "give one that was saved after a run, or start without it."
        )
    given.signature.check(phi.description, metric.name, metric.greater_is_better)
