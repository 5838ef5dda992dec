"""Constraints: how they are written, what a missed bound costs, and what a run with them ends in."""

import numpy as np
import pytest
from helpers import OPTIMUM
from runs import quadratic_trainer
from transformers import EvalPrediction

from metricopt_hf import ConfigurationError, Metric, MetricError, ModelMetric
from metricopt_hf.experimental import check, constrained
from metricopt_hf.experimental.constraints import parse

PREDICTION = EvalPrediction(np.eye(2, dtype=np.float32), np.arange(2))


def test_they_are_read_as_they_are_written():
    read = parse(" precision >=0.6,ece<= 5e-2 , recall@5>=-1")
    assert list(map(str, read)) == ["precision>=0.6", "ece<=0.05", "recall@5>=-1"]


@pytest.mark.parametrize(
    "text",
    ["", "precision", "precision>=0.6,", ">=0.6", "precision>0.6", "precision==0.6", "precision=>0.6",
     "precision>=high", "precision>=nan", "precision>=0.6, precision>=0.7"],
)  # fmt: skip
def test_what_cannot_be_read_is_refused(text):
    with pytest.raises(ConfigurationError, match="is no constraint, or stands there twice"):
        constrained(Metric(lambda prediction: {}, "recall"), text)


@pytest.mark.parametrize("greater", [True, False])
def test_a_missed_bound_costs_its_relative_shortfall(greater):
    def score(constraints):
        numbers = {"eval_recall": 0.7, "precision": 0.4, "loss": 3.0, "zero": 0.3}
        return constrained(Metric(lambda prediction: numbers, "recall", greater), constraints, 2.0)(PREDICTION)

    sign = 1 if greater else -1
    assert score("precision>=0.4, loss<=3") == pytest.approx(0.7)
    assert score("precision>=0.5, loss<=2") == pytest.approx(0.7 - sign * 2 * (0.2 + 0.5))
    assert score("zero<=0") == pytest.approx(0.7 - sign * 2 * 0.3)


@pytest.mark.parametrize("numbers", [{"recall": 0.7}, 0.7, {"recall": 0.7, "precision": float("nan")}])
def test_a_constraint_without_a_finite_number_is_a_failed_call(numbers):
    with pytest.raises(MetricError, match="precision"):
        constrained(Metric(lambda prediction: numbers, "recall"), "precision>=0.6")(PREDICTION)


def test_a_metric_of_the_model_can_be_constrained():
    metric = ModelMetric(lambda model, dataset: {"size": len(dataset), "depth": 3.0}, "size")
    assert constrained(metric, "depth<=2", 1.0)(None, [0] * 5) == 5 - 0.5


def numbers(prediction):
    w = prediction.predictions[0]
    return {"distance": float(((w - OPTIMUM) ** 2).sum()), "size": float(w[1])}  # w[1] = 2 is best


def test_a_run_keeps_to_a_bound_and_says_whether_it_holds(tmp_path):
    metric = Metric(numbers, "distance", greater_is_better=False)
    ends = {}
    for bounds in ("size<=1.2", "size<=5000"):
        trainer = quadratic_trainer(tmp_path)
        trainer.given.metric = constrained(metric, bounds)
        trainer.train()
        ends[bounds] = float(trainer.model.w.detach()[1])
        assert trainer.result.best_score < trainer.result.start.score and bounds in trainer.result.metric
        (held,) = check(metric, bounds, trainer.predict(trainer.selection_dataset))
        assert held.holds and held.value == pytest.approx(ends[bounds]) and held.error == pytest.approx(0, abs=1e-6)
        assert str(held).startswith(f"{bounds} holds: ")
        (missed,) = check(metric, "size>=9", trainer.predict(trainer.selection_dataset))
        assert not missed.holds and "does not hold" in str(missed)
    assert ends["size<=1.2"] <= 1.2 < ends["size<=5000"]


def test_a_number_has_the_standard_error_of_its_rows():
    right = np.random.default_rng(0).random(400) < 0.7
    prediction = EvalPrediction(right.astype(np.float32), np.ones(400))
    metric = Metric(lambda p: {"accuracy": float(p.predictions.mean())}, "accuracy")
    (found,) = check(metric, "accuracy>=0.5", prediction)
    assert found.holds and 0.01 < found.error < 0.04  # sqrt(0.7 * 0.3 / 400) = 0.023
