"""From what a metric returns to one number, of any numeric type; weighted sums of several."""

from collections import UserDict
from decimal import Decimal
from fractions import Fraction
from types import MappingProxyType

import numpy as np
import pytest
import torch
from transformers import EvalPrediction

from metricopt_hf import ConfigurationError, MetricError
from metricopt_hf.evaluation.answer import plain, score_of, weights_of
from metricopt_hf.evaluation.metric import Metric

HALVES = [
    0.5, np.float16(0.5), np.float64(0.5), np.longdouble(0.5), np.array(0.5), np.array([[0.5]]), [np.float32(0.5)],
    torch.tensor(0.5), torch.tensor([0.5], dtype=torch.bfloat16), Fraction(1, 2), Decimal("0.5"),
]  # fmt: skip
NO_NUMBERS = [
    "0.5", np.str_("0.5"), None, 1j, torch.tensor(1j), np.timedelta64(1), [0.5, 0.5], np.ma.masked, float("nan"),
    np.float32("inf"), Decimal("NaN"), 10**400, 1e31, np.float64(-1e31), {}, torch.zeros(2),
]  # fmt: skip


@pytest.mark.parametrize("value", HALVES, ids=repr)
def test_a_number_of_any_type_is_one(value):
    score = score_of({"f1": value, "recall": value}, "f1", True)
    assert score == 0.5 and type(score) is float
    assert score_of(value, "f1", False) == 0.5
    assert score_of({"a": value, "b": value}, "2*a+1*b", True) == 1.5


@pytest.mark.parametrize("value", NO_NUMBERS, ids=repr)
def test_what_is_no_finite_number_is_refused(value):
    for name in ("f1", "1*f1+1*recall"):
        with pytest.raises(MetricError, match="'f1'"):
            score_of({"f1": value, "recall": 0.5}, name, True)


@pytest.mark.parametrize("mapping", [dict, UserDict, MappingProxyType])
def test_any_mapping_is_a_dict_of_numbers(mapping):
    metric = Metric(lambda prediction: mapping({"eval_f1": np.float32(0.5), "recall": np.int64(1)}), "f1")
    assert metric(EvalPrediction(np.zeros((1, 2)), np.zeros(1))) == 0.5


def test_a_weighted_sum_of_several():
    numbers = {"f1": 0.5, "eval_recall": 0.8, "top-1": 0.25}
    assert weights_of("f1") == {} and weights_of("f1+recall") == {} and weights_of("top-1") == {}
    assert weights_of("0.7*f1+0.3 * recall - 1e-1*top-1") == {"f1": 0.7, "recall": 0.3, "top-1": -0.1}
    assert score_of(numbers, "0.7*f1 + 0.3*recall - 2*top-1", True) == pytest.approx(0.7 * 0.5 + 0.3 * 0.8 - 0.5)
    assert score_of({"2*f1": 3.0, "f1": 1.0}, "2*f1", True) == 3.0  # a key that is called so is taken as it is
    with pytest.raises(MetricError, match="none of which is 'f2'"):
        score_of(numbers, "0.7*f1+0.3*f2", True)


def test_numbers_become_python_s():
    cases = (np.int64(4), 4), (Fraction(1, 2), 0.5), (np.True_, True), (torch.tensor(2), 2), (None, None)
    for value, expected in cases:
        assert plain(value) == expected and type(plain(value)) is type(expected)


def test_arguments_of_a_metric_may_be_numpy_s_and_no_texts():
    metric = Metric(lambda prediction: 0.5, np.str_("f1"), np.False_, np.float32(5))
    assert metric.greater_is_better is False and type(metric.timeout) is float and type(metric.name) is str
    with pytest.raises(ConfigurationError, match="greater_is_better='down' must be True or False"):
        Metric(lambda prediction: 0.5, "f1", "down")
