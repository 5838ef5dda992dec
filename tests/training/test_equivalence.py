"""Claims as equivalences: what must not change, does not change by a bit."""

import pytest
import torch
from helpers import Texts, assert_equal_weights, tiny_bert, weights, without_times, worst_class_recall
from transformers import Trainer, TrainerCallback, TrainingArguments

from metricopt_hf import FiLM, MetricOptConfig, MetricOptTrainer

TRAIN, EVAL = Texts(160, seed=1), Texts(90, seed=2)


def arguments(cls, folder, **kwargs):
    defaults = {
        "max_steps": 20,
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 32,
        "learning_rate": 1e-2,
        "logging_steps": 5,
        "eval_strategy": "steps",
        "eval_steps": 10,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return cls(str(folder), **{**defaults, **kwargs})


class Count(TrainerCallback):
    def __init__(self):
        self.events = []

    def on_evaluate(self, args, state, control, **kwargs):
        self.events.append(("evaluate", state.global_step))

    def on_log(self, args, state, control, **kwargs):
        self.events.append(("log", state.global_step))


def run(cls, args, **kwargs):
    model = kwargs.pop("model", None) or tiny_bert()
    trainer = cls(model, args, train_dataset=TRAIN, eval_dataset=EVAL, callbacks=[Count()], **kwargs)
    trainer.train()
    return trainer


def events(trainer):
    return next(c for c in trainer.callback_handler.callbacks if isinstance(c, Count)).events


@pytest.mark.parametrize("metric_for_best_model", [None, "loss", "eval_loss"])
def test_without_a_metric_it_is_trainer(tmp_path, metric_for_best_model):
    plain = run(Trainer, arguments(TrainingArguments, tmp_path), compute_metrics=worst_class_recall)
    ours = run(
        MetricOptTrainer,
        arguments(MetricOptConfig, tmp_path, metric_for_best_model=metric_for_best_model),
        compute_metrics=worst_class_recall,
    )
    assert not ours.guided
    assert_equal_weights(weights(plain.model), weights(ours.model))
    assert without_times(plain.state.log_history) == without_times(ours.state.log_history)
    assert events(plain) == events(ours)
    assert all(p.requires_grad for p in ours.model.parameters())


def frozen_film_bert():
    model = tiny_bert()
    phi = FiLM(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in phi.names)
    return model, phi


class EvalModeTrainer(Trainer):
    """Trainer on a model whose frozen modules stay in eval mode, as in the metric phase."""

    def compute_loss(self, model, *args, **kwargs):
        model.eval()
        return super().compute_loss(model, *args, **kwargs)


@pytest.mark.parametrize("budget", [0, 16])
@pytest.mark.parametrize("optim", ["adamw_torch", "sgd"])
def test_weight_zero_is_trainer_on_the_same_wrapped_and_frozen_model(tmp_path, budget, optim):
    """Whether or not the metric is observed meanwhile."""
    plain_model, plain_phi = frozen_film_bert()
    plain = run(EvalModeTrainer, arguments(TrainingArguments, tmp_path, optim=optim), model=plain_model)
    ours = run(
        MetricOptTrainer,
        arguments(
            MetricOptConfig,
            tmp_path,
            optim=optim,
            metric_start_ratio=0,
            value_weight=0,
            phi_learning_rate=None,
            metric_call_budget=budget,
            greater_is_better=True,
        ),
        metric=worst_class_recall,
        observation_dataset=Texts(40, seed=3),
        selection_dataset=Texts(40, seed=4),
    )
    assert ours.ledger.calls["observe"] == budget
    assert without_times(plain.state.log_history) == without_times(
        [{k: v for k, v in e.items() if k != "eval_worst_class_recall"} for e in ours.state.log_history]
    )
    assert events(plain) == events(ours)
    assert torch.equal(ours.result.last_phi, plain_phi.read())


def test_the_first_phase_is_a_shorter_trainer_run(tmp_path):
    """Bit for bit, schedule included; then everything but phi stands still."""
    plain = run(Trainer, arguments(TrainingArguments, tmp_path, max_steps=12))
    at_border = {}

    class Border(TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            if state.global_step == 12:
                at_border.update(weights(model))

    model = tiny_bert()
    ours = MetricOptTrainer(
        model,
        arguments(MetricOptConfig, tmp_path, metric_start_ratio=0.6, metric_call_budget=16, greater_is_better=True),
        train_dataset=TRAIN,
        eval_dataset=EVAL,
        metric=worst_class_recall,
        observation_dataset=Texts(40, seed=3),
        selection_dataset=Texts(40, seed=4),
        callbacks=[Border()],
    )
    ours.train()
    expected = weights(plain.model)
    assert_equal_weights(expected, {k: v for k, v in at_border.items() if "film" not in k})
    tuned = {name for name, value in weights(model).items() if not torch.equal(value, expected[name])}
    assert tuned <= {
        f"bert.encoder.layer.1.{norm}.LayerNorm.{part}"
        for norm in ("attention.output", "output")
        for part in ("weight", "bias")
    } | {"classifier.bias"}


def test_an_optimizer_of_one_s_own_keeps_its_learning_rate_in_the_first_phase(tmp_path):
    """In one group for all parameters, of which phi are some."""
    model = tiny_bert()
    plain = run(
        Trainer,
        arguments(TrainingArguments, tmp_path, max_steps=12),
        model=model,
        optimizers=(torch.optim.SGD(model.parameters(), lr=0.5), None),
    )
    at_border = {}

    class Border(TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            if state.global_step == 12:
                at_border.update(weights(model))

    model = tiny_bert()
    phi = FiLM(model)
    ours = MetricOptTrainer(
        model,
        arguments(MetricOptConfig, tmp_path, metric_start_ratio=0.6, metric_call_budget=16, greater_is_better=True),
        train_dataset=TRAIN,
        eval_dataset=EVAL,
        metric=worst_class_recall,
        phi=phi,
        observation_dataset=Texts(40, seed=3),
        selection_dataset=Texts(40, seed=4),
        callbacks=[Border()],
        optimizers=(torch.optim.SGD(model.parameters(), lr=0.5), None),
    )
    ours.train()
    assert_equal_weights(weights(plain.model), {k: v for k, v in at_border.items() if "film" not in k})


def test_the_same_seed_twice_is_the_same_run(tmp_path):
    def once():
        trainer = run(
            MetricOptTrainer,
            arguments(MetricOptConfig, tmp_path, metric_start_ratio=0, metric_call_budget=32, greater_is_better=True),
            metric=worst_class_recall,
        )
        return weights(trainer.model), [(o.score, o.z.tolist()) for o in trainer.observations]

    first, second = once(), once()
    assert_equal_weights(first[0], second[0])
    assert first[1] == second[1]


def test_accumulation_is_a_larger_batch(tmp_path):
    """1 x 8 and 8 x 1 take the same guided steps, up to float summation order."""
    results = []
    for batch, accumulate in ((8, 1), (1, 8)):
        model = tiny_bert()
        model.accepts_loss_kwargs = False  # else Trainer's loss grows with accumulation (transformers#47688)
        trainer = run(
            MetricOptTrainer,
            arguments(
                MetricOptConfig,
                tmp_path,
                metric_start_ratio=0,
                metric_call_budget=32,
                greater_is_better=True,
                per_device_train_batch_size=batch,
                gradient_accumulation_steps=accumulate,
                optim="sgd",
                eval_strategy="no",
            ),
            model=model,
            metric=worst_class_recall,
        )
        results.append(trainer.result.last_phi)
    assert torch.allclose(*results, rtol=1e-4, atol=1e-6)
