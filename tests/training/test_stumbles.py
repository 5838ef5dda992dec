"""What a new user stumbles over, each in the form in which it was typed."""

import logging

import numpy as np
import pytest
import torch
from datasets import Dataset
from helpers import Texts, tiny_bert, true_class_probability, worst_class_recall
from runs import TEXT_RUN, bert_trainer, text_trainer
from transformers import EvalPrediction

from metricopt_hf import ConfigurationError, Metric, MetricError, MetricOptConfig, MetricOptTrainer
from metricopt_hf.evaluation import ledger
from metricopt_hf.posthoc import add_bias, tune_bias


def rows(size=48, seed=1, **columns):
    texts = Texts(size, seed)
    return Dataset.from_dict({"input_ids": texts.ids.tolist(), "labels": texts.labels.tolist(), **columns})


def money(prediction):
    labels, amount = prediction.label_ids
    return float((amount * (prediction.predictions.argmax(-1) == labels)).mean())


def trainer_of(folder, evaluated, metric=money, **kwargs):
    settings = {**TEXT_RUN, "metric_for_best_model": None, "max_steps": 2, "metric_steps": 2, **kwargs}
    args = MetricOptConfig(str(folder), **settings)
    return MetricOptTrainer(tiny_bert(), args, train_dataset=rows(), eval_dataset=evaluated, metric=metric)


def test_a_column_of_floats_among_the_labels_reaches_the_metric(tmp_path):
    amounts = np.random.default_rng(0).lognormal(size=48)
    trainer = trainer_of(tmp_path, rows(amount=amounts), label_names=["labels", "amount"])
    trainer.train()
    assert trainer.result.failed_calls == 0 and trainer.result.start.score > 0


def test_a_column_of_texts_among_the_labels_is_refused_by_name(tmp_path):
    trainer = trainer_of(tmp_path, rows(amount=["much", "little"] * 24), label_names=["labels", "amount"])
    with pytest.raises(MetricError, match="column 'amount' holds texts.*class_encode_column"):
        trainer.train()


def test_a_forgotten_label_name_is_hinted_at(tmp_path):
    with pytest.raises(MetricError, match=r"has amount too.*say label_names=\['labels', 'amount'\]"):
        trainer_of(tmp_path, rows(amount=[1.0, 2.0] * 24)).train()


def test_another_error_of_a_metric_is_no_hint_at_columns(tmp_path):
    def broken(prediction):
        raise ValueError("no such class")

    with pytest.raises(MetricError, match="no such class") as failure:
        trainer_of(tmp_path, rows(amount=[1.0, 2.0] * 24), broken).train()
    assert "label_names" not in str(failure.value)


def test_what_predict_returns_is_tuned_and_measured(tmp_path):
    trainer = bert_trainer(tmp_path, metric=Metric(worst_class_recall, "worst_class_recall"))
    output = trainer.predict(Texts(60, seed=5))
    bias = tune_bias(trainer.metric, output)
    assert trainer.metric(add_bias(output, bias)) > trainer.metric(output)
    same = EvalPrediction(output.predictions, output.label_ids)
    np.testing.assert_array_equal(tune_bias(trainer.metric, same), bias)


def test_logits_in_a_dict_have_no_bias_and_a_word_says_so():
    prediction = EvalPrediction({"colour": np.eye(3), "shape": np.eye(2)}, np.arange(3))
    for call in (lambda: tune_bias(Metric(money, "money"), prediction), lambda: add_bias(prediction, np.zeros(3))):
        with pytest.raises(ConfigurationError, match=r"in a dict \(colour, shape\).*predictions\['colour'\]"):
            call()


@pytest.mark.parametrize("beside", [None, worst_class_recall])
def test_evaluate_reports_the_metric_given(tmp_path, beside):
    trainer = bert_trainer(tmp_path, metric=true_class_probability, compute_metrics=beside)
    found = trainer.evaluate(Texts(40, seed=6))
    output = trainer.predict(Texts(40, seed=6))
    assert found["eval_true_class_probability"] == pytest.approx(true_class_probability(output))
    assert ("eval_worst_class_recall" in found) == (beside is not None)
    assert trainer.state.log_history[-1]["eval_true_class_probability"] == found["eval_true_class_probability"]


def test_the_best_checkpoint_can_be_that_of_the_metric_given(tmp_path):
    trainer = text_trainer(
        tmp_path, trainer_kwargs={"metric": Metric(true_class_probability, "probability"), "compute_metrics": None},
        eval_strategy="steps", eval_steps=4, save_strategy="best",
    )
    trainer.train()
    assert trainer.state.best_metric is not None


def test_a_metric_given_that_fails_in_an_evaluation_of_the_run_does_not_end_it(tmp_path, caplog):
    def moody(prediction):
        if len(prediction.label_ids) == 48:
            raise ValueError("not on all rows")
        return true_class_probability(prediction)

    trainer = text_trainer(
        tmp_path, trainer_kwargs={"metric": moody, "compute_metrics": None}, eval_strategy="steps", eval_steps=4,
        metric_for_best_model=None,
    )
    trainer.train()
    assert np.isnan([e["eval_moody"] for e in trainer.state.log_history if "eval_moody" in e]).all()
    assert "not on all rows" in caplog.text
    with pytest.raises(MetricError, match="not on all rows"):
        trainer.evaluate()


def test_start_and_end_of_the_phase_are_logged_whatever_logging_steps_is(tmp_path):
    trainer = text_trainer(tmp_path, logging_strategy="no")
    trainer.train()
    logged = {name: e["step"] for e in trainer.state.log_history for name in e if name.startswith("metricopt/")}
    assert logged == {"metricopt/start_score": 5, "metricopt/kept_score": 7}
    scores = [e[name] for e in trainer.state.log_history for name in logged if name in e]
    assert scores == [trainer.result.start.score, trainer.result.chosen.score]


@pytest.fixture
def bars(monkeypatch):
    """What progress bars were shown: [description, calls, batches, whether silent]."""
    shown = []

    class Bar(ledger.tqdm):
        def __init__(self, *args, **kwargs):
            shown.append([kwargs["desc"], 0, 0, kwargs["disable"]])
            super().__init__(*args, **kwargs)

        def update(self, n=1):
            shown[-1][1:3] = shown[-1][1] + n, int(self.postfix.split()[0])
            return super().update(n)

    monkeypatch.setattr(ledger, "tqdm", Bar)
    return shown


@pytest.mark.parametrize("silent", [False, True])
def test_all_that_the_phase_takes_time_for_moves_a_bar(tmp_path, bars, silent):
    trainer = text_trainer(tmp_path, disable_tqdm=silent)
    trainer.train()
    steps = [f"metric step {i} of 3" for i in (1, 2, 3)]
    assert [bar[0] for bar in bars] == ["first call of the metric", "start of the metric phase", *steps, "selection"]
    assert all(calls and batches for _, calls, batches, _ in bars), bars
    assert sum(bar[1] for bar in bars) == sum(trainer.ledger.calls.values())
    assert {bar[3] for bar in bars} == {silent}


def test_a_diagnosis_moves_a_bar(tmp_path, bars):
    trainer = bert_trainer(tmp_path, metric=Metric(worst_class_recall, "worst_class_recall"))
    found = trainer.diagnose()
    assert [bar[0] for bar in bars] == ["diagnosis"] and bars[0][2] > 4
    assert bars[0][1] == sum(found.ledger.calls.values()) > 0


def test_a_printed_result_has_five_lines(tmp_path):
    trainer = text_trainer(tmp_path)
    trainer.train()
    lines = str(trainer.result).splitlines()
    assert len(lines) == 5 and all(line.strip() for line in lines)


def test_a_metric_knows_our_calls_from_trainer_s(tmp_path):
    ours, others = [], []

    def compute_metrics(prediction):
        (ours if getattr(prediction, "of_metricopt", False) else others).append(len(prediction.label_ids))
        return {"probability": true_class_probability(prediction)}

    trainer = text_trainer(tmp_path, trainer_kwargs={"compute_metrics": compute_metrics})
    trainer.train()
    assert len(ours) > 100 and not others
    trainer.evaluate()
    assert others == [48]


def test_batches_of_batch_eval_metrics_are_not_gathered(tmp_path, caplog):
    """So that memory does not grow with the observation set."""
    caplog.set_level(logging.INFO, "metricopt_hf")
    sizes = []

    class Running:
        def __call__(self, prediction, compute_result):
            sizes.append(len(prediction.predictions))
            found = float(torch.softmax(prediction.predictions, -1).max(-1).values.mean())
            return {"probability": found} if compute_result else None

    trainer = text_trainer(
        tmp_path, trainer_kwargs={"compute_metrics": Running()}, batch_eval_metrics=True, per_device_eval_batch_size=8
    )
    trainer.train()
    assert max(sizes) == 8 and "computed batch by batch" in caplog.text
