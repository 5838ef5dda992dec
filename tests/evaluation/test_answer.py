"""From what a metric answers to numbers: those of any numeric type are taken, of constraints as of the score."""

from collections import UserDict
from decimal import Decimal
from fractions import Fraction
from types import MappingProxyType

import numpy as np
import pytest
import torch
from transformers import EvalPrediction

from metricopt_hf import ConfigurationError, MetricError
from metricopt_hf.evaluation.answer import parse, plain, score_of, values_of
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
def test_a_number_of_any_type_is_one_for_score_and_constraint(value):
    score = score_of({"f1": value, "recall": value}, "f1", True, ["recall"])
    assert score == 0.5 and values_of(score) == (0.5,) and type(values_of(score)[0]) is float
    assert score_of(value, "f1", False) == 0.5
    assert score_of({"a": value, "b": value}, "2*a+1*b", True) == 1.5


@pytest.mark.parametrize("value", NO_NUMBERS, ids=repr)
def test_what_is_no_finite_number_is_refused_for_score_and_constraint(value):
    for answer in ({"f1": value, "recall": 0.5}, {"f1": 0.5, "recall": value}):
        with pytest.raises(MetricError, match="'f1'|'recall'"):
            score_of(answer, "f1", True, ["recall"])


@pytest.mark.parametrize("mapping", [dict, UserDict, MappingProxyType])
def test_any_mapping_is_a_dict_of_numbers(mapping):
    metric = Metric(lambda prediction: mapping({"eval_f1": np.float32(0.5), "recall": np.int64(1)}), "f1")
    metric.constraints = parse("recall>=1")
    score = metric(EvalPrediction(np.zeros((1, 2)), np.zeros(1)))
    assert score == 0.5 and metric.shortfall(score) == 0


def test_numbers_become_python_s():
    cases = (np.int64(4), 4), (Fraction(1, 2), 0.5), (np.True_, True), (torch.tensor(2), 2), (None, None)
    for value, expected in cases:
        assert plain(value) == expected and type(plain(value)) is type(expected)


def test_arguments_of_a_metric_may_be_numpy_s_and_no_texts():
    metric = Metric(lambda prediction: 0.5, np.str_("f1"), np.False_, np.float32(5))
    assert metric.greater_is_better is False and type(metric.timeout) is float and type(metric.name) is str
    with pytest.raises(ConfigurationError, match="greater_is_better='down' must be True or False"):
        Metric(lambda prediction: 0.5, "f1", "down")
