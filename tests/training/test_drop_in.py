"""The class names are changed and nothing else: what works with Trainer works guided."""

import datasets
import numpy as np
import pytest
import torch
from helpers import Texts, tiny_bert, true_class_probability, weights
from runs import text_trainer
from transformers import EarlyStoppingCallback, Trainer, TrainingArguments

EVALUATED = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}


def assert_guided(trainer):
    assert trainer.ledger.calls["observe"] > 0 and trainer.result.failed_calls == 0
    assert trainer.result.chosen.known and set(weights(trainer.model)) == set(weights(tiny_bert()))


def test_renamed_and_nothing_else(tmp_path):
    ours = text_trainer(tmp_path, metric_steps=None, metric_call_budget=None, phi_dim=64)
    plain = text_trainer(tmp_path, Trainer, config=TrainingArguments)
    for trainer in (ours, plain):
        trainer.train()
    assert_guided(ours)
    assert set(plain.evaluate()) == set(ours.evaluate())


@pytest.mark.parametrize(("patience", "step"), [(1, 4), (3, 8)], ids=["before the phase", "in the phase"])
def test_early_stopping(tmp_path, patience, step, caplog):
    stop = EarlyStoppingCallback(patience, early_stopping_threshold=10.0)
    trainer = text_trainer(tmp_path, trainer_kwargs={"callbacks": [stop]}, load_best_model_at_end=True, max_steps=12,
                           metric_steps=6, **EVALUATED)  # fmt: skip
    trainer.train()
    assert trainer.state.global_step == step and trainer.phase.started is (step == 8)
    assert ("ended at step 4, before its metric phase" in caplog.text) is (step == 4)
    assert ("Nothing was selected: training ended early" in caplog.text) is (step == 8)
    assert trainer.evaluate()["eval_probability"] == pytest.approx(trainer.state.best_metric, abs=1e-6)


@pytest.mark.parametrize("name", ["eval_second_probability", "second_probability"])
def test_dict_of_eval_sets(tmp_path, name):
    sets = {"first": Texts(20, seed=2), "second": Texts(36, seed=5)}
    trainer = text_trainer(tmp_path, trainer_kwargs={"eval_dataset": sets}, metric_for_best_model=name, **EVALUATED)
    assert trainer.metric.name == "probability" and len(trainer.observation_dataset) == 18
    trainer.train()
    assert_guided(trainer)


class Stream(torch.utils.data.IterableDataset):
    """Nobody knows its length or its columns."""

    column_names = None

    def __iter__(self):
        texts = Texts(96, seed=1)
        return iter(texts[i] for i in range(len(texts)))


def loss_func(outputs, labels, num_items_in_batch=None):
    return torch.nn.functional.cross_entropy(outputs["logits"], labels)


class Batchwise:
    """Called with one batch after the other, as tensors."""

    def __init__(self):
        self.seen, self.sizes = [], set()

    def __call__(self, prediction, compute_result):
        assert isinstance(prediction.predictions, torch.Tensor)
        self.sizes.add(len(prediction.label_ids))
        self.seen += (prediction.predictions.argmax(-1) == prediction.label_ids).tolist()
        if compute_result:
            value, self.seen = float(np.mean(self.seen)), []
            return {"probability": value}


def with_inputs(prediction):
    rows = len(prediction.label_ids)
    assert len(prediction.inputs) == rows and len(prediction.losses) == rows
    return {"probability": true_class_probability(prediction)}


def of_classes(prediction):
    assert prediction.predictions.ndim == 1
    return {"probability": float((prediction.predictions == prediction.label_ids).mean())}


def table():
    texts = Texts(48, seed=2)
    columns = {"input_ids": texts.ids.tolist(), "label": texts.labels.tolist(), "text": ["unused"] * 48}
    return datasets.Dataset.from_dict(columns)


@pytest.mark.parametrize(
    ("kwargs", "trainer_kwargs", "observed"),
    [
        ({"label_smoothing_factor": 0.1, "lr_scheduler_type": "cosine", "warmup_steps": 2}, {}, "predictions"),
        ({}, {"compute_loss_func": loss_func}, "predictions"),
        ({"gradient_checkpointing": True, "bf16": True}, {}, "predictions"),
        ({"optim": "adafactor", "gradient_accumulation_steps": 2}, {}, "predictions"),
        ({"dataloader_num_workers": 1, "auto_find_batch_size": True}, {}, "predictions"),
        ({"include_for_metrics": ["inputs", "loss"]}, {"compute_metrics": with_inputs}, "predictions"),
        ({"eval_accumulation_steps": 1, "neftune_noise_alpha": 5.0, "eval_on_start": True}, {}, "predictions"),
        ({"train_sampling_strategy": "group_by_length", "eval_do_concat_batches": True}, {}, "predictions"),
        ({}, {"train_dataset": Stream()}, "predictions"),
        ({}, {"train_dataset": table(), "eval_dataset": table()}, "predictions"),
        ({"batch_eval_metrics": True}, {"compute_metrics": Batchwise()}, "scores"),
        ({"batch_eval_metrics": True, "eval_do_concat_batches": False}, {"compute_metrics": Batchwise()}, "scores"),
        ({}, {"compute_metrics": of_classes, "preprocess_logits_for_metrics": lambda z, y: z.argmax(-1)}, "scores"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_trainer_s_other_arguments(tmp_path, kwargs, trainer_kwargs, observed):
    trainer = text_trainer(
        tmp_path, trainer_kwargs=trainer_kwargs, max_steps=4, metric_steps=2, metric_call_budget=40, guide="pairs",
        **kwargs,
    )  # fmt: skip
    trainer.train()
    assert_guided(trainer)
    assert trainer.result.observed == observed
    assert trainer.evaluate()["eval_probability"] > 0
    if isinstance(metric := trainer_kwargs.get("compute_metrics"), Batchwise):
        assert metric.sizes == {8}  # 24 rows and 48 rows; never all of them at once


@pytest.mark.slow
def test_torch_compile(tmp_path):
    ends = []
    for compiled in ({"torch_compile": True, "torch_compile_backend": "aot_eager"}, {}):
        trainer = text_trainer(tmp_path, max_steps=4, metric_steps=2, **compiled)
        trainer.train()
        assert_guided(trainer)
        ends.append(weights(trainer.model))
    assert all(torch.allclose(ends[0][name], ends[1][name], atol=1e-4) for name in ends[0])


def test_tensorboard_shows_the_guidance_under_one_prefix(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    text_trainer(tmp_path, report_to="tensorboard", logging_steps=2).train()
    board = EventAccumulator(str(next(p.parent for p in (tmp_path / "board").rglob("events*"))))
    board.Reload()
    ours = {tag for tag in board.Tags()["scalars"] if "metricopt" in tag}
    assert "train/metricopt/value" in ours and all(tag.startswith("train/metricopt/") for tag in ours)
