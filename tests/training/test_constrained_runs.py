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


def test_feasible_comes_before_better_and_all_numbers_are_kept(tmp_path):
    free = train(tmp_path, metric_constraints=None)
    bound = train(tmp_path)
    assert free.model.w[AXIS] > BOUND and free.result.constraints == ()
    assert bound.model.w[AXIS] <= BOUND
    result = bound.result
    assert result.keys == ("size",) and result.trajectory.raw.shape == (len(result.trajectory), 1)
    w = np.array([bound.phase.coordinates.origin.numpy() + z for z in result.trajectory.z])
    np.testing.assert_allclose(result.trajectory.raw[:, 0], w[:, AXIS], atol=1e-5)
    assert result.best_score < bound.result.curve[0]["selection"]
    (check,) = result.constraints
    assert check.holds and check.value == pytest.approx(float(bound.model.w.detach()[AXIS])) and check.noise == 0.0
    assert str(check).startswith(f"size<={BOUND:g} holds: ")
    (report,) = bound.check_constraints(bound.selection_dataset)
    assert report == check
    # it was turned back at the bound again and again, not led by the loss alone
    reasons = [row["reason"] for row in result.curve]
    assert any("towards size<=" in reason for reason in reasons) and any("towards" not in reason for reason in reasons)


def test_a_selection_that_forgets_them_is_found_out(tmp_path, monkeypatch):
    monkeypatch.setattr("metricopt_hf.evaluation.metric.shortfall", lambda constraints, values: 0.0)
    trainer = train(tmp_path)
    assert trainer.model.w[AXIS] > BOUND and not trainer.result.constraints[0].holds


def test_where_nothing_is_feasible_the_least_infeasible_is_kept_and_told(tmp_path, caplog):
    trainer = train(tmp_path, metric_constraints="size>=5000", max_steps=6)
    (check,) = trainer.result.constraints
    assert not check.holds and "does not hold" in str(check)
    sizes = [row["constraints"][0] for row in trainer.result.curve if row["selection"] is not None]
    assert check.value == pytest.approx(max(sizes))
    assert any(record.levelname == "WARNING" and "does not hold" in record.message for record in caplog.records)


def test_it_goes_on_from_a_checkpoint_as_if_it_had_not_been_interrupted(tmp_path):
    options = {"max_steps": 8, "metric_call_budget": 48}
    whole = train(tmp_path / "whole", **options)
    train(tmp_path / "part", save_strategy="steps", save_steps=4, **options)
    resumed = constrained_trainer(tmp_path / "part", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "part" / "checkpoint-4"))
    assert torch.equal(resumed.model.w, whole.model.w)
    assert resumed.result.trajectory.raw.tolist() == whole.result.trajectory.raw.tolist()
    assert [c.raw for c in resumed.phase.selection.candidates] == [c.raw for c in whole.phase.selection.candidates]


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


def test_on_interpolated_predictions_and_with_a_weighted_sum(tmp_path):
    name = "0.5*accuracy+0.5*likelihood"
    trainer = text_trainer(
        tmp_path,
        metric_for_best_model=name,
        metric_constraints="accuracy>=0.2",
        metric_start_ratio=0.25,
        eval_strategy="steps",
        eval_steps=8,
        phi_dim=2,
        trainer_kwargs={"compute_metrics": shares},
    )
    trainer.train()
    result = trainer.result
    assert result.keys == ("accuracy", "accuracy", "likelihood") and len(trainer.phase.rounds.interpolated) > 30
    raw, scores = trainer.phase.rounds.interpolated.raw, trainer.phase.rounds.interpolated.scores
    np.testing.assert_allclose(scores, (raw[:, 1] + raw[:, 2]) / 2, atol=1e-6)
    (check,) = result.constraints
    assert check.holds and 0 < check.noise < 0.2
    found = trainer.evaluate(Texts(40, seed=9))
    assert found[f"eval_{name}"] == pytest.approx((found["eval_accuracy"] + found["eval_likelihood"]) / 2)


