"""PhasePlan: the numbers of a metric phase, from the config and the number of optimizer steps."""

from __future__ import annotations

from dataclasses import dataclass

from ..evaluation.virtual_observer import VirtualObserver
from .config import MetricOptConfig

SELECTIONS = 20  # evaluations on the selection split, beside the last one
PAIRS = 16  # antithetic pairs in a round of observations on interpolated predictions
FIRST_ROUNDS = 2  # such rounds behind the first expansion, before the guide is judged


@dataclass(frozen=True)
class Defaults:
    """What the config leaves open, by what is observed.

    Attributes:
        passes: forward passes over the observation set.
        calls: metric calls to observe.
        value_weight: lambda in `blend`.
        perturbation_std: on each compact coordinate.
    """

    passes: int
    calls: int
    value_weight: float
    perturbation_std: float


# chosen on development seeds: many exact calls on interpolated outputs need less weight than few scores
DEFAULTS = {"predictions": Defaults(60, 1200, 20.0, 0.2), "scores": Defaults(160, 160, 64.0, 0.4)}


@dataclass(frozen=True)
class PhasePlan:
    """The numbers of a metric phase.

    Attributes:
        observe: "predictions" or "scores".
        passes, calls: the most forward passes and metric calls to observe.
        value_weight: lambda in `blend`.
        perturbation_std: standard deviation of the perturbation on each coordinate.
        select_steps: optimizer steps from one evaluation on the selection split to the next.
        observe_steps: the same from one round of observations to the next.
        round_size: of scores, metric calls in a round; of predictions, antithetic pairs in one.
        expand_steps: optimizer steps from one expansion of the outputs round phi to the next.
        checks: real observations by which the guide is judged before it is followed for the first time.
        tune_bias: whether a tuned output bias is a candidate in the end.
        max_failures: metric calls failed in a row after which guidance is switched off.
        seed: of the guide.
    """

    observe: str
    passes: int
    calls: int
    value_weight: float
    perturbation_std: float
    select_steps: int
    observe_steps: int
    round_size: int
    expand_steps: int
    checks: int
    tune_bias: bool
    max_failures: int
    seed: int

    @classmethod
    def from_args(cls, args: MetricOptConfig, observe: str, steps: int, before: int, dim: int) -> PhasePlan:
        """Spread the budgets evenly over the guided steps.

        Args:
            observe: "predictions" or "scores"; what the config asks for need not be possible.
            steps: optimizer steps of the metric phase.
            before: optimizer steps of the first phase in which the guide observes too.
            dim: coordinates; see `VirtualObserver.passes`.
        """

        def given(value, default):
            return default if value is None else value

        default = DEFAULTS[observe]
        passes = given(args.forward_pass_budget, default.passes)
        calls = given(args.metric_call_budget, default.calls)
        observed, real = before + args.guided_steps(steps), min(passes, calls)
        expansion, checks = VirtualObserver.passes(dim), args.observations_per_step
        expansions = max(1, min((real - checks) // expansion, calls // 2 // (expansion + 2 * PAIRS + 1)))
        if observe == "scores":
            round_size, rounds = checks, -(-real // checks)
            every = observed // max(1, rounds)
        else:  # what is left of the calls, beside those of expansions and of the rounds that come with them
            round_size = PAIRS
            left = calls - checks - expansions * (expansion + 2 * PAIRS + 1) - FIRST_ROUNDS * (2 * PAIRS + 1)
            rounds = left // (2 * PAIRS + 1)
            every = -(-observed // max(1, rounds))
        return cls(
            observe=observe,
            passes=passes,
            calls=calls,
            value_weight=given(args.value_weight, default.value_weight),
            perturbation_std=given(args.perturbation_std, default.perturbation_std),
            select_steps=given(args.select_steps, max(1, steps // SELECTIONS)),
            observe_steps=given(args.observe_steps, max(1, every)),
            round_size=round_size,
            expand_steps=max(1, -(-observed // expansions)),
            checks=checks,
            tune_bias=args.tune_output_bias,
            max_failures=args.max_metric_failures,
            seed=args.seed,
        )
