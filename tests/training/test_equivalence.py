"""Claims as equivalences: what must not change, does not change by a bit."""

import pytest
import torch
from helpers import assert_equal_weights, tiny_bert, weights, without_times
from runs import bert_trainer, probability, text_trainer
from torch import nn
from transformers import ResNetConfig, ResNetForImageClassification, Trainer, TrainerCallback, TrainingArguments

from metricopt_hf import MetricOptConfig, MetricOptTrainer

PHASE = 5  # TEXT_RUN: the steps before the metric phase


class Look(TrainerCallback):
    """Keeps the weights and the rates before each step, and what was logged and evaluated when."""

    def __init__(self):
        self.weights, self.rates, self.events = [], [], []

    def on_step_begin(self, args, state, control, model=None, lr_scheduler=None, **kwargs):
        self.weights.append(weights(model))
        self.rates.append(lr_scheduler.get_last_lr())

    def on_log(self, args, state, control, **kwargs):
        self.events.append(("log", state.global_step))

    def on_evaluate(self, args, state, control, **kwargs):
        self.events.append(("evaluate", state.global_step))


def run(folder, cls=MetricOptTrainer, config=MetricOptConfig, model=None, **kwargs):
    look = Look()
    given = {"callbacks": [look], **kwargs.pop("given", {})}
    trainer = text_trainer(folder, cls, model, config, given, **kwargs)
    trainer.train()
    return trainer, look


@pytest.mark.parametrize("name", [None, "loss", "eval_loss"])
def test_without_a_metric_it_is_trainer(tmp_path, name):
    kwargs = {"logging_steps": 2, "eval_strategy": "steps", "eval_steps": 4, "greater_is_better": None}
    plain, seen = run(tmp_path, Trainer, TrainingArguments, metric_for_best_model=None, **kwargs)
    ours, look = run(tmp_path, metric_for_best_model=name, **kwargs)
    assert not ours.guided and ours.result is None
    assert_equal_weights(weights(plain.model), weights(ours.model))
    assert without_times(plain.state.log_history) == without_times(ours.state.log_history)
    assert seen.events == look.events and all(p.requires_grad for p in ours.model.parameters())


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"optim": "sgd", "lr_scheduler_type": "cosine", "warmup_steps": 2},
        {"gradient_accumulation_steps": 4, "max_grad_norm": 0.01},
        {"label_smoothing_factor": 0.1, "bf16": True},
        {"weight_decay": 0.1, "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2},
    ],
    ids=str,
)
def test_all_steps_before_the_metric_phase_are_trainer_s(tmp_path, kwargs):
    """Bit for bit, schedule included, up to the weights right before the first metric step; then phi alone moves."""
    plain, seen = run(tmp_path / "plain", Trainer, TrainingArguments, **kwargs)
    ours, look = run(tmp_path / "ours", **kwargs)
    for step in range(PHASE + 1):
        assert_equal_weights(seen.weights[step], look.weights[step])
    assert seen.rates == look.rates
    before, after = look.weights[PHASE], weights(ours.model)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved <= set(ours.phi.names) and ours.ledger.calls["observe"] > 0
    assert len(ours.result.curve) == 3 and ours.result.start_step == PHASE


def test_statistics_of_a_batch_norm_stand_still_in_the_metric_phase(tmp_path):
    torch.manual_seed(0)
    sizes = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=2)
    generator = torch.Generator().manual_seed(0)
    labels = (torch.rand(80, generator=generator) < 0.4).long()
    rows = [{"pixel_values": torch.randn(3, 16, 16, generator=generator) + 0.3 * y, "labels": y} for y in labels]
    given = {"train_dataset": rows, "eval_dataset": rows[:48]}
    trainer, look = run(tmp_path, model=ResNetForImageClassification(sizes), given=given)
    names = [name for name, _ in trainer.model.named_buffers()]
    after = weights(trainer.model)
    assert all(torch.equal(look.weights[PHASE][name], after[name]) for name in names)
    assert any(not torch.equal(look.weights[0][name], after[name]) for name in names)
    score = trainer.predict(trainer.selection_dataset).metrics["test_probability"]
    assert score == pytest.approx(trainer.result.best_score, abs=1e-6)


def test_the_same_seed_twice_is_the_same_run(tmp_path):
    runs = [run(tmp_path / str(i))[0] for i in range(2)]
    assert_equal_weights(*(weights(trainer.model) for trainer in runs))
    first, second = (trainer.result for trainer in runs)
    assert first.curve == second.curve and [c.score for c in first.candidates] == [c.score for c in second.candidates]


def test_metric_steps_see_the_whole_update_whatever_the_accumulation(tmp_path):
    """value_weight is finite, so that the loss's gradient counts, and batches of one update hold the same rows."""
    found = []
    for batch, accumulate in ((8, 1), (2, 4)):
        model = tiny_bert()
        model.accepts_loss_kwargs = False
        trainer = bert_trainer(
            tmp_path, model=model, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulate,
            value_weight=1.0, max_steps=2, metric_steps=2, logging_steps=1,
        )
        trainer.train()
        found.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
        assert len(trainer.result.curve) == 2
    assert found[0] == pytest.approx(found[1], rel=1e-3)


class Step(nn.Module):
    """Draws random numbers in its forward pass."""

    def __init__(self):
        super().__init__()
        self.inner = tiny_bert()

    def forward(self, input_ids, labels=None):
        torch.rand(3)
        return self.inner(input_ids=input_ids, labels=labels)


def test_the_check_before_training_leaves_every_random_state_alone(tmp_path):
    plain, seen = run(tmp_path, Trainer, TrainingArguments, model=Step())

    def reseeding(prediction):
        torch.manual_seed(3)
        return probability(prediction)

    ours, look = run(tmp_path, model=Step(), given={"compute_metrics": reseeding})
    assert_equal_weights(seen.weights[PHASE], look.weights[PHASE])
    assert ours.ledger.calls["check"] > 0
