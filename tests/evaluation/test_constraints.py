"""Constraints and weighted sums: how they are written, and what comes before what."""

import numpy as np
import pytest
from transformers import EvalPrediction

from metricopt_hf import ConfigurationError, Metric, MetricError
from metricopt_hf.evaluation.answer import Score, parse, score_of, weights_of

PREDICTION = EvalPrediction(np.eye(2, dtype=np.float32), np.arange(2))


def metric(numbers, name="recall", text=None, greater_is_better=True):
    made = Metric(lambda prediction: numbers, name, greater_is_better, exact=True)
    made.constraints = parse(text)
    return made


def test_they_are_read_as_they_are_written():
    read = parse(" precision >=0.6,ece<= 5e-2 , recall@5>=-1")
    assert [(c.key, c.operator, c.bound) for c in read] == [
        ("precision", ">=", 0.6),
        ("ece", "<=", 0.05),
        ("recall@5", ">=", -1.0),
    ]
    assert [c.greater_is_better for c in read] == [True, False, True] and parse(None) == ()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "'' is no constraint"),
        ("precision", "'precision' is no constraint"),
        ("precision>=0.6,", "'' is no constraint"),
        (">=0.6", "no constraint"),
        ("precision>0.6", "operator '>'"),
        ("precision==0.6", "operator '=='"),
        ("precision=>0.6", "operator"),
        ("precision>=high", "'high' is no finite number"),
        ("precision>=nan", "no finite number"),
        ("precision>=0.6, precision>=0.7", "twice"),
    ],
)
def test_what_cannot_be_read_is_refused_with_the_part_that_cannot(text, message):
    with pytest.raises(ConfigurationError, match=message):
        parse(text)


def test_a_shortfall_is_relative_to_the_bound_and_zero_where_it_holds():
    at_least, at_most, zero = parse("a>=0.5, b<=2, c<=0")
    assert at_least.shortfall(0.5) == 0 and at_least.shortfall(0.4) == pytest.approx(0.2)
    assert at_most.shortfall(1.9) == 0 and at_most.shortfall(3.0) == pytest.approx(0.5)
    assert zero.shortfall(0.3) == pytest.approx(0.3)


def test_a_score_brings_the_numbers_of_all_keys_along():
    score = metric({"eval_recall": 0.7, "precision": 0.5, "ece": 0.1}, text="precision>=0.6, ece<=0.05")(PREDICTION)
    assert score == 0.7 and score.values == (0.5, 0.1)


@pytest.mark.parametrize("numbers", [{"recall": 0.7}, 0.7, {"recall": 0.7, "precision": float("nan")}])
def test_a_constraint_without_a_finite_number_is_a_failed_call(numbers):
    with pytest.raises(MetricError, match="precision"):
        metric(numbers, text="precision>=0.6")(PREDICTION)


def test_feasible_comes_before_better_and_less_infeasible_before_more():
    judge = metric({}, text="precision>=0.6")
    feasible, better = Score(0.1, [0.6]), Score(0.2, [0.7])
    missed, missed_by_more = Score(0.9, [0.5]), Score(0.95, [0.3])
    order = [missed_by_more, missed, feasible, better]
    assert judge.merit(Score(1.0, [1.0])) == 1.0  # the unit of what is missed
    assert sorted(reversed(order), key=judge.merit) == order
    smaller = metric({}, text="precision>=0.6", greater_is_better=False)
    assert smaller.merit(Score(1.0, [1.0])) == -1.0
    assert sorted(order, key=smaller.merit) == [missed_by_more, missed, better, feasible]
    assert [check.holds for check in judge.checks(missed.values)] == [False]


def test_a_weighted_sum_of_several():
    numbers = {"f1": 0.5, "recall": 0.8, "top-1": 0.25}
    assert weights_of("f1") == {} and weights_of("f1+recall") == {} and weights_of("top-1") == {}
    assert weights_of("0.7*f1+0.3 * recall - 1e-1*top-1") == {"f1": 0.7, "recall": 0.3, "top-1": -0.1}
    summed = metric(numbers, "0.7*f1 + 0.3*recall - 2*top-1", text="recall>=0.5")(PREDICTION)
    assert summed == pytest.approx(0.7 * 0.5 + 0.3 * 0.8 - 0.5)
    assert summed.values == (0.8, 0.5, 0.8, 0.25)  # of the constraint, then of the sum
    # a key that is called so is taken as it is
    assert score_of({"2*f1": 3.0, "f1": 1.0}, "2*f1", True) == 3.0
    with pytest.raises(MetricError, match="none of which is 'f2'"):
        metric(numbers, "0.7*f1+0.3*f2")(PREDICTION)
