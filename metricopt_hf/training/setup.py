"""Setup: the metric, data and phi of a guided run, resolved once."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import Trainer

from .. import phi as spaces
from ..errors import ConfigurationError, brief
from ..evaluation.metric import Metric
from ..evaluation.model_metric import ModelMetric
from ..guides import AUTO, GUIDES, Guide
from ..hub import ValueFunction
from ..phi import PhiSpace
from . import evaluated, preflight
from .config import MetricOptConfig
from .observing import Observing

Phi = PhiSpace | Callable[[nn.Module], PhiSpace] | str | None


@dataclass
class Given:
    """The trainer's arguments for the metric phase; None: the config or Trainer's own arguments decide.

    Attributes: see `MetricOptTrainer`.
    """

    metric: Any = None
    observation_dataset: Any = None
    selection_dataset: Any = None
    phi: Phi = None
    value_function: ValueFunction | str | None = None
    guide: Guide | str | None = None
    row_groups: str | None = None

    def names_metric(self, trainer: Trainer) -> bool:
        """Whether there is a metric to optimise."""
        return preflight.names_metric(self.metric, trainer.args, trainer.compute_metrics, trainer.eval_dataset)

    def resolve_metric(self, trainer: Trainer, directed: bool = True) -> Metric:
        """The metric that is named.

        Args:
            directed: whether it must be known which way it is better, as it need not be to report it.

        Raises:
            ConfigurationError: it cannot be had.
        """
        name = self.metric or getattr(trainer.args, "metric_name_or_path", None)
        if isinstance(name, str) and name.startswith(evaluated.PREFIX):
            metric = evaluated.evaluated(trainer, name.removeprefix(evaluated.PREFIX), trainer.args.metric_timeout)
            metric.greater_is_better = trainer.args.direction_of(metric.name) if directed else True
            return metric
        processor = trainer.processing_class or getattr(trainer.data_collator, "tokenizer", None)
        return preflight.resolve_metric(
            self.metric, trainer.args, trainer.compute_metrics, trainer.eval_dataset, processor, directed
        )

    def reported_metric(self, trainer: Trainer) -> Metric | None:
        """The metric, if `evaluate` may add it to Trainer's numbers: no direction is needed, none is loaded."""
        loads = isinstance(self.metric, (str, os.PathLike)) or getattr(trainer.args, "metric_name_or_path", None)
        return None if loads or not isinstance(trainer.args, MetricOptConfig) else self.resolve_metric(trainer, False)

    def guide_name(self, args: MetricOptConfig) -> str:
        """The guide's name: that of the config, or the class of the guide that was given.

        Raises:
            ConfigurationError: it is neither a guide nor the name of one.
        """
        if isinstance(self.guide, Guide):
            return type(self.guide).__name__
        name = args.guide if self.guide is None else self.guide
        if name not in (AUTO, *GUIDES):
            raise ConfigurationError(f"guide={brief(name)} must be a Guide, or one of {', '.join((AUTO, *GUIDES))}.")
        return name

    def resolve_phi(self, model: nn.Module, args: Any) -> PhiSpace:
        """The phi space on a model.

        Raises:
            PhiError: it cannot be built on this model.
            ConfigurationError: phi was built on another model.
        """
        if self.phi is None or isinstance(self.phi, str):
            phi = spaces.from_spec(model, self.phi or args.phi)
        else:
            phi = self.phi if isinstance(self.phi, PhiSpace) else self.phi(model)
        if phi.model is not model:
            raise ConfigurationError(
                "phi was built on another model than the trainer's. With model_init, or to train again, pass a "
                "function that builds it: phi=lambda model: FiLM(model, layers=...)."
            )
        return phi


@dataclass(frozen=True)
class Setup:
    """The parts of a guided run beside Trainer's own.

    Attributes:
        metric: the black box to optimise.
        observation: data set on which the metric is observed; None where it needs none.
        selection: data set on which a candidate is chosen; None likewise.
        phi: the numbers of the model to tune.
        value_function: one to start from, or None.
    """

    metric: Metric
    observation: Any
    selection: Any
    phi: PhiSpace
    value_function: ValueFunction | None

    @classmethod
    def of(cls, trainer: Trainer, given: Given) -> Setup:
        """Resolve the parts, and refuse what cannot work, before any training.

        Raises:
            ConfigurationError, PhiError, ValueFunctionError: a part cannot work; the message says what to do.
        """
        metric = given.resolve_metric(trainer)  # first of all, whether `args` are ours
        state = trainer.accelerator.state
        plugin = getattr(state, "fsdp_plugin", None) or state.deepspeed_plugin
        preflight.check_supported(trainer, state.distributed_type, plugin)
        preflight.check_metric(metric, state.distributed_type)
        sets = given.observation_dataset, given.selection_dataset
        if not isinstance(metric, ModelMetric) or metric.takes_dataset:
            label_name = trainer.label_names[0] if trainer.label_names else "labels"
            groups = preflight.check_row_groups(given.row_groups, trainer.label_names)
            sets = preflight.split(*sets, trainer.eval_dataset, trainer.args, label_name, groups)
        value_function = preflight.load_value_function(given.value_function, trainer.args)
        given.guide_name(trainer.args)
        phi = given.resolve_phi(trainer.model, trainer.args)
        if metric.of_predictions:
            phi.settle(Observing(trainer, metric, phi).movement(sets[0]))
        preflight.check_value_function(value_function, phi, metric)
        return cls(metric, *sets, phi, value_function)
