"""SettlingTrainer: what a guided run needs beside Trainer's own, settled when it is first asked for."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from typing import Any

from torch import nn

from .. import guides
from .. import phi as spaces
from ..errors import ConfigurationError, brief
from ..evaluation.metric import Metric
from ..guides import Guide
from ..hub import ValueFunction
from ..phi import PhiSpace
from ..phi.coordinates import KINDS
from ..phi.space import is_sharded
from . import preflight
from .config import MetricOptConfig
from .resuming import ResumingTrainer


class SettlingTrainer(ResumingTrainer):
    """A trainer with a metric, the sets on which it is called, and a phi.

    Nothing is settled before it is asked for. So a script that only predicts need not give anything, and its model
    stays as it is.
    """

    _named = False  # whether there is a metric to optimise

    def __init__(
        self,
        *args,
        metric: Any = None,
        observation_dataset: Any = None,
        selection_dataset: Any = None,
        phi: PhiSpace | Callable[[nn.Module], PhiSpace] | str | None = None,
        value_function: ValueFunction | None = None,
        guide: Guide | None = None,
        coordinates: str = "gradient_pca",
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        if coordinates not in KINDS:
            raise ConfigurationError(f"coordinates={brief(coordinates)} must be one of {', '.join(KINDS)}.")
        self._kind_of_coordinates = coordinates
        self._given_metric, self._given_phi, self._given_guide = metric, phi, guide
        self._given_value_function = value_function
        self._given_sets = observation_dataset, selection_dataset
        self._metric: Metric | None = None
        self._phi: PhiSpace | None = None
        self._sets: tuple[Any, Any] | None = None
        self._named = preflight.names_metric(metric, self.args, self.compute_metrics, self.eval_dataset)

    # What a user reads; settled when it is first asked for, at the latest by `train`

    @property
    def guided(self) -> bool:
        """Whether there is a metric to optimise."""
        return self._named

    @property
    def metric(self) -> Metric | None:
        """The metric that is optimised; None where there is none."""
        if self._metric is None and self.guided:
            self._metric = self._resolve_metric()
        return self._metric

    @property
    def _reported_metric(self) -> Metric | None:
        """The metric, as far as `evaluate` may add it to Trainer's numbers: no direction is asked for, none is loaded.

        None where it adds nothing.
        """
        loads = isinstance(self._given_metric, (str, os.PathLike)) or getattr(self.args, "metric_name_or_path", None)
        if self._metric is not None or not self.guided or loads or not isinstance(self.args, MetricOptConfig):
            return self._metric
        return self._resolve_metric(directed=False)

    def _resolve_metric(self, directed: bool = True) -> Metric:
        return preflight.resolve_metric(
            self._given_metric,
            self.args,
            self.compute_metrics,
            self.eval_dataset,
            self.processing_class or getattr(self.data_collator, "tokenizer", None),
            directed,
        )

    @property
    def observation_dataset(self) -> Any:
        """Where the metric is observed."""
        return self._split()[0]

    @property
    def selection_dataset(self) -> Any:
        """Where the best phi is chosen."""
        return self._split()[1]

    @property
    def phi(self) -> PhiSpace | None:
        """What is tuned; in the model from here on, until the run ends."""
        if self.guided and (self._phi is None or self._phi.model is not self.model):
            self._phi = self._build_phi(self.model)
        return self._phi

    @property
    def _sharded(self) -> bool:
        """Whether FSDP2 has sharded the model, or will before the first step: then every rank takes part in whatever
        touches it."""
        return is_sharded(self.model) or (self.is_in_train and self.is_fsdp_enabled)

    def settle(self) -> None:
        """Find out what a run needs, and refuse what cannot work, before anything is trained; `train` does it itself.

        Raises:
            ConfigurationError, PhiError, ValueFunctionError: see `MetricOptTrainer`.
        """
        if not self.guided:
            return
        _ = self.metric  # first of all, whether `args` are ours
        state = self.accelerator.state
        preflight.check_supported(self.args, state.distributed_type, getattr(state, "fsdp_plugin", None))
        _ = self._split()
        self._given_value_function = preflight.load_value_function(self._given_value_function, self.args)
        if self.model_init is None:
            self.phi.attach()
            self._check_value_function(self.phi)

    def call_model_init(self, trial=None):
        model = super().call_model_init(trial)
        if self.guided:
            self._phi = self._build_phi(model)
            self._check_value_function(self._phi)
        return model

    def _check_value_function(self, phi: PhiSpace) -> None:
        dim = None if self._kind_of_coordinates == "group_gradients" else self.args.phi_dim
        dim = phi.dim if self._kind_of_coordinates == "identity" else dim
        guide = self._given_guide or guides.from_spec(self.args.guide)
        preflight.check_value_function(self._given_value_function, guide.over, phi, self.metric, dim)

    def _split(self) -> tuple[Any, Any]:
        if not self.guided or not (self.metric.of_predictions or self.metric.takes_dataset):
            return self._given_sets
        if self._sets is None:
            self._sets = preflight.split(*self._given_sets, self.eval_dataset, self.args, self._label_name)
        return self._sets

    @property
    def _label_name(self) -> str:
        return self.label_names[0] if self.label_names else "labels"

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
        return phi

    def _make_guide(self) -> Guide:
        """The one given, or named; where there are constraints, one like it for each of them too."""
        args, constraints = self.args, self.metric.constraints
        guide = self._given_guide or guides.from_spec(args.guide, self._given_value_function)
        if not constraints:
            return guide
        given = self._given_guide
        guards = [guides.from_spec(args.guide) if given is None else copy.deepcopy(given) for _ in constraints]
        return guides.ConstrainedGuide(guide, constraints, guards)
