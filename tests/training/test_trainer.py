"""The trainer's wiring: blending into .grad, phases, selection, saving, errors before training."""

import numpy as np
import pytest
import torch
from helpers import (
    OPTIMUM,
    Texts,
    assert_equal_weights,
    tiny_bert,
    weights,
    worst_class_recall,
)
from runs import Recorder, Truth, bert_trainer, quadratic_trainer
from transformers import AutoModelForSequenceClassification, TrainingArguments

from metricopt_hf import (
    ConfigurationError,
    FiLM,
    MetricError,
    MetricOptTrainer,
    PhiError,
    Subset,
)


@pytest.mark.parametrize("accumulate", [1, 4])
def test_the_gradient_after_blending_is_the_formula(tmp_path, accumulate):
    trainer = quadratic_trainer(tmp_path, Truth(), Recorder, value_weight=2.5, gradient_accumulation_steps=accumulate)
    trainer.train()
    followed = 0
    for before, after, phi, direction in trainer.records:
        v = 2 * (phi - torch.as_tensor(OPTIMUM, dtype=torch.float32))  # smaller is better: against it is downhill
        expected = before + 2.5 * direction.trust * (before.norm() / v.norm()) * v
        assert torch.allclose(after, expected, rtol=1e-6, atol=1e-7)
        followed += direction.trust > 0
    assert len(trainer.records) == 20 and followed > 10


def test_the_truth_improves_the_metric_that_the_loss_does_not_see(tmp_path):
    def final(guide, **kwargs):
        trainer = quadratic_trainer(tmp_path, guide, max_steps=40, **kwargs)
        trainer.train()
        return trainer.result

    guided, loss_only = final(Truth()), final(None, value_weight=0)
    assert guided.best_score < 0.5 * loss_only.best_score


def test_a_guide_is_followed_as_far_as_it_is_certain(tmp_path):
    class Doubtful(Truth):
        def gradient_agreement(self, phi):
            return 0.25

    def run(guide):
        trainer = quadratic_trainer(tmp_path, guide)
        trainer.train()
        return trainer.phase

    sure, unsure = run(Truth()), run(Doubtful())
    told = [row for row in unsure.curve if row["trust"] > 0]
    assert told and all(row["gradient_agreement"] == 0.25 for row in told)
    assert unsure.log_scalars()["gradient_agreement"] == 0.25
    assert unsure.direction.trust == pytest.approx(0.25 * told[-1]["trust"])
    assert not torch.equal(sure.last_phi, unsure.last_phi)


def test_a_guide_that_lies_is_not_followed(tmp_path):
    """Its predictions are the truth's, turned round: trust is zero at every step, and training is the loss's alone."""
    lied, loss_only = quadratic_trainer(tmp_path, Truth(-1)), quadratic_trainer(tmp_path, value_weight=0)
    lied.train()
    loss_only.train()
    assert all(entry["trust"] == 0 and entry["gradient_agreement"] is None for entry in lied.result.curve)
    assert torch.equal(lied.result.last_phi, loss_only.result.last_phi)


def test_the_value_function_finds_the_way_by_itself(tmp_path):
    guided = quadratic_trainer(tmp_path, max_steps=60, perturbation_std=0.3, metric_call_budget=None, observe_steps=4)
    loss_only = quadratic_trainer(tmp_path, max_steps=60, value_weight=0, metric_call_budget=0)
    guided.train()
    loss_only.train()
    assert guided.result.best_score < 0.8 * loss_only.result.best_score


def test_drop_in_with_compute_metrics_and_metric_for_best_model(tmp_path, caplog):
    trainer = bert_trainer(
        tmp_path,
        compute_metrics=worst_class_recall,
        metric_for_best_model="worst_class_recall",
        eval_dataset=Texts(120, seed=2),
        observation_dataset=None,
        selection_dataset=None,
    )
    observed = {tuple(x["input_ids"].tolist()) for x in trainer.observation_dataset}
    selected = {tuple(x["input_ids"].tolist()) for x in trainer.selection_dataset}
    assert "not held out" in caplog.text
    assert len(trainer.observation_dataset) == len(trainer.selection_dataset) == 60
    assert len(observed & selected) < 5  # equal texts by chance aside
    trainer.train()
    assert trainer.ledger.calls["observe"] == 24
    assert trainer.value_function is not None and len(trainer.observations) == 24


def test_a_guessed_direction_is_said_aloud(tmp_path, caplog):
    assert bert_trainer(tmp_path, greater_is_better=None).metric.greater_is_better
    assert "greater_is_better is not set: taking greater values" in caplog.text


@pytest.mark.parametrize(("budget", "per_round"), [(10, 8), (24, 8), (7, 3), (0, 8)])
def test_the_budget_is_kept_exactly(tmp_path, budget, per_round):
    calls = []

    def counted(prediction):
        calls.append(len(prediction.label_ids))
        return worst_class_recall(prediction)["worst_class_recall"]

    trainer = bert_trainer(
        tmp_path, metric=counted, metric_call_budget=budget, round_size=per_round, observe_steps=2
    )
    trainer.train()
    ledger = trainer.ledger
    assert ledger.calls["observe"] == budget
    assert len(calls) == budget + ledger.calls["select"] + ledger.calls["check"]
    assert set(calls) == {60}  # always the whole observation or selection set


def test_everything_but_phi_is_frozen_in_eval_mode_and_comes_back(tmp_path):
    modes = []

    class Spy(MetricOptTrainer):
        def _guide_update(self, step):
            modes.append(any(m.training for m in self.model.modules()))
            super()._guide_update(step)

    model = tiny_bert()
    before = weights(model)
    trainer = bert_trainer(tmp_path, model, cls=Spy)
    names = set(trainer.phi.names)
    trainer.train()
    assert modes == [False] * 12
    moved = {name for name, value in weights(model).items() if not torch.equal(value, before[name])}
    assert moved and all("LayerNorm" in name or name == "classifier.bias" for name in moved)
    assert any("film" in name for name in names)
    assert set(before) == set(weights(model))  # merged: an ordinary model again
    assert all(p.requires_grad for p in model.parameters())


def test_the_best_phi_by_selection_is_put_in_place_and_the_start_is_a_candidate(tmp_path):
    """With a learning rate that destroys the model, what was at the start is kept."""
    model = tiny_bert()
    before = weights(model)
    trainer = bert_trainer(tmp_path, model, learning_rate=1.0, phi_learning_rate=30.0, optim="sgd", max_grad_norm=0.0)
    trainer.train()
    scores = [entry["selection"] for entry in trainer.result.curve]
    assert trainer.result.best_score == max(scores)
    assert trainer.result.best_step == trainer.result.curve[int(np.argmax(scores))]["step"]
    if trainer.result.best_step == 0:
        assert_equal_weights(before, weights(model))


def test_saved_models_are_ordinary_models(tmp_path):
    """In checkpoints in the midst of tuning, and at the end; nothing of ours is needed to load them."""
    trainer = bert_trainer(tmp_path, save_strategy="steps", save_steps=6, phi_learning_rate=0.05)
    probe = {"input_ids": Texts(20, seed=9).ids}

    outputs = {}

    class Spy(MetricOptTrainer):
        pass

    original = trainer._save_checkpoint

    def spy(model, trial):
        original(model, trial)
        with torch.no_grad():
            outputs[trainer.state.global_step] = trainer.model.eval()(**probe).logits

    trainer._save_checkpoint = spy
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    with torch.no_grad():
        outputs["final"] = trainer.model.eval()(**probe).logits
        for name, expected in outputs.items():
            folder = tmp_path / ("final" if name == "final" else f"checkpoint-{name}")
            loaded, info = AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
            assert not info["missing_keys"] and not info["unexpected_keys"]
            assert torch.allclose(loaded.eval()(**probe).logits, expected, atol=1e-5)
    assert set(outputs) == {6, 12, "final"}


def test_train_can_be_called_again(tmp_path):
    trainer = bert_trainer(tmp_path)
    trainer.train()
    first = weights(trainer.model)
    trainer.train()
    assert set(first) == set(weights(trainer.model))
    assert trainer.ledger.calls["observe"] == 24  # of the last run


def test_the_metric_s_first_fault_stops_before_training(tmp_path):
    model = tiny_bert()
    before = weights(model)

    def broken(prediction):
        raise KeyError("no such column")

    trainer = bert_trainer(tmp_path, model, metric=broken)
    with pytest.raises(MetricError, match="nothing was trained"):
        trainer.train()
    assert_equal_weights(before, {k: v for k, v in weights(model).items() if "film" not in k})


def test_guidance_scalars_come_with_trainer_s_logs(tmp_path):
    trainer = bert_trainer(tmp_path, logging_steps=4)
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(entries) == 3
    assert {"metricopt/selection", "metricopt/trust", "metricopt/calls"} <= set(entries[-1])


@pytest.mark.parametrize(
    ("kwargs", "error", "match"),
    [
        ({"phi": "nonsense_xyz"}, PhiError, "matches no parameter"),
        ({"phi": "adapter"}, PhiError, "get_peft_model"),
        ({"optim": "lomo"}, ConfigurationError, "lomo.*adamw_torch"),
        ({"optim": "galore_adamw_layerwise"}, ConfigurationError, "galore_adamw_layerwise"),
        ({"observation_dataset": None, "selection_dataset": None}, ConfigurationError, "pass eval_dataset"),
        (
            {"observation_dataset": None, "selection_dataset": None, "eval_dataset": Texts(1)},
            ConfigurationError,
            "too few",
        ),
        ({"metric": "no_such_metric_anywhere"}, ConfigurationError, "worst_class_recall"),
        ({"metric": 3}, ConfigurationError, "callable"),
        (
            {"optimizers": (torch.optim.SGD(tiny_bert().parameters(), lr=1.0), None)},
            ConfigurationError,
            "does not hold",
        ),
    ],
)
def test_what_cannot_work_is_refused_before_training(tmp_path, monkeypatch, kwargs, error, match):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(error, match=match):
        bert_trainer(tmp_path, **kwargs).train()


def test_training_arguments_of_the_old_class_are_named(tmp_path):
    with pytest.raises(ConfigurationError, match="MetricOptConfig"):
        MetricOptTrainer(
            tiny_bert(),
            TrainingArguments(str(tmp_path), metric_for_best_model="worst_class_recall", report_to=[]),
            eval_dataset=Texts(10),
            compute_metrics=worst_class_recall,
        ).train()


def test_a_phi_object_and_an_optimizer_of_one_s_own(tmp_path):
    model = tiny_bert()
    phi = FiLM(model, layers="layer.0", output_bias=False) + Subset(model, "classifier")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = bert_trainer(tmp_path, model, phi=phi, optimizers=(optimizer, None))
    trainer.train()
    assert trainer.phi is phi and not phi.inserted


def test_model_init_builds_phi_anew(tmp_path):
    trainer = bert_trainer(tmp_path, model_init=lambda: tiny_bert())
    trainer.train()
    first = weights(trainer.model)
    trainer.train()
    assert_equal_weights(first, weights(trainer.model))
