"""The diagnosis before training: right where the answer is known, and without a trace."""

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import assert_equal_weights, tiny_bert, weights
from runs import bert_trainer
from torch import nn
from transformers import Trainer, TrainingArguments

from metricopt_hf import ConfigurationError, Diagnosis, Ledger, Metric, MetricError, MetricOptConfig, MetricOptTrainer
from metricopt_hf.diagnosis import GUIDANCE, NO, NOTHING, OPEN, THRESHOLD, TITLES, TOO_FEW, YES, Gain, judged
from metricopt_hf.evaluation.model_metric import ModelMetric


class Scores(nn.Linear):
    """logits = weight x + bias; what it is given as `group` it would not take."""

    def __init__(self, weight, bias):
        super().__init__(2, 2)
        state = {"weight": [[-w for w in weight], weight], "bias": bias}
        self.load_state_dict({name: torch.tensor(values) for name, values in state.items()})

    def forward(self, features, labels=None):
        logits = super().forward(features)
        return {"logits": logits} if labels is None else {"loss": F.cross_entropy(logits, labels), "logits": logits}


def examples(size, seed):
    """Labels in two groups: the first feature says the label as well in each, the second says the group."""
    generator = np.random.default_rng(seed)
    labels, group = generator.integers(2, size=(2, size))
    features = np.stack([2 * labels - 1, 2 * group - 1], 1) + generator.normal(size=(size, 2))
    rows = zip(torch.tensor(features, dtype=torch.float32), labels.tolist(), group.tolist(), strict=True)
    return [{"features": x, "labels": y, "group": g} for x, y, g in rows]


def right(prediction):
    return prediction.predictions.argmax(-1) == prediction.label_ids[0]


def worst(prediction, *columns):
    """Accuracy in the worst of the groups that columns make."""
    groups = np.stack(columns, 1)
    return min(float(right(prediction)[(groups == group).all(1)].mean()) for group in np.unique(groups, axis=0))


def worst_group_error(prediction):
    return 1 - worst(prediction, *prediction.label_ids)  # smaller is better


def accuracy(prediction):
    return float(right(prediction).mean())


def total_money(prediction):
    return float((right(prediction) * (1000 + 1000 * prediction.label_ids[1])).sum())


def scores_trainer(folder, metric, weight=(0.6, 0.8), bias=(0.0, 0.0), size=400, **config):
    numbers = {"greater_is_better": True, "max_steps": 4, "disable_tqdm": True, "metric_call_budget": 800, **config}
    numbers |= {"phi": "weight|bias", "label_names": ["labels", "group"], "use_cpu": True, "report_to": []}
    sets = {f"{name}_dataset": examples(size, seed) for seed, name in enumerate(("train", "observation", "selection"))}
    return MetricOptTrainer(Scores(weight, bias), MetricOptConfig(str(folder), **numbers), metric=metric, **sets)


def test_where_the_model_is_best_already_there_is_nothing_to_gain(tmp_path):
    found = scores_trainer(tmp_path, accuracy, (1.0, 0.0)).diagnose()
    assert found.recommendation == NOTHING and found.examples_needed is None and found.examples == 800


def test_where_a_threshold_is_wrong_a_threshold_suffices(tmp_path):
    found = scores_trainer(tmp_path, lambda p: worst(p, p.label_ids[0]), (1.0, 0.0), (1.0, -1.0)).diagnose()
    assert found.recommendation == THRESHOLD and found.verdict("bias") == YES != found.verdict("phi")
    assert found.gains["bias", "start"].mean > 0.15 and found.scores["bias"] > found.scores["start"]


def test_where_the_model_looks_at_the_group_guidance_pays(tmp_path, capsys):
    trainer = scores_trainer(tmp_path, worst_group_error, greater_is_better=False)
    found = trainer.diagnose()
    assert found.recommendation == GUIDANCE and found.verdict("bias") != YES
    assert found.beyond.mean > 0.1 and found.scores["phi"] < found.scores["start"]
    assert sum(found.ledger.passes.values()) == 2 * (1 + 3)  # predictions; forward and a backward pass per logit
    assert trainer.ledger.calls == Ledger().calls and found.seconds > sum(found.ledger.seconds.values()) * 0.5
    assert capsys.readouterr().out == ""  # no table until it is printed


def test_money_has_the_same_verdicts_and_a_sum_the_error_of_a_sum(tmp_path):
    metrics = (lambda p: total_money(p) / len(right(p))), total_money
    mean, total = (scores_trainer(tmp_path, metric).diagnose() for metric in metrics)
    assert mean.recommendation == total.recommendation == GUIDANCE
    assert 5 < mean.worthwhile < 100 and total.worthwhile == pytest.approx(400 * mean.worthwhile, rel=0.5)
    ratio = total.gains["phi", "start"].error / mean.gains["phi", "start"].error
    assert 0.75 * 400 < ratio < 1.5 * 400  # a half's sum scatters by half as much


@pytest.mark.parametrize(("size", "config"), [(1, {}), (12, {}), (40, {"observe": "predictions_on_all_rows"})])
def test_without_an_error_nothing_is_told(tmp_path, size, config):
    found = scores_trainer(tmp_path, accuracy, size=size, **config).diagnose()
    assert found.recommendation == TOO_FEW and found.verdict("bias") == found.verdict("phi") == OPEN
    assert found.examples_needed == float("inf") and "An error takes 16 examples in each set" in str(found)
    assert " ± " not in str(found).partition("Recommendation")[0]


def test_a_metric_that_fails_once_is_asked_again(tmp_path):
    calls = []

    def flaky(prediction):
        calls.append(1)
        return accuracy(prediction) if len(calls) % 3 else float("nan")

    found = scores_trainer(tmp_path, flaky).diagnose()
    assert all(np.isfinite(score) for score in found.scores.values())
    broken = diagnosis((float("nan"), 0.01))
    assert broken.recommendation == TOO_FEW and "the metric fails" in str(broken) and "nan ±" not in str(broken)
    assert "The metric failed 3 times on the same rows." in str(broken)


@pytest.mark.parametrize("calls", [0, 1])
def test_without_calls_phi_stays_where_it_is(tmp_path, calls):
    found = scores_trainer(tmp_path, accuracy, metric_call_budget=calls).diagnose()
    assert found.gains["phi", "bias"] == Gain(0.0, 0.0) and found.recommendation == NOTHING


def test_nothing_is_left_behind(tmp_path):
    model = tiny_bert().train()
    model.bert.eval()
    next(model.parameters()).requires_grad_(False)
    trainer = bert_trainer(tmp_path, model=model)

    def state():
        rng = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
        hooks = [(m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
        parameters = [(name, p.requires_grad, p.grad) for name, p in model.named_parameters()]
        return rng, hooks, parameters, trainer.phase, trainer.optimizer, trainer.state.global_step

    before, now = weights(model), state()
    first = trainer.diagnose()
    assert_equal_weights(before, weights(model))
    assert state() == now and first.gains == trainer.diagnose().gains


@pytest.mark.parametrize("guided", [False, True])
def test_training_is_the_same_behind_a_diagnosis(tmp_path, guided):
    ends = []
    for diagnosed in (False, True):
        trainer = bert_trainer(tmp_path)
        if diagnosed:
            trainer.diagnose()
        if not guided:
            args = TrainingArguments(str(tmp_path), max_steps=4, use_cpu=True, report_to=[], weight_decay=0.1)
            trainer = Trainer(trainer.model, args, train_dataset=trainer.train_dataset)
        trainer.train()
        ends.append(weights(trainer.model))
    assert_equal_weights(*ends)


def test_refusals(tmp_path):
    with pytest.raises(ConfigurationError, match="no metric to diagnose"):
        bert_trainer(tmp_path, metric=None, compute_metrics=None).diagnose()
    with pytest.raises(ConfigurationError, match="worthwhile=0 must be positive"):
        bert_trainer(tmp_path).diagnose(worthwhile=0)
    of_model = ModelMetric(lambda model: 0.0, "size", greater_is_better=False)
    with pytest.raises(ConfigurationError, match="'size' is one of the model.*nothing to diagnose"):
        bert_trainer(tmp_path, metric=of_model).diagnose()
    decided = {"preprocess_logits_for_metrics": lambda logits, labels: logits.argmax(-1)}  # as texts are generated
    with pytest.raises(ConfigurationError, match="Nothing can be told before training: .* no floating-point numbers"):
        bert_trainer(tmp_path, metric=lambda p: float((p.predictions == p.label_ids).mean()), **decided).diagnose()
    gathering = Metric(lambda prediction, compute_result: 0.0, "gathered", batchwise=True)
    with pytest.raises(ConfigurationError, match="batch by batch: there are no predictions to diagnose"):
        bert_trainer(tmp_path, metric=gathering).diagnose()
    with pytest.raises(MetricError, match="no_such_column"):
        bert_trainer(tmp_path, metric=lambda prediction: prediction.no_such_column).diagnose()


@pytest.mark.parametrize(
    ("mean", "error", "verdict"),
    [(0.05, 0.02, YES), (0.05, 0.03, OPEN), (0.01, 0.008, OPEN), (0.006, 0.005, NO), (0.0, 0.01, NO), (-0.05, 0.04, NO),
     (0.0, 0.0, NO), (0.005, 0.001, NO), (0.019, 0.001, YES), (0.5, np.inf, OPEN), (float("nan"), 0.01, OPEN)],
)  # fmt: skip
def test_verdicts_by_hand(mean, error, verdict):
    assert Gain(mean, error).verdict(0.02) == verdict
    assert Gain(1e3 * mean, 1e3 * error).verdict(20) == verdict  # in another unit


def diagnosis(phi, bias=None, beyond=None, **fields):
    gains = {("phi", "start"): Gain(*phi)}
    if bias is not None:
        gains |= {("bias", "start"): Gain(*bias), ("phi", "bias"): Gain(*(beyond or (phi[0] - bias[0], phi[1])))}
    scores = {"start": 0.5} | ({} if bias is None else {"bias": 0.5 + bias[0]}) | {"phi": 0.5 + phi[0]}
    values = {"metric": "m", "greater_is_better": True, "examples": 100, "worthwhile": 0.02, "seconds": 0.0, **fields}
    return Diagnosis(scores=scores, gains=gains, ledger=Ledger(), **values)


@pytest.mark.parametrize(
    ("phi", "bias", "beyond", "expected"),
    [
        ((0.01, 0.01), (0.0, 0.01), None, NOTHING), ((0.0, 0.001), None, None, NOTHING),
        ((0.0, 0.01), (-0.1, 0.01), None, NOTHING),  # better than a bad bias, not than the start
        ((0.11, 0.01), (0.1, 0.01), None, THRESHOLD),
        ((0.224, 0.028), (0.197, 0.028), (0.027, 0.02), THRESHOLD),  # what phi gives beyond it is open
        ((0.1, 0.015), (0.0, 0.01), None, GUIDANCE), ((0.1, 0.01), None, None, GUIDANCE),
        ((0.03, 0.05), (0.0, 0.01), None, TOO_FEW), ((0.0, 0.01), (0.0, 0.05), None, TOO_FEW),
        ((0.1, 0.08), None, None, TOO_FEW),
    ],
)  # fmt: skip
def test_recommendations_by_hand(phi, bias, beyond, expected):
    found = diagnosis(phi, bias, beyond)
    assert found.recommendation == expected and f"Recommendation: {expected}." in str(found)
    assert (found.examples_needed is not None) == (OPEN in (found.verdict("bias"), found.verdict("phi")))


def test_the_examples_needed_are_rounded_and_capped():
    assert diagnosis((0.04, 0.04)).examples_needed == 400  # twice the error of the gain on a fourth of them
    assert diagnosis((0.0, 0.04)).examples_needed == 1600  # to tell a gain that is just worth having
    assert diagnosis((0.039, 0.04)).examples_needed == 430  # 420.8
    never = diagnosis((0.0, 40.0))
    assert never.examples_needed == float("inf") and "would take more examples than you will get." in str(never)


def test_a_gain_that_never_varies_has_no_known_error():
    metric = Metric(accuracy, "accuracy")
    fold = {"start": 0.0, "phi": 1.0}, {"start": np.zeros(50), "phi": np.ones(50)}
    found = judged([fold, fold], metric, 40, 0.1, Ledger(), 0.0)
    assert str(found.beyond) == "+1, error unknown" and found.verdict("phi") == OPEN


def test_it_is_printed_as_one_table():
    found = diagnosis((0.224, 0.028), (0.197, 0.028), (0.027, 0.02), greater_is_better=False)
    lines = str(found).splitlines()
    assert lines[0].startswith("Diagnosis before training: m (smaller is better), 100 examples")
    assert [line.split("  ")[0] for line in lines[3:8]] == [*TITLES.values(), "phi beyond the better", ""]
    assert lines[4].split()[4:] == "0.697 +0.197 ± 0.028 yes".split()
    assert lines[6].split()[4:] == "+0.027 ± 0.02 cannot tell".split()
    assert "suffices. To tell what cannot be told would take about 220 examples." in lines[8] and len(lines) == 10
    assert str(Gain(0.0, 0.0)) == "no difference" and str(Gain(0.1, float("inf"))) == "+0.1, error unknown"
    without_bias = str(diagnosis((0.1, 0.01))).splitlines()
    assert without_bias[4].endswith("+0.1 ± 0.01             yes") and without_bias[5] == ""
