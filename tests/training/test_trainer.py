"""The trainer's wiring: the metric phase, budgets, selection, saving, errors before training."""

import logging
from time import sleep

import numpy as np
import pytest
import torch
from helpers import Texts, assert_equal_weights, tiny_bert, true_class_probability, weights, worst_class_recall
from runs import Truth, bert_trainer, quadratic_trainer, text_trainer
from transformers import AutoModelForSequenceClassification, TrainerCallback, TrainingArguments

from metricopt_hf import (
    ConfigurationError,
    FiLM,
    MetricError,
    MetricOptTrainer,
    PhiError,
    Subset,
)
from metricopt_hf.phase import plan


@pytest.mark.parametrize("guide", [Truth(), None])
def test_it_goes_where_the_loss_does_not_lead(tmp_path, guide):
    trainer = quadratic_trainer(tmp_path, guide)
    trainer.train()
    result = trainer.result
    assert result.best_score < 0.5 * result.start.score and result.observed == "scores"
    assert any(row["guide"] == ("Truth" if guide else "pairs") for row in result.curve)


def test_a_guide_that_lies_is_not_followed(tmp_path, caplog):
    trainer = quadratic_trainer(tmp_path, Truth(-1))
    trainer.train()
    assert all(row["guide"] is None for row in trainer.result.curve) and len(trainer.result.curve) == 3
    assert trainer.result.ended == "3 steps in a row made the metric worse, and were taken back"
    assert trainer.result.ended in caplog.text and not trainer.model.w.any()
    assert trainer.state.global_step == 8


def test_the_loss_has_its_say_where_it_is_asked(tmp_path):
    found = {}
    for weight in (float("inf"), 0.0):
        trainer = quadratic_trainer(tmp_path, Truth(), value_weight=weight, max_steps=2, metric_steps=2)
        trainer.train()
        found[weight] = trainer.result.curve[0]["value"]
    assert found[float("inf")] > found[0.0]  # greater is better in the curve


def test_drop_in_with_compute_metrics_and_metric_for_best_model(tmp_path, caplog):
    trainer = text_trainer(tmp_path)
    observed = {tuple(x["input_ids"].tolist()) for x in trainer.observation_dataset}
    selected = {tuple(x["input_ids"].tolist()) for x in trainer.selection_dataset}
    assert "not held out" in caplog.text and len(observed & selected) < 5  # equal texts by chance aside
    assert len(trainer.observation_dataset) == len(trainer.selection_dataset) == 24
    assert trainer.result is None
    trainer.train()
    result = trainer.result
    assert result.observed == "predictions" and result.best_score >= result.start.score
    out = trainer.predict(trainer.selection_dataset).metrics["test_probability"]
    assert out == pytest.approx(result.best_score, abs=1e-6)
    assert len(result.trajectory) > 16 and result.value_function is not None
    assert all(name in str(result) for name in ("probability (greater is better)", "kept:", "why:", "cost:"))


@pytest.mark.parametrize("budget", [12, 0])
@pytest.mark.parametrize("observe", ["scores", "predictions"])
def test_the_budget_is_kept(tmp_path, observe, budget):
    calls = []

    def counted(prediction):
        calls.append(len(prediction.label_ids))
        return true_class_probability(prediction)

    trainer = bert_trainer(tmp_path, metric=counted, metric_call_budget=budget, observe=observe, guide="pairs")
    trainer.train()
    ledger = trainer.ledger
    assert len(calls) == sum(ledger.calls.values()) and len(trainer.result.trajectory) <= budget
    assert ledger.calls["observe"] <= budget + 5  # the start's and the steps' own values
    assert (trainer.result.ended == "metric_call_budget is 0") is (budget == 0)
    if observe == "scores":
        assert set(calls) <= {40, 20}  # halves for standard errors alone


def test_a_slow_metric_is_called_no_longer_than_a_minute(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(plan, "PATIENCE", 0.2)

    def slow(prediction):
        sleep(0.01)
        return true_class_probability(prediction)

    with caplog.at_level(logging.INFO, "metricopt_hf"):
        trainer = bert_trainer(tmp_path, metric=slow, metric_call_budget=None, max_steps=2, metric_steps=2)
        trainer.train()
    assert trainer.ledger.budget <= 20 and "s: it is called" in caplog.text
    given = bert_trainer(tmp_path, metric=slow, metric_call_budget=30, max_steps=2, metric_steps=2)
    given.train()
    assert given.ledger.budget == 30  # what the user allows is not timed


def test_all_but_phi_stands_still_and_everything_comes_back(tmp_path):
    model = tiny_bert()
    before, modes = weights(model), []

    class Modes(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            modes.append([name for name, module in model.named_modules() if module.training])

    trainer = bert_trainer(tmp_path, model=model, callbacks=[Modes()])
    trainer.train()
    assert modes == [[""]] * 4  # the model itself says that it is trained, nothing inside of it is
    moved = {name for name, value in weights(model).items() if not torch.equal(value, before[name])}
    assert moved and moved <= set(trainer.phi.names)
    assert all("layer.1" in name and "LayerNorm" in name or name == "classifier.bias" for name in trainer.phi.names)
    assert all(p.requires_grad for p in model.parameters()) and all(m.training for m in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_with_a_rate_that_destroys_the_model_the_start_is_kept(tmp_path):
    trainer = bert_trainer(tmp_path, metric=worst_class_recall, phi_learning_rate=300.0, phi="LayerNorm")
    before = weights(trainer.model)
    trainer.train()
    scores = {c.kind: c.score for c in trainer.result.candidates}
    assert trainer.result.best_score >= scores["start"]
    if trainer.result.chosen.kind == "start":
        assert_equal_weights(before, weights(trainer.model))


def test_saved_models_are_ordinary_models(tmp_path):
    """In checkpoints in the midst of the phase, and at the end; nothing of ours is needed to load them."""
    probe, outputs = Texts(20, seed=9).ids, {}

    class Look(TrainerCallback):
        def on_save(self, args, state, control, model=None, **kwargs):
            with torch.no_grad():
                outputs[f"checkpoint-{state.global_step}"] = model.eval()(probe).logits

    trainer = bert_trainer(tmp_path, save_strategy="steps", save_steps=2, callbacks=[Look()])
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    with torch.no_grad():
        outputs["final"] = trainer.model.eval()(probe).logits
        for name, expected in outputs.items():
            loaded, info = AutoModelForSequenceClassification.from_pretrained(tmp_path / name, output_loading_info=True)
            assert not info["missing_keys"] and not info["unexpected_keys"]
            assert torch.equal(loaded.eval()(probe).logits, expected)
    assert set(outputs) == {"checkpoint-2", "checkpoint-4", "final"}
    assert torch.equal(outputs["checkpoint-4"], outputs["final"])


def test_train_can_be_called_again(tmp_path):
    trainer = bert_trainer(tmp_path, max_steps=2, metric_steps=1)
    callbacks = list(trainer.callback_handler.callbacks)
    trainer.train()
    first, calls = trainer.result, sum(trainer.ledger.calls.values())
    trainer.train()
    assert trainer.result is not first and sum(trainer.ledger.calls.values()) < 2 * calls
    assert trainer.callback_handler.callbacks == callbacks


def test_model_init_builds_phi_anew_and_a_search_begins_each_trial_afresh(tmp_path):
    trainer = bert_trainer(tmp_path, model_init=lambda: tiny_bert(), max_steps=2, metric_steps=1)
    trainer.train()
    first = weights(trainer.model)
    trainer.train()
    assert_equal_weights(first, weights(trainer.model))


@pytest.mark.slow
def test_hyperparameter_search_starts_every_trial_afresh(tmp_path):
    pytest.importorskip("optuna")
    trainer = text_trainer(tmp_path, trainer_kwargs={"model_init": lambda: tiny_bert()}, max_steps=2, metric_steps=1)
    phases = []

    def objective(metrics):
        phases.append((trainer.phase, trainer.args.phi_dim))
        return metrics["eval_probability"]

    trainer.hyperparameter_search(
        hp_space=lambda trial: {"phi_dim": trial.suggest_categorical("phi_dim", [2, 3])},
        n_trials=2, direction="maximize", compute_objective=objective,
    )
    assert len(phases) == 2 and phases[0][0] is not phases[1][0]


def test_the_metric_s_first_fault_stops_before_training(tmp_path):
    def broken(prediction):
        raise KeyError("no such column")

    model = tiny_bert()
    before = weights(model)
    trainer = bert_trainer(tmp_path, model=model, metric=broken)
    with pytest.raises(MetricError, match="no such column.*\n.*nothing was trained"):
        trainer.train()
    assert_equal_weights(before, weights(model))
    assert trainer.state.global_step == 0


def of_unknown_direction(prediction):
    return 0.5


def test_guidance_scalars_come_with_trainer_s_logs(tmp_path):
    trainer = bert_trainer(tmp_path, logging_steps=1)
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(entries) == 4 and all(np.isfinite(entry["loss"]) for entry in entries)
    wanted = {"value", "calls", "passes", "failed_calls", "standard_error"}
    assert {f"metricopt/{name}" for name in wanted} <= set(entries[-1])


@pytest.mark.parametrize(
    ("kwargs", "error", "match"),
    [
        ({"phi": "nonsense_xyz"}, PhiError, "matches no parameter"),
        ({"phi": "adapter"}, PhiError, "get_peft_model"),
        ({"metric_steps": 9}, ConfigurationError, "metric_steps=9 is more than the 4 optimizer steps"),
        ({"observation_dataset": None, "selection_dataset": None}, ConfigurationError, "pass eval_dataset"),
        (
            {"observation_dataset": None, "selection_dataset": None, "eval_dataset": Texts(1)},
            ConfigurationError,
            "too few",
        ),
        ({"metric": "no_such_metric_anywhere"}, ConfigurationError, "worst_class_recall"),
        ({"metric": 3}, ConfigurationError, "callable"),
        ({"guide": "evolution"}, ConfigurationError, "guide='evolution' must be a Guide, or one of auto"),
        ({"greater_is_better": None, "metric": of_unknown_direction}, ConfigurationError, "Nothing says which way"),
    ],
)
def test_what_cannot_work_is_refused_before_training(tmp_path, kwargs, error, match):
    trainer = bert_trainer(tmp_path, **kwargs)
    with pytest.raises(error, match=match):
        trainer.train()
    assert trainer.state.global_step == 0


def test_groups_as_texts_are_named_with_what_to_do(tmp_path):
    """The collator drops them, and Trainer then gives a metric no labels at all."""
    rows = [{"input_ids": row["input_ids"], "labels": int(row["labels"]), "group": "ab"[i % 2]}
            for i, row in enumerate(Texts(40))]  # fmt: skip

    def worst(prediction):
        labels, groups = prediction.label_ids
        right = prediction.predictions.argmax(-1) == labels
        return float(min(right[groups == group].mean() for group in np.unique(groups)))

    trainer = bert_trainer(
        tmp_path, metric=worst, label_names=["labels", "group"], train_dataset=rows, observation_dataset=rows,
        selection_dataset=rows,
    )  # fmt: skip
    with pytest.raises(MetricError, match="The column 'group' holds texts, which are no labels: encode it"):
        trainer.train()


def test_a_script_that_only_predicts_is_asked_for_nothing(tmp_path):
    """No eval set, no direction, arguments of the old class: nothing of this matters before train."""
    old = TrainingArguments(str(tmp_path), metric_for_best_model="recall", report_to=[], use_cpu=True)
    trainer = MetricOptTrainer(tiny_bert(), old, compute_metrics=lambda p: {"recall": true_class_probability(p)})
    assert 0 < trainer.predict(Texts(20, seed=5)).metrics["test_recall"] < 1
    trainer.evaluate(Texts(20, seed=5))
    trainer.save_model()
    with pytest.raises(ConfigurationError, match="MetricOptConfig"):
        trainer.train()


def test_a_phi_object_and_an_optimizer_of_one_s_own(tmp_path):
    model = tiny_bert()
    phi = FiLM(model, layers="layer.0", output_bias=False) + Subset(model, "classifier")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = bert_trainer(tmp_path, model=model, phi=phi, optimizers=(optimizer, None))
    for _ in range(2):
        trainer.train()
        assert trainer.phi is phi and trainer.result.phi == phi.description
    with pytest.raises(ConfigurationError, match="phi was built on another model"):
        bert_trainer(tmp_path, phi=phi).train()


def test_a_run_of_one_step_and_a_run_that_ends_early(tmp_path, caplog):
    short = text_trainer(tmp_path, max_steps=1, metric_steps=None)
    short.train()
    assert len(short.result.curve) == 1

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == self.step

    for step in (2, 6):
        stop = Stop()
        stop.step = step
        trainer = text_trainer(tmp_path, trainer_kwargs={"callbacks": [stop]})
        trainer.train()
        assert trainer.state.global_step == step and trainer.phase.started is (step == 6)
        assert ("ended at step 2, before its metric phase" in caplog.text) is True
        if step == 6:
            assert trainer.result.chosen in trainer.result.candidates and trainer.result.why


@pytest.mark.parametrize(("calls", "errors"), [(100, 1), (4 * plan.FEW_CALLS, 4)])
def test_beside_few_calls_the_standard_error_is_taken_once(tmp_path, calls, errors):
    trainer = bert_trainer(tmp_path, metric_call_budget=calls)
    trainer.train()
    found = [row["standard_error"] for row in trainer.result.curve]
    assert len(found) == 4 and len(set(found)) == errors and min(found) > 0
