"""MetricOptConfig: TrainingArguments and the numbers of the metric phase."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any

from transformers import TrainingArguments

from ..errors import ConfigurationError, brief
from ..evaluation import direction
from ..evaluation.answer import plain
from ..evaluation.model_metric import words_of
from ..evaluation.modules import INPUTS
from ..guides import AUTO, GUIDES
from ..redaction import command_without_secrets, without_secrets

logger = logging.getLogger(__name__)

OBSERVE = ("predictions", "predictions_on_all_rows", "scores")

# former fields -> what to do instead
GONE = {
    "metric_key": "of several numbers that compute_metrics returns, metric_for_best_model names one; of any other "
    "function, metric=Metric(function, name) does",
    "metric_constraints": "it is experimental: from metricopt_hf.experimental import constrained, and pass "
    'metric=constrained(Metric(function, name), "precision>=0.6")',
    "value_function_name_or_path": "it is an argument of the trainer: MetricOptTrainer(..., value_function=name)",
    "metric_on_all_rows": 'say observe="predictions_on_all_rows"',
    "phi_coordinates": "a run finds its coordinates itself, or starts from those of a value function",
    "metric_start_ratio": "metric_steps says how many of the last optimizer steps follow the metric (10 by default)",
    "forward_pass_budget": "a metric step makes a few passes, however many calls: metric_steps says how many steps",
    "tune_output_bias": "a tuned bias is always among the candidates, and the selection split says whether it is kept",
    "loss_alone_ratio": "every step of the metric phase is guided",
    "unguided_ratio": "every step of the metric phase is guided",
    "unguided_learning_rate": "every step of the metric phase is guided, at phi_learning_rate",
    "observation_folds": "every metric call on scores sees the whole observation set",
    "observe_steps": "metric_call_budget is spread evenly over the metric steps",
    "observations_per_step": "metric_call_budget says how many observations are made in all",
    "select_steps": "the selection split is evaluated after each metric step",
    "perturbation_std": "it is a constant",
    "max_metric_failures": "guidance ends behind 8 failures of the metric in a row",
    "observation_cache_gb": "up to 2 GB of each set are kept in memory",
}


def _number(least: float, most: float = math.inf, above: bool = False) -> Callable[[Any], bool]:
    """A check for finite numbers from `least` (`above`: greater than it) to below `most`."""

    def fine(value: Any) -> bool:
        number: Any = value
        if not isinstance(value, Real) or isinstance(value, bool):
            return False
        return (number > least if above else number >= least) and number < most

    return fine


def _whole(least: int, most: int = 2**63) -> Callable[[Any], bool]:
    """A check for whole numbers, of an integer type, from `least` to below `most`."""
    return lambda value: isinstance(value, Integral) and _number(least, most)(value)


def _unset(fine: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or fine(value)


def _one_of(names: Collection[str]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, str) and value in names


# field -> (check, what the value must be)
CHECKS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "seed": (_whole(0, 2**32), "a whole number from 0 to 4294967295"),
    "metric_command": (_unset(lambda value: isinstance(value, str)), 'a command line, "python score.py {model}"'),
    "metric_kwargs": (_unset(lambda value: isinstance(value, dict)), 'JSON, such as \'{"average": "macro"}\''),
    "phi": (
        lambda value: isinstance(value, str) and bool(value),
        '"auto", "film", "adapter" or a regular expression over parameter names',
    ),
    "metric_inputs": (_one_of(INPUTS), f"one of {', '.join(INPUTS)}"),
    "metric_timeout": (_unset(_number(0, above=True)), "a positive, finite number of seconds; None for no limit"),
    "metric_steps": (_unset(_whole(1)), "a whole number of at least 1; None for the default"),
    "metric_call_budget": (_unset(_whole(0)), "a whole number of at least 0; None for the default"),
    "observe": (_one_of(OBSERVE), f"one of {', '.join(OBSERVE)}"),
    "phi_dim": (_whole(1), "a whole number of at least 1"),
    "phi_learning_rate": (_number(0, above=True), "positive and finite"),
    "guide": (_one_of((AUTO, *GUIDES)), f"one of {', '.join((AUTO, *GUIDES))}"),
    "value_weight": (
        lambda value: _number(0)(value) or value == math.inf,
        "at least 0; inf: the loss has no say (the sign of the metric is greater_is_better's)",
    ),
    "observation_size": (_unset(_whole(1)), "a whole number of at least 1"),
}


@dataclass(repr=False)  # one of its own would show tokens
class MetricOptConfig(TrainingArguments):
    """`TrainingArguments` with the arguments of metric guidance, each explained by its `help`.

    Without a metric (see `MetricOptTrainer`) these do nothing:

    - the metric: `metric_name_or_path`, `metric_inputs`, `metric_kwargs`, `metric_timeout`, `metric_command`
    - the metric phase, and phi, which it tunes: `metric_steps`, `phi`, `phi_dim`, `phi_learning_rate`
    - observations: `observe`, `metric_call_budget`, `observation_size`
    - guidance: `guide`, `value_weight`

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
    metric_steps: int | None = field(
        default=None,
        metadata={
            "help": "The last optimizer steps, in which phi goes up the metric; all before are Trainer's own. Default: "
            "10, or half of a shorter run. As many as max_steps: for a model that is trained already."
        },
    )
    observe: str = field(
        default="predictions",
        metadata={
            "help": "What is observed of the model: predictions, linearised round phi, so that a metric call costs no "
            "forward pass, and most see a random half of the rows; predictions_on_all_rows, for a metric that makes no "
            "sense on a part (a complete gallery, rows by position); or scores, a pass for each call, as is done "
            "where predictions cannot be linearised (generated text).",
            "choices": OBSERVE,
        },
    )
    metric_call_budget: int | None = field(
        default=None,
        metadata={
            "help": "The most metric calls that the guidance may make to observe. Default: 5000, of scores 160; of a "
            "slow metric fewer: as many as take no longer than training did, or a minute. 0: no guidance."
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
        default=128,
        metadata={"help": "The most compact coordinates in which phi moves: those that move the outputs most."},
    )
    phi_learning_rate: float = field(
        default=1.0,
        metadata={"help": "Size of an update of phi; 1 is right for FiLM. Too large ones are taken back and halved."},
    )
    guide: str = field(
        default=AUTO,
        metadata={
            "help": "What says which way the metric improves: pairs (the slope of perturbed predictions; any metric), "
            "rows (what each row's decision is worth; decisions only), auto (both, the better step of the two), "
            "value_function (networks fitted to all observations; what auto takes where scores are observed), or a "
            "control: shuffled, random.",
            "choices": (AUTO, *GUIDES),
        },
    )
    value_weight: float = field(
        default=math.inf,
        metadata={
            "help": "lambda: length of the value gradient against the loss gradient's, with which it is blended. "
            "inf: the loss has no say in the metric phase."
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

    def __init_subclass__(cls):
        """Beside another library's config, JSON is read for both's fields."""
        super().__init_subclass__()
        found = [name for base in cls.__mro__ for name in vars(base).get("_VALID_DICT_FIELDS", ())]
        cls._VALID_DICT_FIELDS = list(dict.fromkeys(found))

    def __post_init__(self):
        for name, value in vars(self).items():
            setattr(self, name, plain(value))
        self.greater_is_better: Any = direction.given(self.greater_is_better)
        self._given_direction = self.greater_is_better
        if self.greater_is_better is None and self.metric_for_best_model is not None:
            # None leaves it to Trainer, to whom everything but a loss is better the greater it is
            self.greater_is_better = direction.by_name(self.metric_for_best_model)
        super().__post_init__()
        if self._given_direction is None and self.greater_is_better is not None:
            # so that `replace(args, ...)` sees the difference
            self.greater_is_better = direction.Assumed(self.greater_is_better)
        for name, (fine, expected) in CHECKS.items():
            if not fine(value := getattr(self, name)):
                raise ConfigurationError(f"{name}={brief(without_secrets(value))} must be {expected}.")
        if self.metric_command is not None:
            words_of(self.metric_command)

    def __str__(self) -> str:
        """The text of `TrainingArguments`, which hides tokens, without secrets of the metric."""
        shown = copy.copy(self)
        shown.__dict__.update(self._shown)
        return super(MetricOptConfig, shown).__str__()

    __repr__ = __str__

    def to_dict(self) -> dict[str, Any]:
        """The dict of `TrainingArguments`, for logs and files, without secrets of the metric; a direction that nobody
        gave is None."""
        return {**super().to_dict(), "greater_is_better": self._given_direction, **self._shown}

    @property
    def _shown(self) -> dict[str, Any]:
        """Fields that may hold secrets, as logs and files show them."""
        command = self.metric_command
        return {
            "metric_kwargs": without_secrets(self.metric_kwargs),
            "metric_command": command and command_without_secrets(command),
        }

    def direction_of(self, name: str, description: str = "") -> bool:
        """Whether greater values of a metric are better: as given, else by its description or name, with a warning.

        Raises:
            ConfigurationError: neither tells.
        """
        if self._given_direction is not None:
            return self._given_direction
        described = direction.by_description(description)
        greater = direction.by_name(name) if described is None else described
        if greater is None:
            raise ConfigurationError(
                f"Nothing says which way the metric {name!r} is better: set greater_is_better=True, if a greater value "
                "is better, or greater_is_better=False, if a smaller one is."
            )
        logger.warning(
            f"greater_is_better is not set: taking {'greater' if greater else 'smaller'} values of {name} for better, "
            f"as its {'name' if described is None else 'description'} says. Set it to be sure."
        )
        return greater
