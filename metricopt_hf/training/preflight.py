"""What is settled before any training: which metric, on which data, and whether this run can be guided at all."""

from __future__ import annotations

import copy
import inspect
import logging
import os
from collections.abc import Callable, Sequence
from typing import Any

import evaluate
from accelerate.utils import DistributedType
from torch import nn
from transformers import TrainingArguments

from ..errors import ConfigurationError, ValueFunctionError
from ..evaluation import data
from ..evaluation import metric as metrics
from ..evaluation.constraints import parse
from ..evaluation.metric import Metric
from ..evaluation.model_metric import CommandMetric
from ..hub import ValueFunction
from ..phi import PhiSpace
from ..value import OVER_BEHAVIOUR, check_over
from .config import MetricOptConfig

logger = logging.getLogger(__name__)

UNSUPPORTED = {
    DistributedType.DEEPSPEED: "accelerate steps its engine inside the backward pass, so gradients cannot be blended "
    "between the two",
}


def names_metric(given: Any, args: TrainingArguments, compute_metrics: Callable | None, eval_dataset: Any) -> bool:
    """Whether there is a metric to optimise: one given, one that `args` names, or Trainer's own."""
    if given is not None or any(getattr(args, name, None) for name in ("metric_name_or_path", "metric_command")):
        return True
    return compute_metrics is not None and metric_name(args, eval_dataset) is not None


def tell_unguided(args: TrainingArguments, compute_metrics: Callable | None, eval_dataset: Any) -> None:
    """Warn of a run that is Trainer's own although it has something of a metric."""
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
    compute_metrics: Callable | None,
    eval_dataset: Any,
    processor: Any = None,
    directed: bool = True,
) -> Metric:
    """The metric that `names_metric` speaks of, with its constraints.

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
    constraints = parse(args.metric_constraints)
    if args.metric_command is not None:
        if given is not None or args.metric_name_or_path is not None:
            raise ConfigurationError(
                "metric_command is given beside another metric (metric=... or metric_name_or_path): leave one of them "
                "out."
            )
        name = metric_name(args, eval_dataset) or "metric_command"
        greater = args.direction_of(name) if directed else True
        metric = CommandMetric(args.metric_command, name, greater, args.metric_timeout, processor)
        metric.constraints = constraints
        return metric
    given = args.metric_name_or_path if given is None else given
    description = ""
    if isinstance(given, (str, os.PathLike)):
        given = metrics.load(os.fspath(given))
    if isinstance(given, evaluate.EvaluationModule):
        description = f"{given.description} {given.inputs_description}"
    if given is None:
        batchwise = args.batch_eval_metrics and metrics.takes_batches(compute_metrics)
        name = metric_name(args, eval_dataset)
        metric = Metric(compute_metrics, name, True, args.metric_timeout, exact=True, batchwise=batchwise)
    else:
        metric = metrics.resolve(given, True, args.metric_inputs, args.metric_kwargs, args.metric_timeout)
    if directed and not isinstance(given, Metric):  # a user's knows its direction
        metric.greater_is_better = args.direction_of(metric.name, description)
    if constraints:
        metric = copy.copy(metric)  # the user's stays as it is
        metric.constraints = constraints
    return metric


def metric_name(args: TrainingArguments, eval_dataset: Any) -> str | None:
    """`metric_for_best_model` without the name of an eval set; None where it is the loss, which is trained anyway."""
    name = (args.metric_for_best_model or "loss").removeprefix("eval_")
    if (part := eval_part(args, eval_dataset)) is not None:
        name = name.removeprefix(f"{part}_")
    return None if name == "loss" else name


def eval_part(args: TrainingArguments, eval_dataset: Any) -> str | None:
    """Which of a dict of eval sets `metric_for_best_model` speaks of; the first where it names none."""
    if not isinstance(eval_dataset, dict):
        return None
    name = (args.metric_for_best_model or "").removeprefix("eval_")
    named = [part for part in eval_dataset if name.startswith(f"{part}_")]
    return max(named, key=len) if named else next(iter(eval_dataset))


def split(
    observation: Any, selection: Any, eval_dataset: Any, args: MetricOptConfig, label_name: str
) -> tuple[Any, Any]:
    """The observation and the selection set: those given, else cut from the eval set (and said so).

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
        return data.cut(source, args.observation_size, args.seed, label_name)
    return (source, selection) if observation is None else (observation, source)


def metric_columns(label_names: Sequence[str], model: nn.Module) -> set[str]:
    """Those of `label_names` that the model does not take, where it takes others: groups, for the metric alone."""
    base = model.get_base_model() if hasattr(model, "peft_config") else model
    taken = set(label_names) & set(inspect.signature(base.forward).parameters)
    return set(label_names) - taken if taken else set()


def check_supported(args: MetricOptConfig, distributed_type: DistributedType, fsdp_plugin: Any = None) -> None:
    """Refuse by name what cannot work or was never seen to.

    Args:
        fsdp_plugin: accelerate's, where it shards the model.

    Raises:
        ConfigurationError: with the reason and what to do instead.
    """
    args.check_optimizer()
    if distributed_type in UNSUPPORTED:
        raise ConfigurationError(
            f"{distributed_type.value} cannot be guided: {UNSUPPORTED[distributed_type]}. Use DDP or FSDP2, or no "
            "metric."
        )
    if distributed_type == DistributedType.FSDP:
        check_fsdp(args, fsdp_plugin)
    if args.n_gpu > 1:
        raise ConfigurationError(
            "Several GPUs in one process (DataParallel) are not supported: start one process per GPU with "
            "`torchrun --nproc_per_node N script.py`, or set CUDA_VISIBLE_DEVICES to one of them."
        )


def check_fsdp(args: MetricOptConfig, plugin: Any) -> None:
    """Phi is found in the model by name, before and after it is sharded.

    Raises:
        ConfigurationError: it would not be.
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


def load_value_function(given: ValueFunction | None, args: MetricOptConfig) -> ValueFunction | None:
    """The value function to start from: the one given, the one that `args` names, or None.

    Raises:
        ValueFunctionError: it cannot be loaded or trusted.
    """
    if given is None and args.value_function_name_or_path is not None:
        return ValueFunction.from_pretrained(args.value_function_name_or_path, token=args.hub_token)
    return given


def check_value_function(
    given: ValueFunction | None, over: str, phi: PhiSpace, metric: Metric | None, num_coordinates: int | None
) -> None:
    """A value function to start from must be one of this metric, and over what the guide reads.

    Args:
        over: phi or behaviour, see `Guide.over`.
        num_coordinates: that the run asks for, or all of phi where that has fewer; None: as many as come out.

    Raises:
        ValueFunctionError: it is over something else, or of another phi or metric, or says nothing of its behaviour.
        ConfigurationError: it was never part of a run, and its size does not fit the coordinates that are asked for.
    """
    if given is None:
        return
    check_over(given, over)
    if given.signature is None and over == OVER_BEHAVIOUR:
        raise ValueFunctionError(
            "The value function given was never part of a run, so it does not say which behaviour it reads: give one "
            "that was saved after a run, or start without it."
        )
    if given.signature is not None:
        given.signature.check(phi.description, metric.name, metric.greater_is_better)
        return
    expected = given.num_coordinates if num_coordinates is None else min(num_coordinates, phi.dim)
    if given.num_coordinates != expected:
        raise ConfigurationError(
            f"The value function given has {given.num_coordinates} coordinates, this run {expected}: set phi_dim to "
            f"{given.num_coordinates}, or give one that was saved after a run, which brings its own coordinates."
        )
