"""Runs with constraints: what is selected holds them, where anything does, and what is told says so."""

import numpy as np
import pytest
import torch
from helpers import OPTIMUM, Texts
from runs import bert_trainer, quadratic_trainer, text_trainer

from metricopt_hf import ConfigurationError, Metric, MetricError, MetricOptTrainer

AXIS, BOUND = 1, 1.2  # the metric wants w[1] = 2, the loss about 1

CONSTRAINED = {"metric_constraints": f"size<={BOUND}"}


def numbers(prediction):
    w = prediction.predictions[0]
    return {"distance": float(((w - OPTIMUM) ** 2).sum()), "size": float(w[AXIS])}


def constrained_trainer(folder, cls=MetricOptTrainer, **kwargs):
    trainer = quadratic_trainer(folder, cls=cls, **{**CONSTRAINED, **kwargs})
    trainer.given.metric = Metric(numbers, "distance", greater_is_better=False)
    return trainer


def train(folder, cls=MetricOptTrainer, **kwargs):
    trainer = constrained_trainer(folder, cls, **kwargs)
    trainer.train()
    return trainer


def test_feasible_comes_before_better(tmp_path):
    free = train(tmp_path, metric_constraints=None)
    bound = train(tmp_path)
    assert free.model.w[AXIS] > BOUND and free.result.constraints == ()
    assert bound.model.w[AXIS] <= BOUND
    result = bound.result
    assert result.best_score < result.start.score  # smaller is better
    (check,) = result.constraints
    assert check.holds and check.value == pytest.approx(float(bound.model.w.detach()[AXIS]))
    assert str(check).startswith(f"size<={BOUND:g} holds: ")
    (report,) = bound.check_constraints(bound.selection_dataset)
    assert report.holds and report.value == check.value


def test_a_bound_that_only_one_odd_answer_says_to_hold_is_not_believed(tmp_path):
    """A number of 1e29, once."""
    calls = []

    def odd(prediction):
        found = numbers(prediction)
        if len(prediction.label_ids) == 8 and not np.allclose(prediction.predictions[0], 0):
            calls.append(0)
            found["size"] = -1e29 if len(calls) == 40 else 5.0
        return found

    trainer = quadratic_trainer(tmp_path, **CONSTRAINED)
    trainer.given.metric = Metric(odd, "distance", greater_is_better=False)
    trainer.train()
    assert len(calls) > 40 and trainer.result.chosen.raw[0] > -1e29


def test_where_nothing_is_feasible_the_least_infeasible_is_kept_and_told(tmp_path, caplog):
    trainer = train(tmp_path, metric_constraints="size>=5000")
    (check,) = trainer.result.constraints
    assert not check.holds and "does not hold" in str(check)
    assert check.value == pytest.approx(max(candidate.raw[0] for candidate in trainer.result.candidates))
    assert any(record.levelname == "WARNING" and "does not hold" in record.message for record in caplog.records)


@pytest.mark.parametrize("text", ["precision", "precision>0.6", "precision>=much", 0.6])
def test_what_cannot_be_read_is_refused_by_the_config(tmp_path, text):
    with pytest.raises(ConfigurationError, match="metric_constraints"):
        bert_trainer(tmp_path, metric_constraints=text)


def test_an_unknown_key_ends_the_run_before_training(tmp_path):
    trainer = constrained_trainer(tmp_path, metric_constraints="weight<=1")
    with pytest.raises(MetricError, match="none of which is 'weight'"):
        trainer.train()
    assert not trainer.model.w.any()


def shares(prediction):
    """Of the classes among what is predicted, and how many of it are right."""
    predicted = prediction.predictions.argmax(-1)
    probabilities = torch.softmax(torch.as_tensor(prediction.predictions), -1).numpy()
    likelihood = float(np.log(probabilities[np.arange(len(predicted)), prediction.label_ids]).mean())
    return {"likelihood": likelihood, "accuracy": float((predicted == prediction.label_ids).mean())}


def test_on_linearised_predictions_and_with_a_weighted_sum(tmp_path):
    name = "0.5*accuracy+0.5*likelihood"
    trainer = text_trainer(
        tmp_path,
        metric_for_best_model=name,
        metric_constraints="accuracy>=0.2",
        eval_strategy="steps",
        eval_steps=8,
        trainer_kwargs={"compute_metrics": shares},
    )
    trainer.train()
    result = trainer.result
    assert len(result.chosen.raw) == 3 and result.best_score == pytest.approx(sum(result.chosen.raw[1:]) / 2)
    (check,) = result.constraints
    assert check.holds and 0 < check.noise < 0.3
    found = trainer.evaluate(Texts(40, seed=9))
    assert found[f"eval_{name}"] == pytest.approx((found["eval_accuracy"] + found["eval_likelihood"]) / 2)
