"""Runs that observe predictions: budgets, interpolation, the fallback to scores, resume, and the tuned bias."""

import logging

import numpy as np
import pytest
import torch
from helpers import Texts, assert_equal_weights, tiny_bert, true_class_probability, weights
from runs import Truth, planned
from transformers import EvalPrediction

from metricopt_hf import Ledger, Metric, MetricOptConfig, MetricOptTrainer
from metricopt_hf.evaluation import evaluator
from metricopt_hf.posthoc import add_bias, tune_bias

PASSES, CALLS = 40, 400


def make(folder, metric=true_class_probability, model=None, guide=None, selection=60, **kwargs):
    defaults = {
        "max_steps": 12,
        "learning_rate": 1e-2,
        "metric_start_ratio": 0,
        "forward_pass_budget": PASSES,
        "metric_call_budget": CALLS,
        "phi_dim": 3,
        "select_steps": 3,
        "greater_is_better": True,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
    }
    settings = {**defaults, **kwargs}
    return planned(MetricOptTrainer, settings)(
        model or tiny_bert(),
        MetricOptConfig(str(folder), **settings),
        train_dataset=Texts(120, seed=1),
        observation_dataset=Texts(80, seed=2),
        selection_dataset=Texts(selection, seed=3),
        metric=metric,
        guide=guide,
    )


def test_a_pass_serves_many_calls_and_both_budgets_are_kept(tmp_path):
    seen = []

    def metric(prediction):
        seen.append(len(prediction.label_ids))
        return true_class_probability(prediction)

    trainer = make(tmp_path, metric)
    trainer.train()
    ledger = trainer.ledger
    assert 5 * 7 < ledger.passes["observe"] <= PASSES  # expansions of 2 * 3 + 1, and the checks
    assert 5 * ledger.passes["observe"] < ledger.calls["observe"] <= CALLS
    assert set(seen) == {40, 80, 60}  # halves and all of the observation set; the selection set
    assert len(seen) == sum(ledger.calls.values())
    assert len(trainer.observations) == ledger.passes["observe"]
    curve = [row for row in trainer.result.curve if row["interpolation_error"] is not None]
    assert curve and all(0 <= row["interpolation_error"] < 0.5 for row in curve)
    assert trainer.result.trust > 0.3


def test_a_metric_of_all_rows_is_never_given_a_part(tmp_path):
    sizes = set()

    def metric(prediction):
        sizes.add(len(prediction.label_ids))
        return true_class_probability(prediction)

    make(tmp_path, metric, observe="predictions_on_all_rows").train()
    assert sizes == {80, 60}


def test_it_follows_the_metric_further_than_the_loss_does(tmp_path):
    """The metric asks for class 0 alone, which the loss does not."""

    def favours_one(prediction):
        return float(torch.softmax(torch.as_tensor(prediction.predictions), -1)[:, 0].mean())

    scores = {}
    for name, changes in {"guided": {}, "loss": {"value_weight": 0.0, "metric_call_budget": 0}}.items():
        trainer = make(tmp_path, favours_one, tune_output_bias=False, **changes)
        trainer.train()
        scores[name] = trainer.result.best_score
    assert scores["guided"] > scores["loss"] + 0.01


@pytest.mark.parametrize("kind", ["tokens", "shapes"])
def test_what_cannot_be_interpolated_is_observed_by_scores_and_said_once(tmp_path, caplog, kind):
    class Generates(MetricOptTrainer):
        def prediction_step(self, *args, **kwargs):
            loss, logits, labels = super().prediction_step(*args, **kwargs)
            tokens = (1000 * logits).round().long()
            return loss, tokens if kind == "tokens" else logits[:, : 1 + int(tokens.sum() % 2)], labels

    def metric(prediction):
        return float(np.mean(prediction.predictions[:, 0]))

    trainer = make(tmp_path, metric, select_steps=100)
    trainer.__class__ = Generates
    trainer.train()
    said = [r.message for r in caplog.records if "scores are observed, not the model's predictions" in r.message]
    assert len(said) == 1 and ("whole numbers" if kind == "tokens" else "shape") in said[0]
    assert trainer.ledger.calls["observe"] == trainer.ledger.passes["observe"] > 0


def test_where_the_budget_is_too_small_scores_are_observed(tmp_path, caplog):
    trainer = make(tmp_path, forward_pass_budget=10)
    trainer.train()
    assert "takes 15 forward passes to begin with, and the budgets allow 10" in caplog.text
    assert trainer.ledger.calls["observe"] == trainer.ledger.passes["observe"] == 10


@pytest.mark.parametrize("step", [3, 6])
def test_resumed_it_goes_on_as_if_uninterrupted(tmp_path, step):
    kwargs = {"save_strategy": "steps", "save_steps": 3}
    whole = make(tmp_path / "whole", **kwargs)
    whole.train()
    resumed = make(tmp_path / "resumed", **kwargs)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
    assert [o.score for o in whole.observations] == [o.score for o in resumed.observations]
    assert whole.ledger.calls == resumed.ledger.calls and whole.ledger.passes == resumed.ledger.passes
    assert_equal_weights(weights(whole.model), weights(resumed.model))


def test_the_same_seed_twice_is_the_same_run(tmp_path):
    runs = [make(tmp_path / str(i)) for i in range(2)]
    for trainer in runs:
        trainer.train()
    assert_equal_weights(*(weights(trainer.model) for trainer in runs))


def test_a_guide_that_lies_is_not_followed(tmp_path):
    class Liar(Truth):
        def predict(self, z):
            return z[:, 0]

    def metric(prediction):
        return -float(np.mean(prediction.predictions[:, 0]))

    trainer = make(tmp_path, metric, guide=Liar(), phi=r"classifier\.bias$", coordinates="identity")
    trainer.train()
    assert trainer.result.trust == 0 and all(row["trust"] == 0 for row in trainer.result.curve)


def decided_for_the_second(prediction):
    """Its optimum is a threshold that no small step reaches."""
    return float((prediction.predictions.argmax(-1) == 1).mean())


def test_the_tuned_bias_is_a_candidate_and_part_of_the_output_layer(tmp_path):
    trainer = make(tmp_path, decided_for_the_second, forward_pass_budget=0, phi_learning_rate=1e-9)
    before = trainer.model.classifier.bias.detach().clone()
    trainer.train()
    result = trainer.result
    assert result.best_score == 1.0 and result.bias_tuned
    assert trainer.ledger.calls["post-hoc"] > 0
    moved = trainer.model.classifier.bias.detach() - before
    assert moved.argmax() == 1 and moved.abs().max() > 0
    assert decided_for_the_second(trainer.predict(trainer.selection_dataset)) == 1.0


def test_where_it_is_not_wanted_no_bias_is_tuned(tmp_path):
    trainer = make(
        tmp_path, decided_for_the_second, forward_pass_budget=0, phi_learning_rate=1e-9, tune_output_bias=False
    )
    trainer.train()
    assert trainer.ledger.calls["post-hoc"] == 0 and not trainer.result.bias_tuned


def test_the_tuned_bias_is_that_of_posthoc(tmp_path):
    trainer = make(tmp_path, decided_for_the_second, forward_pass_budget=0, phi_learning_rate=1e-9, value_weight=0.0)
    outputs = [trainer.predict(split) for split in (trainer.observation_dataset, trainer.selection_dataset)]
    observed, selected = (EvalPrediction(output.predictions, output.label_ids) for output in outputs)
    metric = Metric(decided_for_the_second, "m")
    expected = tune_bias(metric, observed, Ledger())
    before = trainer.model.classifier.bias.detach().clone()
    trainer.train()
    assert trainer.result.best_score == metric(add_bias(selected, expected)) == 1.0
    assert np.allclose(trainer.model.classifier.bias.detach() - before, expected, atol=1e-6)


def test_a_half_of_the_rows_on_which_the_metric_fails_costs_its_round_alone(tmp_path):
    calls = []

    def metric(prediction):
        calls.append(len(prediction.label_ids))
        if len(calls) - calls.index(40) < 60 if 40 in calls else False:  # the first rounds of interpolated calls
            raise ValueError("a class is missing")
        return true_class_probability(prediction)

    trainer = make(tmp_path, metric)
    trainer.train()
    assert trainer.result.failed_calls > 8 and trainer.phase.guide.off is None
    assert len(trainer.observations) > 15


class Clock:
    """Stands in for the clock by which passes and calls are timed: only what is said to take time does."""

    def __init__(self, monkeypatch, passes=0.0, calls=0.0):
        self.now, self.passes, self.calls = 0.0, passes, calls
        monkeypatch.setattr(evaluator, "perf_counter", lambda: self.now)
        predictions = evaluator._Data.predictions

        def timed(data):
            self.now += self.passes
            return predictions(data)

        monkeypatch.setattr(evaluator._Data, "predictions", timed)

    def metric(self, prediction):
        self.now += self.calls
        return true_class_probability(prediction)


ENOUGH = 8 + 7 + 3 * 33  # calls that an expansion in three coordinates and its rounds need


@pytest.mark.parametrize(
    ("passes", "calls", "budget"),
    [(2**-10, 2**-7, 1200), (2.0, 2**-4, 1200), (2**-10, 0.5, 120), (5.0, 1.0, 200), (2**-10, 64.0, ENOUGH)],
)
def test_a_slow_metric_is_called_no_longer_than_the_passes_take_or_a_minute(
    tmp_path, monkeypatch, caplog, passes, calls, budget
):
    clock = Clock(monkeypatch, passes, calls)
    with caplog.at_level(logging.INFO, "metricopt_hf"):
        trainer = make(tmp_path, clock.metric, forward_pass_budget=PASSES, metric_call_budget=None)
        trainer.train()
    assert trainer.phase.plan.calls == trainer.ledger.budget == budget
    assert ENOUGH - 33 < trainer.ledger.calls["observe"] <= budget
    assert (f"{budget} calls instead of 1200" in caplog.text) is (budget < 1200)


def test_what_the_user_allows_is_not_timed(tmp_path, monkeypatch):
    trainer = make(tmp_path, Clock(monkeypatch, calls=60.0).metric)
    trainer.train()
    assert trainer.phase.plan.calls == CALLS


def test_a_resumed_run_keeps_the_calls_that_were_timed_whatever_the_clock_says_now(tmp_path, monkeypatch):
    kwargs = {"save_strategy": "steps", "save_steps": 3, "metric_call_budget": None}
    with monkeypatch.context() as patched:
        whole = make(tmp_path / "whole", Clock(patched, calls=0.5).metric, **kwargs)
        whole.train()
    resumed = make(tmp_path / "resumed", Clock(monkeypatch).metric, **kwargs)  # no call takes any time now
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert resumed.phase.plan == whole.phase.plan and whole.phase.plan.calls == 120
    assert whole.ledger.calls == resumed.ledger.calls
    assert [o.score for o in whole.observations] == [o.score for o in resumed.observations]
