"""MetricOptConfig: TrainingArguments and the numbers of the guidance."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any

from transformers import TrainingArguments
from transformers.training_args import OptimizerNames

from ..errors import ConfigurationError, brief
from ..evaluation import constraints, direction
from ..evaluation.answer import plain
from ..evaluation.metric import INPUTS
from ..evaluation.model_metric import words_of
from ..guides import GUIDES
from ..redaction import command_without_secrets, without_secrets

logger = logging.getLogger(__name__)

OBSERVE = ("predictions", "predictions_on_all_rows", "scores")

# fields that there were once -> what to do instead
GONE = {
    "metric_key": "of several numbers that compute_metrics returns, metric_for_best_model names one; of any other "
    "function, metric=Metric(function, name) does",
    "metric_on_all_rows": 'say observe="predictions_on_all_rows"',
    "phi_coordinates": "it is an argument of the trainer now: MetricOptTrainer(..., coordinates=...)",
    "loss_alone_ratio": "every step of the metric phase is guided",
    "unguided_ratio": "every step of the metric phase is guided",
    "unguided_learning_rate": "every step of the metric phase is guided, at phi_learning_rate",
    "observation_folds": "every metric call on scores sees the whole observation set",
    "observe_steps": "rounds of observations are spread evenly over the metric phase, as many as forward_pass_budget "
    "and metric_call_budget allow",
    "observations_per_step": "how many observations are made in all, forward_pass_budget and metric_call_budget say",
    "select_steps": "the selection split is evaluated after each 20th of the metric phase",
    "perturbation_std": "it is a constant",
    "max_metric_failures": "guidance ends behind 8 failures of the metric in a row",
    "observation_cache_gb": "up to 2 GB of each set are kept in memory",
}

# They take their step inside the backward pass, before there is a gradient that could be blended.
STEP_IN_BACKWARD = {name for name in OptimizerNames if "layerwise" in name.value or "lomo" in name.value}


def _number(least: float, most: float = math.inf, above: bool = False) -> Callable[[Any], bool]:
    """Whether it is a finite number from `least` (above: beyond it) to below `most`."""

    def fine(value: Any) -> bool:
        if not isinstance(value, Real) or isinstance(value, bool):
            return False
        return (value > least if above else value >= least) and value < most

    return fine


def _whole(least: int, most: int = 2**63) -> Callable[[Any], bool]:
    """Whether it is a whole number, of a type for them, from `least` to below `most`."""
    return lambda value: isinstance(value, Integral) and _number(least, most)(value)


def _unset(fine: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or fine(value)


def _one_of(names: Collection[str]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, str) and value in names


# field -> whether a value will do, and what it must be
CHECKS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "seed": (_whole(0, 2**32), "a whole number from 0 to 4294967295"),
    "metric_command": (_unset(lambda value: isinstance(value, str)), 'a command line, "python score.py {model}"'),
    "metric_constraints": (_unset(lambda value: isinstance(value, str)), 'text, such as "precision>=0.6, ece<=0.05"'),
    "metric_kwargs": (_unset(lambda value: isinstance(value, dict)), 'JSON, such as \'{"average": "macro"}\''),
    "phi": (
        lambda value: isinstance(value, str) and bool(value),
        '"auto", "film", "adapter" or a regular expression over parameter names',
    ),
    "metric_inputs": (_one_of(INPUTS), f"one of {', '.join(INPUTS)}"),
    "metric_timeout": (_unset(_number(0, above=True)), "a positive, finite number of seconds; None for no limit"),
    "metric_start_ratio": (_number(0, 1), "in [0, 1)"),
    "metric_call_budget": (_unset(_whole(0)), "a whole number of at least 0; None for the default"),
    "forward_pass_budget": (_unset(_whole(0)), "a whole number of at least 0; None for the default"),
    "observe": (_one_of(OBSERVE), f"one of {', '.join(OBSERVE)}"),
    "phi_dim": (_whole(1), "a whole number of at least 1"),
    "phi_learning_rate": (_unset(_number(0, above=True)), "positive and finite"),
    "guide": (_one_of(GUIDES), f"one of {', '.join(GUIDES)}"),
    "value_weight": (_number(0), "at least 0 and finite (the sign of the metric is greater_is_better's)"),
    "observation_size": (_unset(_whole(1)), "a whole number of at least 1"),
    "tune_output_bias": (lambda value: isinstance(value, bool), "True or False"),
}


@dataclass(repr=False)  # one of its own would show tokens
class MetricOptConfig(TrainingArguments):
    """`TrainingArguments` with the arguments of metric guidance, each explained by its `help`.

    Without a metric (see `MetricOptTrainer`) these do nothing:

    - the metric: `metric_name_or_path`, `metric_inputs`, `metric_kwargs`, `metric_timeout`, `metric_command`,
      `metric_constraints`
    - the metric phase, and what is tuned in it: `metric_start_ratio`, `phi`, `phi_dim`, `phi_learning_rate`,
      `tune_output_bias`
    - observations: `observe`, `forward_pass_budget`, `metric_call_budget`, `observation_size`
    - guidance: `guide`, `value_weight`, `value_function_name_or_path`

    Raises:
        ConfigurationError: a value is out of its range, or there is no such field any more.
    """

    metric_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "An `evaluate` module to optimise: a name on the Hub, a local path, or one that comes along "
            "(misclassification, worst_class_recall, g_mean, macro_auprc, recall_at_k, map_at_r, and of groups "
            "worst_group_accuracy and equalized_odds_gap). Default: "
            "`compute_metrics` and `metric_for_best_model`."
        },
    )
    metric_inputs: str = field(
        default="auto",
        metadata={
            "help": "How logits become the `evaluate` module's inputs: argmax, scores (softmax), identity, "
            "or auto, by the module's features.",
            "choices": INPUTS,
        },
    )
    metric_kwargs: dict | str | None = field(
        default=None,
        metadata={"help": 'Arguments of the `evaluate` module\'s compute, as JSON: \'{"average": "macro"}\'.'},
    )
    metric_timeout: float | None = field(
        default=None, metadata={"help": "Seconds after which a metric call is given up. Default: never."}
    )
    metric_command: str | None = field(
        default=None,
        metadata={
            "help": 'A command that is the metric, such as "python score.py {model}": the model is saved into a '
            "folder, the command run on it without a shell, and the last line that it prints is the number. {split}, "
            "if it stands there, is observation, selection, or the prefix of evaluate()'s metrics."
        },
    )
    metric_constraints: str | None = field(
        default=None,
        metadata={
            "help": 'What must hold before the metric counts, of other numbers of the same dict: "precision>=0.6, '
            'ece<=0.05".'
        },
    )
    metric_start_ratio: float = field(
        default=0.75,
        metadata={
            "help": "Share of the optimizer steps that is ordinary training; then everything but phi is frozen and the "
            "metric phase begins. 0: the metric phase alone, for a model that is trained already."
        },
    )
    observe: str = field(
        default="predictions",
        metadata={
            "help": "What is observed of the model: predictions, from a few forward passes round phi, between which "
            "they are interpolated, so that each pass serves many metric calls, most of them on a random half of the "
            "rows; predictions_on_all_rows, for a metric that makes no sense on a part (a complete gallery, rows by "
            "position); or scores, a pass for each call, as is done anyway where predictions cannot be interpolated "
            "(generated text).",
            "choices": OBSERVE,
        },
    )
    forward_pass_budget: int | None = field(
        default=None,
        metadata={
            "help": "The most forward passes over the observation set that the guidance may make. Default: 60, of "
            "scores 160. 0: no guidance."
        },
    )
    metric_call_budget: int | None = field(
        default=None,
        metadata={
            "help": "The most metric calls that the guidance may make to observe. Default: 1200, of scores 160; of a "
            "slow metric on predictions fewer, as many as take no longer than the forward passes do, or than a minute. "
            "0: no guidance."
        },
    )
    phi: str = field(
        default="auto",
        metadata={
            "help": "What is tuned in the metric phase: film (scale and shift behind the last block's norms, and the "
            "output bias), adapter (a PEFT model's), auto (adapter for a PEFT model, else film), or a regular "
            "expression over parameter names."
        },
    )
    phi_dim: int = field(
        default=6, metadata={"help": "Number of compact coordinates of phi that the value function sees."}
    )
    phi_learning_rate: float | None = field(
        default=1e-2,
        metadata={
            "help": "Peak learning rate of phi in the metric phase, which runs the schedule once of its own. "
            "None: learning_rate."
        },
    )
    guide: str = field(
        default="value_function",
        metadata={
            "help": "What says which way the metric improves: value_function (over phi); behaviour (a value "
            "function over what the model predicts, which other models can start from); through the loss, bridge (a "
            "network that expects the metric of a batch) and loss_alignment (a loss whose parameters are adapted); "
            "or a control, shuffled (a value function fitted to shuffled scores) and random (a random direction).",
            "choices": GUIDES,
        },
    )
    value_weight: float = field(
        default=20.0,
        metadata={
            "help": "lambda: length of the value gradient against the task gradient's, at full trust and agreement."
        },
    )
    tune_output_bias: bool = field(
        default=True,
        metadata={
            "help": "Search a bias per logit on the observation set behind the last step, at the start and at the best "
            "phi, and let the selection split say whether it is kept. It becomes part of the output layer."
        },
    )
    value_function_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "A value function to start from: a folder, or a name on the Hub. One over phi is for the same "
            "model, one over behaviour for guide=behaviour."
        },
    )
    observation_size: int | None = field(
        default=None,
        metadata={
            "help": "Examples of eval_dataset to cut for observation, and as many for selection, where these sets are "
            "not given. Default: half of it each."
        },
    )

    def __new__(cls, *args, **kwargs):
        for name in GONE.keys() & kwargs.keys():
            raise ConfigurationError(f"{name} is no argument of {cls.__name__} any more; leave it out: {GONE[name]}.")
        return super().__new__(cls)

    _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, "metric_kwargs"]

    def __post_init__(self):
        for name, value in vars(self).items():
            setattr(self, name, plain(value))
        self._given_direction = self.greater_is_better = direction.given(self.greater_is_better)
        if self.greater_is_better is None and self.metric_for_best_model is not None:
            # None leaves it to Trainer, to whom everything but a loss is better the greater it is
            self.greater_is_better = direction.by_name(self.metric_for_best_model)
        super().__post_init__()
        if self._given_direction is None and self.greater_is_better is not None:
            self.greater_is_better = direction.Assumed(self.greater_is_better)  # told apart in `replace(args, ...)`
        for name, (fine, expected) in CHECKS.items():
            if not fine(value := getattr(self, name)):
                raise ConfigurationError(f"{name}={brief(without_secrets(value))} must be {expected}.")
        constraints.parse(self.metric_constraints)
        if self.metric_command is not None:
            words_of(self.metric_command)

    def __str__(self) -> str:
        """As of `TrainingArguments`, which hides tokens; secrets of the metric are hidden too."""
        shown = copy.copy(self)
        shown.__dict__.update(self._shown)
        return super(MetricOptConfig, shown).__str__()

    __repr__ = __str__

    def to_dict(self) -> dict[str, Any]:
        """As of `TrainingArguments`, for logs and files; secrets of the metric are hidden too, and a direction that was
        not given is None."""
        return {**super().to_dict(), "greater_is_better": self._given_direction, **self._shown}

    @property
    def _shown(self) -> dict[str, Any]:
        """What stands in logs and files in place of fields that may hold secrets."""
        command = self.metric_command
        return {
            "metric_kwargs": without_secrets(self.metric_kwargs),
            "metric_command": command and command_without_secrets(command),
        }

    def direction_of(self, name: str, description: str = "") -> bool:
        """Whether greater values of a metric are better: as given, else by its description or its name, and said aloud.

        Raises:
            ConfigurationError: neither says.
        """
        if self._given_direction is not None:
            return self._given_direction
        told = direction.by_description(description)
        greater = direction.by_name(name) if told is None else told
        if greater is None:
            raise ConfigurationError(
                f"Nothing says which way the metric {name!r} is better: set greater_is_better=True, if a greater value "
                "is better, or greater_is_better=False, if a smaller one is."
            )
        logger.warning(
            f"greater_is_better is not set: taking {'greater' if greater else 'smaller'} values of {name} for better, "
            f"as its {'name' if told is None else 'description'} says. Set it to be sure."
        )
        return greater

    def check_optimizer(self) -> None:
        """Raises ConfigurationError for an `optim` whose gradients cannot be blended."""
        if self.optim in STEP_IN_BACKWARD:
            raise ConfigurationError(
                f"optim={self.optim.value!r} steps inside the backward pass, so there is no gradient to blend with. "
                "Take one that steps after it, such as adamw_torch or sgd; or train without a metric."
            )
