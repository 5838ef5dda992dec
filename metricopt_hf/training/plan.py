"""PhasePlan: the numbers of a metric phase, from the config, the number of optimizer steps and the metric's time."""

from __future__ import annotations

from dataclasses import dataclass

from ..evaluation.virtual_observer import VirtualObserver
from .config import MetricOptConfig

SELECTIONS = 20  # evaluations on the selection split, beside the last one
CHECKS = 8  # real observations in a round: so many calls say whether a ranking is better than chance
PAIRS = 16  # antithetic pairs in a round of observations on interpolated predictions
FIRST_ROUNDS = 2  # such rounds behind the first expansion, before the guide is judged
MAX_FAILURES = 8  # in a row: a round that failed as a whole
PATIENCE = 60.0  # seconds that metric calls may take in all, whatever the forward passes take


@dataclass(frozen=True)
class Defaults:
    """What the config leaves open, by what is observed.

    Attributes:
        passes: forward passes over the observation set.
        calls: metric calls to observe.
        perturbation_std: on each compact coordinate.
    """

    passes: int
    calls: int
    perturbation_std: float


# chosen on development seeds: a score of few examples is told from another only from further away
OF_PREDICTIONS, OF_SCORES = Defaults(60, 1200, 0.2), Defaults(160, 160, 0.4)


@dataclass(frozen=True)
class PhasePlan:
    """The numbers of a metric phase.

    Attributes:
        observe: what is observed, as in the config.
        passes, calls: the most forward passes and metric calls to observe.
        fewest_calls: of predictions, what one expansion and the rounds that come with it need.
        follows_time: whether `calls` may still be lowered to what `calls_in_time` says.
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
    fewest_calls: int
    follows_time: bool
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
    def from_args(
        cls, args: MetricOptConfig, observe: str, steps: int, before: int, dim: int, calls: int | None = None
    ) -> PhasePlan:
        """Spread the budgets evenly over the steps.

        Args:
            observe: what is observed; what the config asks for need not be possible.
            steps: optimizer steps of the metric phase.
            before: optimizer steps of the first phase in which the guide observes too.
            dim: coordinates; see `VirtualObserver.passes`.
            calls: what `calls_in_time` has said, where the config leaves the metric calls open.
        """

        def given(value, default):
            return default if value is None else value

        default = OF_SCORES if observe == "scores" else OF_PREDICTIONS
        timed = args.metric_call_budget is None and observe != "scores"
        passes = given(args.forward_pass_budget, default.passes)
        made = given(args.metric_call_budget, given(calls, default.calls) if timed else default.calls)
        observed, real = before + steps, min(passes, made)
        expansion, a_round = VirtualObserver.passes(dim), 2 * PAIRS + 1
        first = CHECKS + FIRST_ROUNDS * a_round  # beside the first expansion
        expansions = max(1, min((real - CHECKS) // expansion, made // 2 // (expansion + a_round)))
        if observe == "scores":
            rounds = -(-real // CHECKS)
            every = observed // max(1, rounds)
        else:  # what is left of the calls, beside those of expansions and of the rounds that come with them
            rounds = (made - first - expansions * (expansion + a_round)) // a_round
            every = -(-observed // max(1, rounds))
        return cls(
            observe=observe,
            passes=passes,
            calls=made,
            fewest_calls=first + expansion + a_round,
            follows_time=timed and calls is None,
            value_weight=args.value_weight,
            perturbation_std=default.perturbation_std,
            select_steps=max(1, steps // SELECTIONS),
            observe_steps=max(1, every),
            round_size=CHECKS if observe == "scores" else PAIRS,
            expand_steps=max(1, -(-observed // expansions)),
            checks=CHECKS,
            tune_bias=args.tune_output_bias,
            max_failures=MAX_FAILURES,
            seed=args.seed,
        )

    def calls_in_time(self, pass_seconds: float, call_seconds: float) -> int:
        """How many metric calls take no longer than the forward passes, or than a minute; at least `fewest_calls`.

        An ordinary metric, of up to 50 ms a call, has all of its `calls`, so that runs with it do not depend on time.

        Args:
            pass_seconds: that a forward pass over the observation set takes.
            call_seconds: that a metric call takes.
        """
        allowed = max(PATIENCE, self.passes * pass_seconds)
        if self.calls * call_seconds <= allowed:
            return self.calls
        return min(self.calls, max(self.fewest_calls, int(allowed / call_seconds)))
