"""The numbers of a metric phase, from the config, the number of steps and the metric's time."""

import pytest

from metricopt_hf import MetricOptConfig
from metricopt_hf.training.plan import CHECKS, FIRST_ROUNDS, OF_PREDICTIONS, OF_SCORES, PAIRS, PATIENCE, PhasePlan

A_ROUND = 2 * PAIRS + 1


def plan(observe, steps, dim=6, before=0, calls=None, **given):
    return PhasePlan.from_args(MetricOptConfig("out", **given), observe, steps, before, dim, calls)


@pytest.mark.parametrize(
    ("given", "metric_steps", "every"),
    [
        ({}, 200, 10),  # 160 calls, 8 a round: 20 rounds
        ({}, 100, 5),
        ({"metric_call_budget": 80}, 100, 10),
        ({"metric_call_budget": 81}, 110, 10),  # the last round may be smaller
        ({"forward_pass_budget": 80}, 100, 10),
        ({"metric_call_budget": 160}, 100, 5),
        ({}, 5, 1),
    ],
)
def test_rounds_of_scores_are_spread_over_the_steps(given, metric_steps, every):
    assert plan("scores", metric_steps, **given).observe_steps == every


@pytest.mark.parametrize(("metric_steps", "every"), [(200, 10), (5, 1)])
def test_selections_are_spread_over_the_metric_phase(metric_steps, every):
    assert plan("scores", metric_steps).select_steps == every


@pytest.mark.parametrize("observe", ["predictions", "predictions_on_all_rows", "scores"])
def test_what_the_config_leaves_open_depends_on_what_is_observed(observe):
    open_, default = plan(observe, 100), OF_SCORES if observe == "scores" else OF_PREDICTIONS
    assert (open_.passes, open_.calls) == (default.passes, default.calls)
    assert open_.perturbation_std == default.perturbation_std
    given = {"value_weight": 3.0, "forward_pass_budget": 33, "metric_call_budget": 44}
    said = plan(observe, 100, **given)
    assert [said.value_weight, said.passes, said.calls] == list(given.values())


@pytest.mark.parametrize("passes", [21, 60, 100, 500])
@pytest.mark.parametrize("calls", [250, 1200, 5000])
@pytest.mark.parametrize("steps", [40, 200, 1000])
def test_the_budgets_of_predictions_are_used_and_kept(passes, calls, steps):
    made = plan("predictions", steps, forward_pass_budget=passes, metric_call_budget=calls)
    expansions = -(-steps // made.expand_steps)
    assert made.checks + expansions * 13 <= passes
    spent = made.checks + expansions * (13 + A_ROUND) + FIRST_ROUNDS * A_ROUND + steps // made.observe_steps * A_ROUND
    assert spent <= calls + A_ROUND or calls < 400  # of a small budget the ledger stops the last rounds


def test_too_few_calls_still_make_one_expansion():
    assert plan("predictions", 200, metric_call_budget=30).expand_steps == 200


@pytest.mark.parametrize("pass_seconds", [0.001, 1.0, 10.0])
@pytest.mark.parametrize("call_seconds", [0.0, 1e-4, 0.01, PATIENCE / OF_PREDICTIONS.calls])
def test_an_ordinary_metric_has_all_of_its_calls_whatever_was_measured(pass_seconds, call_seconds):
    assert plan("predictions", 200).calls_in_time(pass_seconds, call_seconds) == OF_PREDICTIONS.calls == 1200


@pytest.mark.parametrize(
    ("pass_seconds", "call_seconds", "calls"),
    [
        (0.1, 0.1, 600),  # a minute; the passes take 6 s
        (2.0, 0.1, 1200),  # two minutes, as long as the passes
        (2.0, 0.2, 600),
        (0.1, 60.0, CHECKS + 13 + (FIRST_ROUNDS + 1) * A_ROUND),  # what one expansion needs
    ],
)
def test_of_a_slow_one_there_are_as_many_calls_as_take_no_longer_than_the_passes(pass_seconds, call_seconds, calls):
    made = plan("predictions", 200)
    assert made.calls_in_time(pass_seconds, call_seconds) == calls
    slow = plan("predictions", 200, calls=calls)
    assert slow.calls == calls and slow.passes == made.passes and not slow.follows_time
    assert slow.observe_steps >= made.observe_steps


def test_what_the_user_says_is_not_timed():
    given = plan("predictions", 200, metric_call_budget=5000)
    assert plan("predictions", 200).follows_time and not given.follows_time
    assert plan("predictions", 200, metric_call_budget=5000, calls=300).calls == 5000
    assert plan("scores", 200, calls=300).calls == OF_SCORES.calls and not plan("scores", 200).follows_time
