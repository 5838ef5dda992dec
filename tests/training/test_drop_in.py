"""The class names are changed and nothing else: what works with Trainer works guided."""

import datasets
import numpy as np
import pytest
import torch
from helpers import Texts, tiny_bert, true_class_probability, weights
from transformers import EarlyStoppingCallback, EvalPrediction, Trainer, TrainingArguments

from metricopt_hf import MetricOptConfig, MetricOptTrainer


def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
    return {"probability": true_class_probability(prediction)}


def make(folder, trainer_kwargs=None, classes=(MetricOptTrainer, MetricOptConfig), **kwargs):
    """A script's call of Trainer; `classes` are all that changes. Every argument here is Trainer's own."""
    trainer_class, config_class = classes
    args = {
        "max_steps": 16,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-2,
        "metric_for_best_model": "probability",
        "greater_is_better": True,
        "eval_strategy": "steps",
        "eval_steps": 4,
        "save_steps": 4,
        "logging_steps": 4,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
    }
    data = {
        "train_dataset": Texts(160, seed=1),
        "eval_dataset": Texts(80, seed=2),
        "compute_metrics": compute_metrics,
    }
    data.update(trainer_kwargs or {})
    if "model_init" not in data:
        data.setdefault("model", tiny_bert())
    return trainer_class(args=config_class(str(folder), **{**args, **kwargs}), **data)


def assert_guided(trainer, calls=1200):
    assert trainer.phase.started
    assert 0 < trainer.ledger.calls["observe"] <= calls
    assert not any("film" in name for name in weights(trainer.model))


def test_renamed_and_nothing_else(tmp_path):
    plain = make(tmp_path / "plain", classes=(Trainer, TrainingArguments))
    plain.train()
    ours = make(tmp_path / "ours")
    ours.train()
    assert_guided(ours)
    assert set(plain.evaluate()) == set(ours.evaluate())


def test_load_best_model_at_end(tmp_path):
    trainer = make(tmp_path, load_best_model_at_end=True)
    trainer.train()
    assert_guided(trainer)
    assert trainer.evaluate()["eval_probability"] == pytest.approx(trainer.state.best_metric, abs=1e-6)


def test_early_stopping(tmp_path):
    class Never(EarlyStoppingCallback):
        stopped = False

        def on_evaluate(self, args, state, control, metrics, **kwargs):
            super().on_evaluate(args, state, control, metrics, **kwargs)
            self.stopped |= control.should_training_stop

    callback = Never(1, early_stopping_threshold=10.0)
    trainer = make(
        tmp_path, {"callbacks": [callback]}, load_best_model_at_end=True, metric_start_ratio=0.1, max_steps=40
    )
    trainer.train()
    assert callback.stopped and trainer.state.global_step == 8
    assert_guided(trainer)


def test_stopped_before_the_metric_phase_the_model_is_trainer_s(tmp_path):
    trainer = make(
        tmp_path,
        {"callbacks": [EarlyStoppingCallback(1, early_stopping_threshold=10.0)]},
        load_best_model_at_end=True,
        metric_start_ratio=0.75,
        max_steps=80,
    )
    trainer.train()
    assert trainer.state.global_step == 8 and not trainer.phase.started
    assert not any("film" in name for name in weights(trainer.model))


def test_eval_on_start(tmp_path):
    trainer = make(tmp_path, eval_on_start=True)
    trainer.train()
    assert_guided(trainer)
    assert trainer.state.log_history[0]["step"] == 0


@pytest.mark.parametrize("name", ["eval_second_probability", "second_probability"])
def test_dict_of_eval_sets(tmp_path, name):
    sets = {"first": Texts(40, seed=2), "second": Texts(60, seed=5)}
    trainer = make(tmp_path, {"eval_dataset": sets}, metric_for_best_model=name)
    assert trainer.metric.name == "probability"
    assert len(trainer.observation_dataset) == 30
    trainer.train()
    assert_guided(trainer)


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        texts = Texts(160, seed=1)
        return iter(texts[i] for i in range(len(texts)))


def test_iterable_train_set(tmp_path):
    trainer = make(tmp_path, {"train_dataset": Stream()})
    trainer.train()
    assert_guided(trainer)


def test_tensorboard_shows_the_guidance_under_one_prefix(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    trainer = make(tmp_path, report_to="tensorboard", metric_start_ratio=0.25)
    trainer.train()
    folder = next(p.parent for p in (tmp_path / "board").rglob("events*"))
    board = EventAccumulator(str(folder))
    board.Reload()
    ours = {tag for tag in board.Tags()["scalars"] if "metricopt" in tag}
    assert "train/metricopt/trust" in ours and all(tag.startswith("train/metricopt/") for tag in ours)


@pytest.mark.slow
def test_hyperparameter_search_starts_every_trial_afresh(tmp_path):
    pytest.importorskip("optuna")
    runs = []

    class Spy(MetricOptTrainer):
        def _finish_run(self):
            super()._finish_run()
            runs.append((self.phase, self.args.value_weight, dict(self.ledger.calls)))

    trainer = make(
        tmp_path,
        {"model_init": lambda: tiny_bert()},
        classes=(Spy, MetricOptConfig),
        save_strategy="no",
        metric_call_budget=16,
    )
    trainer.hyperparameter_search(
        hp_space=lambda trial: {"value_weight": trial.suggest_categorical("value_weight", [0.5, 4.0])},
        n_trials=2,
        direction="maximize",
        compute_objective=lambda metrics: metrics["eval_probability"],
    )
    assert len(runs) == 2 and runs[0][0] is not runs[1][0]
    assert all(calls["observe"] == 16 for _, _, calls in runs)


@pytest.mark.slow
def test_torch_compile(tmp_path):
    trainer = make(tmp_path, torch_compile=True, torch_compile_backend="aot_eager", max_steps=8, save_strategy="no")
    trainer.train()
    assert_guided(trainer)
    eager = make(tmp_path, max_steps=8, save_strategy="no")
    eager.train()
    for name, value in weights(eager.model).items():
        assert torch.allclose(value, weights(trainer.model)[name], atol=1e-4), name


def loss_func(outputs, labels, num_items_in_batch=None):
    return torch.nn.functional.cross_entropy(outputs["logits"], labels)


def batch_metrics():
    seen = []

    def compute(prediction, compute_result):
        seen.append(float((prediction.predictions.argmax(-1) == prediction.label_ids).float().mean()))
        if compute_result:
            value = float(np.mean(seen))
            seen.clear()
            return {"probability": value}
        return {}

    return compute


@pytest.mark.parametrize(
    ("kwargs", "trainer_kwargs"),
    [
        ({"label_smoothing_factor": 0.1}, {}),
        ({}, {"compute_loss_func": loss_func}),
        ({"batch_eval_metrics": True}, {"compute_metrics": batch_metrics()}),
        ({"gradient_checkpointing": True}, {}),
        ({"bf16": True}, {}),
        ({"lr_scheduler_type": "cosine", "warmup_steps": 2}, {}),
        ({"optim": "adafactor"}, {}),
        ({"optim": "sgd", "gradient_accumulation_steps": 2}, {}),
        ({"dataloader_num_workers": 1}, {}),
        ({"include_for_metrics": ["inputs", "loss"]}, {}),
        ({"eval_accumulation_steps": 1, "per_device_eval_batch_size": 16}, {}),
        ({"auto_find_batch_size": True}, {}),
        ({"neftune_noise_alpha": 5.0}, {}),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else None,
)
def test_trainer_s_other_arguments(tmp_path, kwargs, trainer_kwargs):
    trainer = make(tmp_path, trainer_kwargs, save_strategy="no", **kwargs)
    trainer.train()
    assert_guided(trainer)


def test_metrics_that_look_at_inputs_and_losses(tmp_path):
    shapes = []

    def compute(prediction):
        shapes.append((prediction.inputs.shape, prediction.losses.shape))
        return {"probability": true_class_probability(prediction)}

    make(tmp_path, {"compute_metrics": compute}, include_for_metrics=["inputs", "loss"], save_strategy="no").train()
    assert ((40, 8), (40,)) in shapes


def test_preprocess_logits_for_metrics(tmp_path):
    seen = set()

    def compute(prediction):
        seen.add(prediction.predictions.shape[1:])
        return {"probability": float((prediction.predictions == prediction.label_ids).mean())}

    trainer = make(
        tmp_path,
        {"compute_metrics": compute, "preprocess_logits_for_metrics": lambda logits, labels: logits.argmax(-1)},
        save_strategy="no",
    )
    trainer.train()
    assert seen == {()}


def test_remove_unused_columns(tmp_path):
    texts = Texts(80, seed=2)
    table = datasets.Dataset.from_dict(
        {"input_ids": texts.ids.tolist(), "label": texts.labels.tolist(), "text": ["unused"] * 80}
    )
    trainer = make(tmp_path, {"train_dataset": table, "eval_dataset": table}, save_strategy="no")
    trainer.train()
    assert_guided(trainer)


def test_group_gradients_read_the_labels_of_the_training_set(tmp_path):
    trainer = make(tmp_path, {"coordinates": "group_gradients"}, save_strategy="no")
    trainer.train()
    assert trainer.result.coordinates.dim == 3
