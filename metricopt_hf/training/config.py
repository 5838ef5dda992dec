"""MetricOptConfig: TrainingArguments and the numbers of the guidance."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

from transformers import TrainingArguments
from transformers.training_args import OptimizerNames

from ..errors import ConfigurationError
from ..evaluation.metric import INPUTS
from ..guides import GUIDES
from ..phi.coordinates import KINDS as COORDINATES

logger = logging.getLogger(__name__)

OBSERVE = ("predictions", "scores")

# They take their step inside the backward pass, before there is a gradient that could be blended.
STEP_IN_BACKWARD = {name for name in OptimizerNames if "layerwise" in name.value or "lomo" in name.value}


@dataclass
class MetricOptConfig(TrainingArguments):
    """`TrainingArguments` with the arguments of metric guidance.

    Without a metric (see `MetricOptTrainer`) the fields below do nothing.

    Raises:
        ConfigurationError: a value is out of its range, or the optimizer cannot be guided.
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
    metric_key: str | None = field(
        default=None, metadata={"help": "Which number of the `evaluate` module's result to optimise."}
    )
    metric_kwargs: dict | str | None = field(
        default=None,
        metadata={"help": 'Arguments of the `evaluate` module\'s compute, as JSON: \'{"average": "macro"}\'.'},
    )
    metric_timeout: float | None = field(
        default=None, metadata={"help": "Seconds after which a metric call is given up. Default: never."}
    )
    metric_start_ratio: float = field(
        default=0.75,
        metadata={
            "help": "Share of the optimizer steps that is ordinary training; then everything but phi is frozen and the "
            "metric phase begins. 0: the metric phase alone, for a model that is trained already."
        },
    )
    unguided_ratio: float = field(
        default=0.5,
        metadata={
            "help": "Share of the metric phase, its last, in which phi starts anew from where that phase began and "
            "follows the loss alone. What the selection split prefers of both is kept, so that guidance which does "
            "less than the loss costs little. 0: guidance to the end."
        },
    )
    unguided_learning_rate: float | None = field(
        default=0.1,
        metadata={
            "help": "Where that part's learning rate ends: it rises from phi_learning_rate over a third of its steps. "
            "None: it stays."
        },
    )
    observe: str = field(
        default="predictions",
        metadata={
            "help": "What is observed of the model: predictions, from a few forward passes round phi, between which "
            "they are interpolated, so that each pass serves many metric calls; or scores, a pass for each, as is done "
            "anyway where predictions cannot be interpolated (generated text).",
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
            "help": "The most metric calls that the guidance may make to observe. Default: 1200, of scores 160. 0: no "
            "guidance."
        },
    )
    metric_on_all_rows: bool = field(
        default=False,
        metadata={
            "help": "Call the metric on all rows of the observation set only, and never on a random half of them: for "
            "one that makes no sense on a part (a complete gallery, rows by position)."
        },
    )
    max_metric_failures: int = field(
        default=8, metadata={"help": "Metric calls failed in a row after which guidance is switched off."}
    )
    phi: str = field(
        default="film",
        metadata={
            "help": "What is tuned in the metric phase: film (scale and shift behind the last block's norms, and the "
            "output bias), adapter (a PEFT model's), or a regular expression over parameter names."
        },
    )
    phi_coordinates: str = field(
        default="gradient_pca",
        metadata={
            "help": "The compact coordinates that the value function sees: principal directions of mini-batch loss "
            "gradients, gradients of the loss per class, random, or identity.",
            "choices": COORDINATES,
        },
    )
    phi_dim: int = field(default=8, metadata={"help": "Number of compact coordinates (identity: all of phi)."})
    phi_learning_rate: float | None = field(
        default=5e-3,
        metadata={
            "help": "Peak learning rate of phi in the metric phase, which runs the schedule once of its own. "
            "None: learning_rate."
        },
    )
    guide: str = field(
        default="value_function",
        metadata={
            "help": "What says which way the metric improves: value_function, or a control, shuffled (a value "
            "function fitted to shuffled scores) and random (a random direction).",
            "choices": GUIDES,
        },
    )
    value_weight: float | None = field(
        default=None,
        metadata={
            "help": "lambda: length of the value gradient against the task gradient's, at full trust and agreement. "
            "Default: 10, of scores 64."
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
        default=None, metadata={"help": "A value function to start from: a folder, or a name on the Hub."}
    )
    select_steps: int | None = field(
        default=None,
        metadata={"help": "Optimizer steps between looks at the selection split. Default: a 20th of the metric phase."},
    )
    observe_steps: int | None = field(
        default=None,
        metadata={
            "help": "Optimizer steps between rounds of observations. Default: spread the budget evenly over the "
            "guided part of the metric phase."
        },
    )
    observations_per_step: int = field(
        default=8,
        metadata={"help": "Metric calls in a round: antithetic pairs, and, if odd, one at phi itself."},
    )
    observation_folds: int = field(
        default=1,
        metadata={
            "help": "Disjoint parts of the observation set. Each metric call sees one of them; what was learned from "
            "others says how far to trust it, so that a gain which holds for one part alone is not followed. "
            "1: each call sees the whole set."
        },
    )
    perturbation_std: float | None = field(
        default=None,
        metadata={
            "help": "Standard deviation of the perturbation on each compact coordinate. Default: 0.2, of scores 0.4."
        },
    )
    observation_size: int | None = field(
        default=None,
        metadata={
            "help": "Examples of eval_dataset to cut for observation, and as many for selection, where these sets are "
            "not given. Default: half of it each."
        },
    )
    observation_cache_gb: float = field(
        default=2.0,
        metadata={
            "help": "Memory for keeping the observation set's batches and frozen activations (selection: as much)."
        },
    )

    _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, "metric_kwargs"]

    def __post_init__(self):
        # Trainer guesses an unset direction from the name; whoever guesses should say so, once there is a metric
        self._direction_was_given = self.greater_is_better is not None
        super().__post_init__()
        checks = {
            "metric_kwargs": (not isinstance(self.metric_kwargs, str), 'JSON, such as \'{"average": "macro"}\''),
            "phi": (bool(self.phi), '"film", "adapter" or a regular expression over parameter names'),
            "metric_inputs": (self.metric_inputs in INPUTS, f"one of {', '.join(INPUTS)}"),
            "metric_timeout": (self.metric_timeout is None or self.metric_timeout > 0, "positive"),
            "metric_start_ratio": (0 <= self.metric_start_ratio < 1, "in [0, 1)"),
            "unguided_ratio": (0 <= self.unguided_ratio < 1, "in [0, 1)"),
            "unguided_learning_rate": (
                self.unguided_learning_rate is None or self.unguided_learning_rate > 0,
                "positive",
            ),
            "metric_call_budget": (self.metric_call_budget is None or self.metric_call_budget >= 0, "at least 0"),
            "max_metric_failures": (self.max_metric_failures >= 1, "at least 1"),
            "phi_coordinates": (self.phi_coordinates in COORDINATES, f"one of {', '.join(COORDINATES)}"),
            "phi_dim": (self.phi_dim >= 1 and int(self.phi_dim) == self.phi_dim, "a whole number of at least 1"),
            "phi_learning_rate": (self.phi_learning_rate is None or self.phi_learning_rate > 0, "positive"),
            "guide": (self.guide in GUIDES, f"one of {', '.join(GUIDES)}"),
            "value_weight": (
                self.value_weight is None or 0 <= self.value_weight < float("inf"),
                "at least 0 (the sign of the metric is greater_is_better's)",
            ),
            "select_steps": (self.select_steps is None or self.select_steps >= 1, "at least 1"),
            "observe_steps": (self.observe_steps is None or self.observe_steps >= 1, "at least 1"),
            "observations_per_step": (self.observations_per_step >= 2, "at least 2, one antithetic pair"),
            "observation_folds": (self.observation_folds >= 1, "at least 1"),
            "perturbation_std": (
                self.perturbation_std is None or 0 < self.perturbation_std < float("inf"),
                "positive",
            ),
            "observe": (self.observe in OBSERVE, f"one of {', '.join(OBSERVE)}"),
            "forward_pass_budget": (self.forward_pass_budget is None or self.forward_pass_budget >= 0, "at least 0"),
            "observation_size": (self.observation_size is None or self.observation_size >= 1, "at least 1"),
            "observation_cache_gb": (self.observation_cache_gb >= 0, "at least 0"),
        }
        for name, (fine, expected) in checks.items():
            if not fine:
                raise ConfigurationError(f"{name}={getattr(self, name)!r} must be {expected}.")

    @property
    def resolved_greater_is_better(self) -> bool:
        """The direction, as Trainer resolves it; a guess is said aloud."""
        if not self._direction_was_given:
            guess = self.greater_is_better is not False
            logger.warning(
                f"greater_is_better is not set: taking {'greater' if guess else 'smaller'} values of "
                f"{self.metric_for_best_model or 'the metric'} for better. Set it to be sure."
            )
            return guess
        return self.greater_is_better

    def check_optimizer(self) -> None:
        """Raises ConfigurationError for an `optim` whose gradients cannot be blended."""
        if self.optim in STEP_IN_BACKWARD:
            raise ConfigurationError(
                f"optim={self.optim.value!r} steps inside the backward pass, so there is no gradient to blend with. "
                "Take one that steps after it, such as adamw_torch or sgd; or train without a metric."
            )
