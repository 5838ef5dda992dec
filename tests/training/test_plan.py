"""The numbers of a metric phase, from the config and the number of steps."""

import pytest

from metricopt_hf import MetricOptConfig
from metricopt_hf.training.plan import DEFAULTS, FIRST_ROUNDS, PAIRS, PhasePlan


def plan(observe, steps, dim=6, before=0, **given):
    return PhasePlan.from_args(MetricOptConfig("out", **{"unguided_ratio": 0.5, **given}), observe, steps, before, dim)


@pytest.mark.parametrize(
    ("given", "metric_steps", "every"),
    [
        ({"unguided_ratio": 0}, 200, 10),  # 160 calls, 8 a round: 20 rounds
        ({}, 200, 5),  # half of the steps are guided
        ({"unguided_ratio": 0.4}, 200, 6),
        ({"metric_call_budget": 80}, 200, 10),
        ({"metric_call_budget": 81}, 220, 10),  # the last round may be smaller
        ({"observations_per_step": 16}, 200, 10),
        ({"forward_pass_budget": 80}, 200, 10),
        ({"metric_call_budget": 160}, 200, 5),
        ({}, 5, 1),
        ({"observe_steps": 7}, 200, 7),
    ],
)
def test_rounds_of_scores_are_spread_over_the_guided_steps(given, metric_steps, every):
    assert plan("scores", metric_steps, **given).observe_steps == every


@pytest.mark.parametrize(("given", "metric_steps", "every"), [({}, 200, 10), ({}, 5, 1), ({"select_steps": 3}, 200, 3)])
def test_selections_are_spread_over_the_metric_phase(given, metric_steps, every):
    assert plan("scores", metric_steps, **given).select_steps == every


@pytest.mark.parametrize("observe", ["predictions", "scores"])
def test_what_the_config_leaves_open_depends_on_what_is_observed(observe):
    open_, default = plan(observe, 100), DEFAULTS[observe]
    assert (open_.passes, open_.calls) == (default.passes, default.calls)
    assert (open_.value_weight, open_.perturbation_std) == (default.value_weight, default.perturbation_std)
    given = {"value_weight": 3.0, "perturbation_std": 0.7, "forward_pass_budget": 33, "metric_call_budget": 44}
    said = plan(observe, 100, **given)
    assert [said.value_weight, said.perturbation_std, said.passes, said.calls] == list(given.values())


@pytest.mark.parametrize("passes", [21, 60, 100, 500])
@pytest.mark.parametrize("calls", [250, 1200, 5000])
@pytest.mark.parametrize("steps", [40, 200, 1000])
def test_the_budgets_of_predictions_are_used_and_kept(passes, calls, steps):
    made = plan("predictions", steps, unguided_ratio=0, forward_pass_budget=passes, metric_call_budget=calls)
    expansions = -(-steps // made.expand_steps)
    a_round = 2 * PAIRS + 1
    assert made.checks + expansions * 13 <= passes
    spent = made.checks + expansions * (13 + a_round) + FIRST_ROUNDS * a_round + steps // made.observe_steps * a_round
    assert spent <= calls + a_round or calls < 400  # of a small budget the ledger stops the last rounds


def test_too_few_calls_still_make_one_expansion():
    assert plan("predictions", 200, metric_call_budget=30).expand_steps == 100
