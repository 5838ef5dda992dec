"""Trust: near zero for whoever knows nothing, near one for whoever knows."""

import numpy as np
import pytest

from metricopt_hf.guides.trust import DISCOUNT, NO_EVIDENCE, NOT_PREDICTIVE, PREDICTIVE, Trust


def judged(predict, rounds=20, size=8, seed=0):
    """Trust after some rounds of random scores. predict: (scores, rng) -> predictions."""
    rng, trust = np.random.default_rng(seed), Trust()
    for _ in range(rounds):
        scores = rng.normal(size=size)
        trust.update(predict(scores, rng), scores)
    return trust


def noise(scores, rng):
    return rng.normal(size=len(scores))


def test_noise_is_hardly_ever_trusted_and_then_by_little():
    values = [judged(noise, seed=seed).value()[0] for seed in range(100)]
    assert np.mean(values) < 0.02
    assert np.mean(np.array(values) > 0) < 0.16
    assert max(values) < 0.25


def test_a_common_trend_of_guide_and_metric_earns_nothing():
    trust, rng = Trust(), np.random.default_rng(0)
    for trend in range(20):
        trust.update(10 * trend + noise(np.empty(8), rng), 10 * trend + noise(np.empty(8), rng))
    assert trust.value()[0] < 0.1


@pytest.mark.parametrize(
    ("predict", "low", "high", "reason"),
    [
        (lambda scores, rng: scores, 0.85, 1, PREDICTIVE),
        (lambda scores, rng: np.exp(5 * scores), 0.85, 1, PREDICTIVE),  # ranks only: another unit will do
        (lambda scores, rng: scores + 2 * noise(scores, rng), 0.1, 0.6, PREDICTIVE),
        (lambda scores, rng: -scores, 0, 0, NOT_PREDICTIVE),
        (lambda scores, rng: np.zeros(len(scores)), 0, 0, NOT_PREDICTIVE),
    ],
    ids=["perfect", "monotone", "noisy", "negated", "constant"],
)
def test_trust_follows_what_was_predicted(predict, low, high, reason):
    value, why = judged(predict).value()
    assert low <= value <= high and why == reason


def test_more_rounds_of_the_same_quality_are_trusted_more():
    assert judged(lambda s, rng: s, rounds=1).value()[0] < judged(lambda s, rng: s, rounds=5).value()[0]


def test_the_pooled_value_is_the_discounted_mean_less_a_standard_error():
    trust = Trust()
    trust.update(np.array([1.0, 2, 3, 4]), np.array([1.0, 2, 3, 4]))  # 1, of 3 degrees of freedom
    trust.update(np.array([1.0, 2, 3]), np.array([1.0, 3, 2]))  # 0.5, of 2
    evidence = DISCOUNT * 3 + 2
    correlation = (DISCOUNT * 3 * 1 + 2 * 0.5) / evidence
    assert trust.correlation == pytest.approx(correlation)
    assert trust.value()[0] == pytest.approx(correlation - evidence**-0.5)


@pytest.mark.parametrize("scores", [[], [1.0], [2.0, 2.0], [3.0, 3.0, 3.0, 3.0]])
def test_rounds_that_say_nothing_are_no_evidence(scores):
    trust = Trust()
    trust.update(np.arange(float(len(scores))), np.array(scores))
    assert trust.value() == (0.0, NO_EVIDENCE)
    assert np.isnan(trust.correlation)


def test_a_round_of_constant_predictions_is_outlived():
    trust, scores = Trust(), np.arange(8.0)
    trust.update(np.zeros(8), scores)
    for _ in range(20):
        trust.update(scores, scores)
    assert trust.value()[0] > 0.5


def test_the_state_holds_everything():
    first, second = judged(noise), Trust()
    second.load_state_dict(first.state_dict())
    assert second == first


def test_predictions_that_are_not_finite_count_as_not_predicting_and_are_forgotten():
    trust = Trust()
    scores = np.arange(8.0)
    trust.update(np.full(8, np.nan), scores)
    assert trust.value() == (0.0, NOT_PREDICTIVE)
    for _ in range(20):
        trust.update(scores, scores)
    assert trust.value()[0] > 0.5


def test_a_round_of_one_pair_counts():
    trust = Trust()
    for _ in range(50):
        trust.update(np.array([0.0, 1.0]), np.array([0.0, 1.0]))
    assert trust.value()[0] > 0.5
